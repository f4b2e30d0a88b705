"""What other commands recorded: verification, several concepts, comparison."""

from collections.abc import Collection
from itertools import zip_longest

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.compare.registry import label_of
from slsgu_cli.compare.tables import TableRow, better, mean_rows
from slsgu_cli.figures.html import (
    Child,
    Html,
    Series,
    change,
    code,
    cosine,
    count,
    element,
    figure_of,
    interval,
    joined,
    legend,
    line_chart,
    number,
    numeric,
    paragraph,
    percent,
    share,
    table,
)
from slsgu_cli.records.comparison import ClipComparison, Method
from slsgu_cli.records.figures import Share
from slsgu_cli.records.method import EditHeader, Trials
from slsgu_cli.records.studies import (
    JointSearch,
    Sweep,
    SweepRow,
    Trajectory,
)
from slsgu_cli.records.verification import Check, Verification, VerifiedModel
from slsgu_cli.report.edit_sections import step_charts
from slsgu_cli.report.gather import Section, SetRecords, absent, section

TITLE = "Does it stay forgotten"
CURVES = {
    Check.FINETUNE: "Trained on the retain set, without the concept",
    Check.RELEARN: "Taught the concept again",
}
STYLES = ("fa1", "ta0", "ta1", "ta2")


def verification(records: SetRecords, written: Collection[str] = ()) -> Section:
    """Show what may bring the concept back, and whether it did.

    It is that of a model that was `written`, by fingerprint, if one was verified, else of the
    set's edit.
    """
    evidence, record = records.verification, records.verification.record
    pair = verified_pair(record, records.edit.record, written) if record else []
    if record is not None and not pair:
        return absent(TITLE, "No verification of this edit is recorded.", evidence.run)
    return section(TITLE, evidence, lambda record: _verification(record, *pair))


def verified_pair(
    record: Verification, edit: EditHeader | None, written: Collection[str] = ()
) -> list[VerifiedModel]:
    """Return the original model and one that was `written`, or else the one with the edit.

    Nothing without both.
    """
    original = [model for model in record.subjects if model.edit is None][:1]
    whole = [model for model in record.subjects if model.edit is None and model.key in written]
    edited = whole or [model for model in record.subjects if edit and model.edit == edit]
    return original + edited[:1] if original and edited else []


def _verification(record: Verification, original: VerifiedModel, edited: VerifiedModel) -> Html:
    from slsgu_cli.verification.results import conclusion, rows
    from slsgu_cli.verification.verdicts import Verdict

    found = conclusion(record.concept, original, edited)
    lines = [row for row in rows(original, edited) if not row.detail]
    cells: list[tuple[Child, ...]] = [
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
        for row in lines
    ]
    figures = numeric("FA@1, original", "FA@1, edited", "FA@1, control", "TA@1, change in points")
    heads = ("variant", "check", *figures, "verdict", "note")
    counts = [(word, sum(row.verdict is word for row in lines)) for word in Verdict]
    verdict_counts = ", ".join(f"{word} {count}" for word, count in counts if count)
    lead = paragraph(
        f"{len(lines)} variants: {verdict_counts}. A verdict compares the edited model with the "
        "original under the same variant; a control is the same effort without the concept."
    )
    whole = None
    if edited.edit is None:
        words = "Tried on the model that was written, with all that was taken out of it: "
        whole = paragraph(words, code(edited.label), ".")
    verdicts = table(heads, cells, caption="What was tried to bring the concept back")
    return joined(
        (
            paragraph(found.text, class_="lead"),
            lead,
            whole,
            verdicts,
            _skipped(edited),
            _curves(original, edited),
            _attempts(original, edited),
            _became(original, edited),
            _losses(original, edited),
            _classifiers(original, edited),
            _retrieved(original, edited),
            _membership(original, edited),
        )
    )


def _curves(original: VerifiedModel, edited: VerifiedModel) -> Html | None:
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
        description = f"Forget accuracy by training step. {title}"
        drawn = line_chart(series, "training step", description=description)
        charts.append(figure_of(joined((legend(series), drawn)), title))
    return element("div", *charts, class_="charts") if charts else None


def _skipped(edited: VerifiedModel) -> Html | None:
    """Show which checks cannot run on the model, and why."""
    reasons = [
        f"{finding.check}: {finding.skipped}." for finding in edited.findings if finding.skipped
    ]
    return paragraph("Skipped: " + " ".join(reasons)) if reasons else None


def _attempts(original: VerifiedModel, edited: VerifiedModel) -> Html | None:
    """Tell what attacks found or learnt in place of the name, the best of each alone."""
    cells: list[tuple[Child, ...]] = [
        (str(finding.check), label, attempt.name, code(attempt.text), percent(attempt.forget.top1))
        for label, model in (("original", original), ("edited", edited))
        for finding in model.findings
        for attempt in finding.attempts
        if attempt == finding.best(attempt.name)
    ]
    heads = ("attack", "model", "made with", "text", *numeric("FA@1"))
    caption = "What was found in place of the name, and what it finds"
    return table(heads, cells, caption=caption) if cells else None


def _became(original: VerifiedModel, edited: VerifiedModel) -> Html | None:
    """Tell the names next to the forgotten one, and what its images are taken for."""
    findings = (model.finding(Check.NEIGHBOURS) for model in (original, edited))
    sides = [finding.neighbourhood for finding in findings if finding and finding.neighbourhood]
    if len(sides) < 2:
        return None
    columns = [[f"{near.name} {cosine(near.cosine)}" for near in side.nearest] for side in sides]
    columns += [
        [f"{guess.name} {100 * guess.rows / side.rows:.0f}%" for guess in side.guesses]
        for side in sides
    ]
    cells = [(str(n), *row) for n, row in enumerate(zip_longest(*columns), start=1)]
    heads = (
        *numeric("no."),
        "nearest name, original",
        "nearest name, edited",
        "images taken for, original",
        "images taken for, edited",
    )
    return table(heads, cells, caption="What the concept became")


def _losses(original: VerifiedModel, edited: VerifiedModel) -> Html | None:
    """Tell what it cost the nearest names, and the classes that it cost most."""
    from slsgu_cli.method.trial import LEAST_ROWS
    from slsgu_cli.verification.checks.nearest import losses, most_harmed, nearest_names

    known = losses(original, edited)
    captions = {
        f"The names nearest to the concept's, on {name}": classes
        for name, classes in nearest_names(known).items()
    }
    captions[f"Who lost most, of classes with {LEAST_ROWS} images or more"] = most_harmed(known)
    heads = (
        "class",
        *numeric(
            "cosine of names",
            "images",
            "TA@1, original",
            "TA@1, edited",
            "change, points",
            "95% interval, edited",
        ),
    )
    tables = []
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
            tables.append(table(heads, cells, caption=caption))
    return joined(tables) if tables else None


def _classifiers(original: VerifiedModel, edited: VerifiedModel) -> Html | None:
    """Show how well classifiers on image features find the concept's images."""
    from slsgu_cli.verification.checks.probe import score_pairs

    cells: list[tuple[Child, ...]] = [
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
    figures = numeric(
        "learnt from images",
        "accuracy, original",
        "accuracy, edited",
        "recall, original",
        "recall, edited",
    )
    caption = (
        "What image features tell: accuracy, of which 50% is chance, and images found with 1% "
        "false positives"
    )
    return table(("told by, and what", *figures), cells, caption=caption) if cells else None


def _retrieved(original: VerifiedModel, edited: VerifiedModel) -> Html | None:
    """Tell what its images and its name find, and whether an index still stands."""
    from slsgu_cli.verification.checks.retrieval import retrievals

    found = retrievals(original, edited)
    if found is None:
        return None
    queries: list[tuple[Child, ...]] = [
        (
            f"{now.query}, in {now.index} index",
            percent(was.precision),
            percent(now.precision),
            percent(was.recall1),
            percent(now.recall1),
            percent(now.recall10),
        )
        for was, now in zip(found[0].queries, found[1].queries, strict=True)
    ]
    moved: list[tuple[Child, ...]] = [
        (
            side.images,
            count(side.rows),
            percent(100 * side.identical / side.rows),
            percent(100 * side.far / side.rows),
            number(side.mean),
            number(side.largest),
        )
        for side in found[1].shifts
    ]
    figures = numeric(
        "mAP, original",
        "mAP, edited",
        "recall@1, original",
        "recall@1, edited",
        "recall@10, edited",
    )
    moves = numeric(
        "images", "same to the bit", "moved by more than 0.01", "mean move", "largest move"
    )
    caption = "Finding the concept's images among all others"
    by_query = table(("looked for by", *figures), queries, caption=caption)
    caption = "What became of an index; a move is 1 - cosine"
    return joined((by_query, table(("features of", *moves), moved, caption=caption)))


def _membership(original: VerifiedModel, edited: VerifiedModel) -> Html | None:
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
    heads = ("told by", *numeric("original", "edited"), "verdict")
    caption = "Membership inference: how often forget pairs are told from others; 50% is chance"
    return table(heads, cells, caption=caption)


def trajectories(records: SetRecords) -> Section:
    """Show accuracies over a fine grid of steps."""
    edit = records.edit.record
    return section("Trajectories", records.trajectory, lambda record: _trajectories(record, edit))


def _trajectories(record: Trials, edit: EditHeader | None) -> Html:
    trajectory = Trajectory(record, 0)
    figures = list(trajectory.figures())
    cells: list[tuple[Child, ...]] = []
    for line in trajectory.lines():
        rises = trajectory.rises(line)
        largest_rises = (
            f"+{rises[name].points:.2f}" if rises[name].points else "0" for name in figures
        )
        layer, damping = line
        steps = count(len(trajectory.of(line)))
        cells.append((code(known_as(layer)), _damping(damping), steps, *largest_rises))
    heads = ("layer", *numeric("damping", "steps", *(f"{name}, rise" for name in figures)))
    intro = paragraph(
        "Accuracies at many steps in a row. The table has the largest rise of each figure along "
        "the way, in points: 0 where it never rises."
    )
    largest = table(heads, cells, caption="Largest rises")
    return joined((intro, step_charts(record, edit), largest))


def _damping(damping: float | None) -> str | None:
    return None if damping is None else number(damping)


def joint_searches(records: SetRecords) -> list[Section]:
    """Show what became of the concepts that were forgotten with this one, search by search."""
    return [
        section(f"Forgotten together: {label}", evidence, _joint_search)
        for label, evidence in records.joint.items()
    ]


def _joint_search(record: JointSearch) -> Html:
    last = record.stages[-1]
    moves: list[tuple[Child, ...]] = [
        (
            concept,
            code(known_as(move.layer)),
            _damping(move.damping),
            number(move.step),
            share(move.share),
            *(
                percent(getattr(figures[move.name], attribute))
                for attribute in ("top1", "top5")
                for figures in (record.baseline_forget, last.forget)
            ),
        )
        for concept, move in zip(record.concepts, last.moves, strict=True)
    ]
    accuracies = ("FA@1, original", "FA@1, edited", "FA@5, original", "FA@5, edited")
    heads = ("concept", "layer", *numeric("damping", "step", "of its norm", *accuracies))
    sets = sorted(record.baseline_utility)
    original = ("0", "none", None, *(percent(record.baseline_utility[n].top1) for n in sets))
    stages: list[tuple[Child, ...]] = [original] + [
        (
            str(len(stage.moves)),
            record.concepts[len(stage.moves) - 1],
            percent(max(each.top1 for each in stage.forget.values())),
            *(percent(stage.utility[n].top1) if stage.utility else None for n in sets),
        )
        for stage in record.stages
    ]
    of_sets = [f"TA@1 {name}" for name in sets]
    columns = (*numeric("concepts"), "added", *numeric("FA@1, at most", *of_sets))
    forgotten = table(heads, moves, caption="All edits in place, each concept on its own images")
    kept = table(columns, stages, caption="What is kept, on images of none of the concepts")
    return joined((forgotten, kept))


def sweeps(records: SetRecords) -> list[Section]:
    """Show the concept beside the other classes of its sweeps, and their means."""
    return [
        section(f"Sweep: {label}", evidence, lambda record: _sweep(record, records.name))
        for label, evidence in records.sweeps.items()
    ]


def _sweep(record: Sweep, name: str) -> Html:
    sets = sorted(record.rows[0].baseline_utility)
    top1s = [_top1s(row, sets) for row in record.rows]
    means = [sum(column) / len(top1s) for column in zip(*top1s, strict=True)]
    rows: list[tuple[Child, ...]] = [
        (row.name, code(known_as(row.layer)), *map(percent, figures))
        for row, figures in zip(record.rows, top1s, strict=True)
    ]
    rows.append(("mean", None, *map(percent, means)))
    heads = ["class", "layer"]
    for figure in ("FA@1", *(f"TA@1 {name}" for name in sets)):
        heads += numeric(f"{figure}, original", f"{figure}, edited")
    marked = [index for index, row in enumerate(record.rows) if row.name == name]
    return table(
        heads,
        rows,
        caption=f"{count(len(record.rows))} classes, each forgotten alone",
        marked=marked,
    )


def _top1s(row: SweepRow, sets: list[str]) -> list[float]:
    pairs = [(row.baseline_forget, row.forget)]
    pairs += [(row.baseline_utility[name], row.utility[name]) for name in sets]
    return [figure.top1 for pair in pairs for figure in pair]


def comparison(records: SetRecords) -> Section:
    """Show each method's figures and what they cost."""
    return section("Other methods", records.comparison, _comparison)


def _comparison(record: ClipComparison) -> Html:
    rows = mean_rows({record.name: record.outcomes}, None)
    sets = sorted({name for row in rows for name in row.utility})
    cells: list[tuple[Child, ...]] = [
        (
            label_of(row.method),
            row.words,
            percent(row.forget.top1),
            percent(row.forget.top5),
            *(percent(row.utility[name].top1) for name in sets),
            f"{row.seconds:.0f}",
            f"{row.forget_passes:g}",
            f"{row.retain_passes:g}",
        )
        for row in rows
    ]
    of_sets = [f"TA@1 {name}" for name in sets]
    figures = numeric("FA@1", "FA@5", *of_sets, "seconds", "forget passes", "retain passes")
    ours = [index for index, row in enumerate(rows) if row.method is Method.OURS]
    caption = "Methods on the same model and rows"
    methods = table(("method", "setting", *figures), cells, caption=caption, marked=ours)
    return joined((_verdict(rows), methods))


def _verdict(rows: list[TableRow]) -> Html:
    beaten = ", ".join(f"{label_of(row.method)} ({row.words})" for row in better(rows))
    verdict = (
        f"No worse on FA@1 and on mean TA@1, and better on one of them: {beaten}. "
        if beaten
        else "No other method is at least as good on both FA@1 and mean TA@1. "
    )
    return paragraph(verdict, "Passes count gradient passes over the forget and the retain set.")
