"""What was asked: the concept, the rows it was forgotten and measured on, and the model."""

from slsgu_cli.records import DataRef, GradientHeader, GradientPointer, SetManifest
from slsgu_cli.report.figures import count, number
from slsgu_cli.report.gather import Dossier
from slsgu_cli.report.grids import Head, code, lines, table, terms
from slsgu_cli.report.markup import Html, element, joined
from slsgu_cli.report.sections import Section, section


def request(dossier: Dossier) -> Section:
    """Tell which captions made the forget set, and where every row came from."""
    return section("What was asked", dossier.manifest, _request)


def fingerprints(dossier: Dossier) -> Section:
    """Tell which model and rows the gradients are of, by their fingerprints."""
    return section(
        "Model and gradients",
        dossier.pointer,
        lambda pointer: _fingerprints(pointer, dossier.gradients),
    )


def _request(manifest: SetManifest) -> Html:
    measured = (
        f"its rows in the evaluation set {manifest.forget_eval}, which no gradient saw"
        if manifest.forget_eval
        else "the forget set's own rows, which the gradient saw: not a held-out figure"
    )
    told = terms(
        {
            "Concept": manifest.concept,
            "Captions with": lines([code(pattern) for pattern in manifest.patterns]),
            "Model": code(str(manifest.model)),
            "Forgetting is measured on": measured if manifest.evals else None,
            "Seed of the draws": str(manifest.seed),
        }
    )
    parts = [("forget", manifest.forget), ("retain", manifest.retain)]
    parts += [(f"evaluation: {name}", ref) for name, ref in manifest.evals.items()]
    rows = [
        (
            role,
            count(ref.rows),
            count(ref.seen),
            _left_out(ref),
            lines([code(source) for source in ref.sources]),
        )
        for role, ref in parts
    ]
    heads = (Head("rows for", False), Head("kept"), Head("seen"), Head("left out", False),
             Head("from", False))  # fmt: skip
    digests = table(
        (Head("rows for", False), Head("fingerprint of the rows", False)),
        [(role, code(ref.fingerprint)) for role, ref in parts],
        caption="Fingerprints of the rows: pixels, tokens, labels, names and prompts",
    )
    return joined((told, table(heads, rows, caption="Rows and their sources"), digests))


def _left_out(ref: DataRef) -> Html | None:
    if not ref.refused:
        return None
    ordered = sorted(ref.refused.items(), key=lambda item: (-item[1], item[0]))
    return lines([f"{count(rows)} {reason}" for reason, rows in ordered])


def _fingerprints(pointer: GradientPointer, headers: dict[str, GradientHeader]) -> Html:
    told = terms(
        {
            "Model": code(str(pointer.model)),
            "Fingerprint": code(pointer.model_fingerprint),
            "Mini-batches of": f"{pointer.batch_size} pairs",
            "Arithmetic": f"{pointer.precision}, sums in fp32",
        }
    )
    rows = [
        (
            role,
            header.loss,
            number(header.mean_loss),
            count(header.rows),
            count(header.batches),
            code(getattr(pointer, role)),
        )
        for role, header in headers.items()
    ]
    heads = (Head("gradient of", False), Head("loss", False), Head("mean loss"), Head("pairs"),
             Head("mini-batches"), Head("name in the store", False))  # fmt: skip
    note = element(
        "p",
        "The fingerprint covers every weight and the architecture; the same weights in another "
        "container have the same one.",
        class_="quiet",
    )
    return joined((told, table(heads, rows, caption="The two gradients"), note))
