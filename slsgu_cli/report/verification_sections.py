"""The section on verification: what may recover the concept, and whether it does."""

from collections.abc import Collection
from itertools import zip_longest

from markupsafe import Markup

from slsgu_cli.figures.numbers import change, cosine, count, percent
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
        _look_alikes(original, edited),
        _neutral_prompts(edited),
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
        name=record.name,
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


def _look_alikes(original: VerifiedModel, edited: VerifiedModel) -> Table | None:
    """Return what classes like the concept lost, next to random ones."""
    from slsgu_cli.verification.checks.look_alikes import group_losses

    cells: list[tuple[Cell, ...]] = [
        (
            loss.group,
            str(loss.classes),
            str(loss.rows),
            percent(loss.before),
            percent(loss.after),
            f"{loss.lost:z.2f}",
            f"{loss.low:z.2f} to {loss.high:z.2f}",
            f"{loss.worst.name} {loss.worst.lost:z.2f}" if loss.worst else None,
        )
        for loss in group_losses(original, edited)
    ]
    if not cells:
        return None
    columns = [
        *texts("classes"),
        *figures(
            "number", "images", "TA@1, original", "TA@1, edited", "points lost", "95% interval"
        ),
        *texts("lost most"),
    ]
    return Table("Classes like the concept", columns, cells)


def _neutral_prompts(edited: VerifiedModel) -> Table | None:
    """Return how much of the structure of text embeddings remains, next to a random change."""
    finding = edited.finding(Check.NEUTRAL_PROMPTS)
    if finding is None or not finding.structure:
        return None
    cells: list[tuple[Cell, ...]] = [
        (what, count(each.prompts), percent(each.spread), percent(each.overlap))
        for what, each in finding.structure.items()
    ]
    columns = [*texts("after"), *figures("prompts", "spread", "overlap of the nearest prompts")]
    return Table("Text embeddings of neutral prompts, compared with the original", columns, cells)
