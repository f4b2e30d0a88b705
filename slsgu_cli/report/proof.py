"""What lets a reader check the page: the edit's hash, the records behind it, the commands."""

import math

from slsgu_cli.naming import known_as
from slsgu_cli.records import EditHeader, GradientHeader
from slsgu_cli.report.commands import commands
from slsgu_cli.report.figures import count, number, share
from slsgu_cli.report.gather import Dossier, EditFacts
from slsgu_cli.report.grids import Head, code, lines, paragraph, table, terms
from slsgu_cli.report.markup import Html, element, joined
from slsgu_cli.report.sections import Section, section


def the_edit(dossier: Dossier) -> Section:
    """Tell the hash of the edit's file, and what it changes in the model."""
    return section("The edit", dossier.edit, lambda edit: _edit(edit, dossier))


def _edit(edit: EditHeader, dossier: Dossier) -> Html:
    facts = dossier.facts
    told = terms(
        {
            "File": code(dossier.edit.path),
            "SHA-256 of the file": code(dossier.edit.sha256 or ""),
            "Changes one layer": code(edit.layer),
            "Tower": str(edit.tower),
            "Values in it": _extent(facts, dossier.gradients.get("forget")) if facts else None,
            "Step": f"{number(edit.step)} times the {_direction(edit)}",
            "Moves the layer by": f"{share(edit.share)} of its norm",
            "Made for": code(str(edit.model)),
            "Model's fingerprint": code(edit.model_fingerprint),
            "Written by": f"slsgu {edit.version}",
        }
    )
    if facts is None:
        return told
    rows = [
        (precision, code(before), code(facts.after[precision]))
        for precision, before in facts.before.items()
    ]
    heads = (Head("precision", False), Head("original", False), Head("edited", False))
    caption = f"SHA-256 of {known_as(edit.layer)} before and after, by the checkpoint's precision"
    note = paragraph(
        "The digest is of the layer's values as fp32 numbers, little-endian, in order. With it, "
        "anyone can tell an edited checkpoint from an original one. ",
        "Every other tensor keeps its bytes.",
        class_="quiet",
    )
    return joined((told, table(heads, rows, caption=caption), note))


def _direction(edit: EditHeader) -> str:
    if edit.ridge is None:
        return "forget gradient"
    return f"forget gradient, whitened with a ridge of {number(edit.ridge)}"


def _extent(facts: EditFacts, header: GradientHeader | None) -> str:
    told = f"{count(facts.values)}, of which {count(facts.changed)} move"
    if header is None:
        return told
    whole = sum(math.prod(weight.shape) for weight in header.weights.values())
    return f"{told}; {100 * facts.values / whole:.2g}% of the model's {count(whole)}"


def repeat(dossier: Dossier, store: str) -> Section:
    """Tell the commands that do it again."""
    told = commands(dossier)
    export = element("span", f"export SLSGU_STORE={store}", class_="line")
    intro = paragraph(
        "Written from the records. The same sources, model and version give the same edit."
    )
    return Section(
        "To repeat it", joined((intro, element("pre", element("code", export, lines(told)))))
    )


def records(dossier: Dossier) -> Section:
    """List every record this page was made from, with its hash and whether it still stands."""
    rows = [
        (
            finding.what,
            code(finding.path),
            str(finding.state) if finding.state else "none yet",
            code(finding.sha256) if finding.sha256 else None,
        )
        for finding in dossier.findings()
    ]
    heads = (Head("record", False), Head("path in the store", False), Head("state", False),
             Head("SHA-256", False))  # fmt: skip
    return Section(
        "Records behind this page", table(heads, rows, caption="Records and their state")
    )
