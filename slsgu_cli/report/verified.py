"""Does it stay forgotten: what a verification found, as a verdict for each probe."""

from itertools import zip_longest

from slsgu_cli.records import Accuracy, EditHeader
from slsgu_cli.report.charts import Series, legend, line_chart
from slsgu_cli.report.figures import change, cosine, percent
from slsgu_cli.report.gather import Dossier
from slsgu_cli.report.grids import Head, figure, paragraph, table
from slsgu_cli.report.markup import Child, Html, element, joined
from slsgu_cli.report.sections import Section, absent, section
from slsgu_cli.verification.records import Check, Subject, Verification

TITLE = "Does it stay forgotten"
CURVES = {
    Check.FINETUNE: "Trained on the retain set, without the concept",
    Check.RELEARN: "Taught the concept again",
}
STYLES = ("fa1", "ta0", "ta1", "ta2")


def verification(dossier: Dossier) -> Section:
    """Show what may bring the concept back, and whether it did."""
    found, edit = dossier.verification, dossier.edit.record
    if found.record is not None and not _of_edit(found.record, edit):
        return absent(TITLE, "No verification of this edit is recorded.", found.run)
    return section(TITLE, found, lambda record: _verification(record, edit))


def _of_edit(record: Verification, edit: EditHeader | None) -> list[Subject]:
    """Return the original model and the model with the edit; nothing without both."""
    original = [subject for subject in record.subjects if subject.edit is None][:1]
    edited = [subject for subject in record.subjects if edit and subject.edit == edit][:1]
    return original + edited if original and edited else []


def _verification(record: Verification, edit: EditHeader | None) -> Html:
    from slsgu_cli.verification.verdicts import Verdict, rows

    original, edited = _of_edit(record, edit)
    found = [row for row in rows(original, edited) if not row.detail]
    cells: list[tuple[Child, ...]] = [
        (
            row.probe,
            str(row.check),
            percent(row.before.top1),
            percent(row.after.top1),
            _utility_change(row.utilities),
            str(row.verdict),
            row.note,
        )
        for row in found
    ]
    heads = (Head("probe", False), Head("kind", False), Head("FA@1, original"),
             Head("FA@1, edited"), Head("TA@1, change in points"), Head("verdict", False),
             Head("note", False))  # fmt: skip
    counts = [(said, sum(row.verdict is said for row in found)) for said in Verdict]
    told = ", ".join(f"{said} {count}" for said, count in counts if count)
    lead = paragraph(
        f"{len(found)} probes: {told}. A verdict compares the edited model with the original "
        "under the same probe."
    )
    verdicts = table(heads, cells, caption="What was tried to bring the concept back")
    return joined(
        (lead, verdicts, _curves(original, edited), _became(original, edited),
         _membership(original, edited))
    )  # fmt: skip


def _utility_change(sides: tuple[dict[str, Accuracy] | None, ...]) -> str | None:
    before, after = sides
    if not before or not after:
        return None
    changes = [now.top1 - before[name].top1 for name, now in after.items() if name in before]
    return change(sum(changes) / len(changes)) if changes else None


def _curves(original: Subject, edited: Subject) -> Html | None:
    """Draw how fast the name comes back in training, beside a name that never was known."""
    charts = []
    for check, title in CURVES.items():
        before, after = original.finding(check), edited.finding(check)
        if not (before and after and before.curves and after.curves):
            continue
        curves = [("edited", after.curves[0])]
        curves += [(f"original, {curve.name}", curve) for curve in before.curves]
        series = [
            Series(label, tuple((float(p.step), p.forget.top1) for p in curve.points), style)
            for (label, curve), style in zip(curves, STYLES, strict=False)
        ]
        told = f"Forget accuracy by training step. {title}"
        drawn = line_chart(series, "training step", told=told)
        charts.append(figure(joined((legend(series), drawn)), title))
    return element("div", *charts, class_="charts") if charts else None


def _became(original: Subject, edited: Subject) -> Html | None:
    """Tell the names next to the forgotten one, and what its images are taken for."""
    before, after = (
        found.became if (found := subject.finding(Check.NEIGHBOURS)) else None
        for subject in (original, edited)
    )
    if before is None or after is None:
        return None
    columns = [
        [f"{near.name} {cosine(near.cosine)}" for near in before.nearest],
        [f"{near.name} {cosine(near.cosine)}" for near in after.nearest],
        [f"{taken.name} {100 * taken.rows / before.rows:.0f}%" for taken in before.taken_for],
        [f"{taken.name} {100 * taken.rows / after.rows:.0f}%" for taken in after.taken_for],
    ]
    cells = [(str(n), *row) for n, row in enumerate(zip_longest(*columns), start=1)]
    heads = (Head("no."), Head("nearest name, original", False),
             Head("nearest name, edited", False), Head("images taken for, original", False),
             Head("images taken for, edited", False))  # fmt: skip
    return table(heads, cells, caption="What the concept became")


def _membership(original: Subject, edited: Subject) -> Html | None:
    from slsgu_cli.verification.verdicts import exposure

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
        for was, now in zip(before.attacks, after.attacks, strict=True)
    ]
    heads = (Head("told by", False), Head("original"), Head("edited"), Head("verdict", False))
    caption = "Membership inference: how often forget pairs are told from others; 50% is chance"
    return table(heads, cells, caption=caption)
