"""Sections on trajectories, joint searches, sweeps and comparisons."""

from markupsafe import Markup

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.compare.registry import label_of
from slsgu_cli.compare.tables import better, mean_rows
from slsgu_cli.figures.numbers import count, norm_percent, number, percent
from slsgu_cli.records.comparison import ClipComparison, Method
from slsgu_cli.records.method import EditHeader, Trials
from slsgu_cli.records.studies import JointSearch, Sweep, SweepRow, Trajectory
from slsgu_cli.report.edit_sections import step_charts
from slsgu_cli.report.sections import (
    Cell,
    Table,
    codes,
    figures,
    fill,
    tables,
    texts,
)


def trajectories(record: Trials, edit: EditHeader | None) -> Markup:
    """Show accuracies over a fine grid of steps."""
    trajectory = Trajectory(record, 0)
    accuracies = list(trajectory.figures())
    cells: list[tuple[Cell, ...]] = []
    for move in trajectory.moves():
        rises = trajectory.rises(move)
        largest_rises = (
            f"+{rises[name].points:.2f}" if rises[name].points else "0" for name in accuracies
        )
        layer, direction = move
        steps = count(len(trajectory.of(move)))
        cells.append((known_as(layer), str(direction), steps, *largest_rises))
    columns = [
        *codes("layer"),
        *texts("direction"),
        *figures("steps", *(f"{name}, rise" for name in accuracies)),
    ]
    return fill(
        "trajectories.html",
        charts=step_charts(record, edit),
        rises=Table("Largest rises", columns, cells),
    )


def joint_search(record: JointSearch) -> Markup:
    """Show the edits of a joint search, and accuracies by the number of concepts."""
    last = record.stages[-1]
    moves: list[tuple[Cell, ...]] = [
        (
            concept,
            known_as(move.layer),
            str(move.direction),
            number(move.step),
            norm_percent(move.share),
            *(
                percent(getattr(accuracies[move.name], attribute))
                for attribute in ("top1", "top5")
                for accuracies in (record.baseline_forget, last.forget)
            ),
        )
        for concept, move in zip(record.concepts, last.moves, strict=True)
    ]
    accuracies = ("FA@1, original", "FA@1, edited", "FA@5, original", "FA@5, edited")
    sets = sorted(record.baseline_utility)
    original: tuple[Cell, ...] = (
        "0",
        "none",
        None,
        *(percent(record.baseline_utility[n].top1) for n in sets),
    )
    stages: list[tuple[Cell, ...]] = [original] + [
        (
            str(len(stage.moves)),
            record.concepts[len(stage.moves) - 1],
            percent(max(each.top1 for each in stage.forget.values())),
            *(percent(stage.utility[n].top1) if stage.utility else None for n in sets),
        )
        for stage in record.stages
    ]
    return tables(
        Table(
            "All edits in place, each concept on its own images",
            [
                *texts("concept"),
                *codes("layer"),
                *texts("direction"),
                *figures("step", "of its norm", *accuracies),
            ],
            moves,
        ),
        Table(
            "Retained accuracy, on images of none of the concepts",
            [
                *figures("concepts"),
                *texts("added"),
                *figures("FA@1, at most", *(f"TA@1 {name}" for name in sets)),
            ],
            stages,
        ),
    )


def sweep(record: Sweep, name: str) -> Markup:
    """Show the classes of a sweep, one of them marked, and the means over all."""
    sets = sorted(record.rows[0].baseline_utility)
    top1s = [_top1s(row, sets) for row in record.rows]
    means = [sum(column) / len(top1s) for column in zip(*top1s, strict=True)]
    rows: list[tuple[Cell, ...]] = [
        (row.name, known_as(row.layer), *map(percent, values))
        for row, values in zip(record.rows, top1s, strict=True)
    ]
    rows.append(("mean", None, *map(percent, means)))
    columns = [*texts("class"), *codes("layer")]
    for accuracy in ("FA@1", *(f"TA@1 {name}" for name in sets)):
        columns += figures(f"{accuracy}, original", f"{accuracy}, edited")
    marked = [index for index, row in enumerate(record.rows) if row.name == name]
    caption = f"{count(len(record.rows))} classes, each forgotten alone"
    return tables(Table(caption, columns, rows, marked))


def _top1s(row: SweepRow, sets: list[str]) -> list[float]:
    pairs = [(row.baseline_forget, row.forget)]
    pairs += [(row.baseline_utility[name], row.utility[name]) for name in sets]
    return [accuracy.top1 for pair in pairs for accuracy in pair]


def comparison(record: ClipComparison) -> Markup:
    """Show the accuracies and the cost of each method."""
    rows = mean_rows({record.name: record.outcomes}, None)
    sets = sorted({name for row in rows for name in row.utility})
    cells: list[tuple[Cell, ...]] = [
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
    columns = [
        *texts("method", "setting"),
        *figures("FA@1", "FA@5", *(f"TA@1 {name}" for name in sets)),
        *figures("seconds", "forget passes", "retain passes"),
    ]
    ours = [index for index, row in enumerate(rows) if row.method is Method.OURS]
    return fill(
        "comparison.html",
        better=", ".join(f"{label_of(row.method)} ({row.words})" for row in better(rows)),
        table=Table("Methods on the same model and rows", columns, cells, ours),
    )
