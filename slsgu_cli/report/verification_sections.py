"""The section on verification: what may recover the concept, and whether it does."""

from collections.abc import Collection, Iterator
from itertools import zip_longest

from markupsafe import Markup

from slsgu_cli.figures.numbers import change, cosine, count, interval, number, percent
from slsgu_cli.records.figures import Share
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.verification import Check, Verification, VerifiedModel
from slsgu_cli.report.charts import training_chart
from slsgu_cli.report.gather import SetRecords
from slsgu_cli.report.sections import (
    Cell,
    Section,
    Table,
    absent,
    codes,
    figures,
    fill,
    section,
    texts,
)

TITLE = "Verification"
CURVES = {
    Check.FINETUNE: "Trained on the retain set, without the concept",
    Check.RELEARN: "Trained on images of the concept again",
}


def verification(records: SetRecords, written: Collection[str] = ()) -> Section:
    """Show the attempts to recover the concept, and their verdicts.

    They concern a model that was `written`, by fingerprint, if one was verified; otherwise the
    set's edit.
    """
    stored, record = records.verification, records.verification.record
    pair = verified_pair(record, records.edit.record, written) if record else []
    if record is not None and not pair:
        return absent(TITLE, "There is no verification of this edit yet.", stored.run)
    return section(TITLE, stored, lambda record: _verification(record, *pair))


def verified_pair(
    record: Verification, edit: EditHeader | None, written: Collection[str] = ()
) -> list[VerifiedModel]:
    """Return the original model and a `written` one, or else the one with the edit.

    The list is empty unless both were verified.
    """
    original = [model for model in record.subjects if model.edit is None][:1]
    whole = [model for model in record.subjects if model.edit is None and model.key in written]
    edited = whole or [model for model in record.subjects if edit and model.edit == edit]
    return original + edited[:1] if original and edited else []


def _verification(record: Verification, original: VerifiedModel, edited: VerifiedModel) -> Markup:
    from slsgu_cli.verification.results import conclusion, verdict_rows
    from slsgu_cli.verification.verdicts import Verdict

    variants = [row for row in verdict_rows(original, edited) if not row.detail]
    cells: list[tuple[Cell, ...]] = [
        (
            row.variant,
            str(row.check),
            percent(row.before.top1),
            percent(row.after.top1),
            percent(row.control.top1) if row.control else None,
            None if row.utility_change is None else change(row.utility_change),
            str(row.verdict),
            row.note,
        )
        for row in variants
    ]
    columns = [
        *texts("variant", "check"),
        *figures("FA@1, original", "FA@1, edited", "FA@1, control", "TA@1, change in points"),
        *texts("verdict", "note"),
    ]
    counts = [(word, sum(row.verdict is word for row in variants)) for word in Verdict]
    details = (
        _attempts(original, edited),
        _neighbourhood(original, edited),
        *_losses(original, edited),
        _classifiers(original, edited),
        *_retrieved(original, edited),
        _membership(original, edited),
    )
    return fill(
        "verification.html",
        conclusion=conclusion(record.concept, original, edited).text,
        variants=len(variants),
        verdicts=", ".join(f"{word} {count}" for word, count in counts if count),
        written=edited.label if edited.edit is None else None,
        table=Table("Attempts to recover the concept", columns, cells),
        skipped=[f"{each.check}: {each.skipped}." for each in edited.findings if each.skipped],
        charts=[
            (title, training_chart((original, edited), check, f"FA@1 by training step. {title}"))
            for check, title in CURVES.items()
            if _has_curves(original, check) and _has_curves(edited, check)
        ],
        details=[table for table in details if table is not None],
    )


def _has_curves(model: VerifiedModel, check: Check) -> bool:
    finding = model.finding(check)
    return finding is not None and bool(finding.curves)


def _attempts(original: VerifiedModel, edited: VerifiedModel) -> Table | None:
    """Return the best text that each attack found or learnt in place of the name."""
    cells: list[tuple[Cell, ...]] = [
        (str(finding.check), label, attempt.name, attempt.text, percent(attempt.forget.top1))
        for label, model in (("original", original), ("edited", edited))
        for finding in model.findings
        for attempt in finding.attempts
        if attempt == finding.best(attempt.name)
    ]
    if not cells:
        return None
    columns = [*texts("attack", "model", "made with"), *codes("text"), *figures("FA@1")]
    return Table("Texts found in place of the name", columns, cells)


def _neighbourhood(original: VerifiedModel, edited: VerifiedModel) -> Table | None:
    """Return the names nearest to the concept's, and the guesses for its images."""
    findings = (model.finding(Check.NEIGHBOURS) for model in (original, edited))
    sides = [finding.neighbourhood for finding in findings if finding and finding.neighbourhood]
    if len(sides) < 2:
        return None
    lists = [[f"{near.name} {cosine(near.cosine)}" for near in side.nearest] for side in sides]
    lists += [
        [f"{guess.name} {100 * guess.rows / side.rows:.0f}%" for guess in side.guesses]
        for side in sides
    ]
    cells = [(str(n), *row) for n, row in enumerate(zip_longest(*lists), start=1)]
    columns = [
        *figures("no."),
        *texts(
            "nearest name, original",
            "nearest name, edited",
            "images recognised as, original",
            "images recognised as, edited",
        ),
    ]
    return Table("Where the concept went", columns, cells)


def _losses(original: VerifiedModel, edited: VerifiedModel) -> Iterator[Table]:
    """Yield the losses of the nearest names, and of the classes that lost most."""
    from slsgu_cli.engine.utility import LEAST_ROWS
    from slsgu_cli.verification.checks.nearest import losses, most_harmed, nearest_names

    known = losses(original, edited)
    captions = {
        f"The names nearest to the concept's, on {name}": classes
        for name, classes in nearest_names(known).items()
    }
    captions[f"The largest losses among classes with {LEAST_ROWS} images or more"] = most_harmed(
        known
    )
    columns = [
        *texts("class"),
        *figures(
            "cosine of names",
            "images",
            "TA@1, original",
            "TA@1, edited",
            "change, points",
            "95% interval, edited",
        ),
    ]
    for caption, classes in captions.items():
        cells = [
            (
                row.name,
                cosine(row.cosine),
                count(row.rows),
                percent(row.before),
                percent(row.after),
                change(-row.lost),
                interval(Share.of(row.after, row.rows)),
            )
            for row in classes
        ]
        if cells:
            yield Table(caption, columns, cells)


def _classifiers(original: VerifiedModel, edited: VerifiedModel) -> Table | None:
    """Return how well classifiers on image features recognise the concept's images."""
    from slsgu_cli.verification.checks.probe import score_pairs

    cells: list[tuple[Cell, ...]] = [
        (
            f"{now.classifier}, {now.subject}",
            count(now.images),
            percent(was.accuracy),
            percent(now.accuracy),
            percent(was.recall),
            percent(now.recall),
        )
        for was, now in score_pairs(original, edited)
    ]
    if not cells:
        return None
    columns = [
        *texts("classifier and subject"),
        *figures(
            "training images",
            "accuracy, original",
            "accuracy, edited",
            "recall, original",
            "recall, edited",
        ),
    ]
    caption = (
        "Classifiers on image features: accuracy (50% is chance), and recall at 1% false positives"
    )
    return Table(caption, columns, cells)


def _retrieved(original: VerifiedModel, edited: VerifiedModel) -> Iterator[Table]:
    """Yield how well queries find the concept's images, and how far features moved."""
    from slsgu_cli.verification.checks.retrieval import retrievals

    pair = retrievals(original, edited)
    if pair is None:
        return
    queries: list[tuple[Cell, ...]] = [
        (
            f"{now.query}, in {now.index} index",
            percent(was.precision),
            percent(now.precision),
            percent(was.recall1),
            percent(now.recall1),
            percent(now.recall10),
        )
        for was, now in zip(pair[0].queries, pair[1].queries, strict=True)
    ]
    columns = [
        *texts("query"),
        *figures(
            "mAP, original",
            "mAP, edited",
            "recall@1, original",
            "recall@1, edited",
            "recall@10, edited",
        ),
    ]
    yield Table("Retrieval of the concept's images among all others", columns, queries)
    moved: list[tuple[Cell, ...]] = [
        (
            side.images,
            count(side.rows),
            percent(100 * side.identical / side.rows),
            percent(100 * side.far / side.rows),
            number(side.mean),
            number(side.largest),
        )
        for side in pair[1].shifts
    ]
    columns = [
        *texts("features of"),
        *figures("images", "bit-identical", "moved by more than 0.01", "mean move", "largest move"),
    ]
    yield Table("Changes of an existing index; a move is 1 - cosine", columns, moved)


def _membership(original: VerifiedModel, edited: VerifiedModel) -> Table | None:
    from slsgu_cli.verification.checks.membership import exposure

    before, after = original.finding(Check.MEMBERSHIP), edited.finding(Check.MEMBERSHIP)
    if before is None or after is None:
        return None
    cells = [
        (
            f"{was.figure}, against {was.against}",
            f"{was.mean:.1f} ± {was.deviation:.1f}%",
            f"{now.mean:.1f} ± {now.deviation:.1f}%",
            str(exposure(was, now)),
        )
        for was, now in zip(before.membership, after.membership, strict=True)
    ]
    columns = [*texts("attack"), *figures("original", "edited"), *texts("verdict")]
    caption = "Membership inference: how often an attack recognises forget pairs; 50% is chance"
    return Table(caption, columns, cells)
