"""Where a concept was followed over fine steps, forgotten with others, or swept with a list."""

from slsgu_cli.naming import known_as
from slsgu_cli.records import Accuracy, EditHeader, Trials
from slsgu_cli.report.figures import count, number, percent, share
from slsgu_cli.report.gather import Dossier
from slsgu_cli.report.grids import Head, code, paragraph, table
from slsgu_cli.report.layers import step_charts
from slsgu_cli.report.markup import Child, Html, joined
from slsgu_cli.report.sections import Section, section
from slsgu_cli.several.records import JointSearch, Sweep, SweepRow
from slsgu_cli.several.trajectory import Trajectory


def trajectories(dossier: Dossier) -> Section:
    """Show accuracies over a fine grid of steps."""
    return section(
        "Trajectories",
        dossier.trajectory,
        lambda record: _trajectories(record, dossier.edit.record),
    )


def _trajectories(record: Trials, edit: EditHeader | None) -> Html:
    found = Trajectory(record, 0)
    figures = list(found.figures())
    cells: list[tuple[Child, ...]] = []
    for line in found.lines():
        rises = found.rises(line)
        told = (f"+{rises[name].points:.2f}" if rises[name].points else "0" for name in figures)
        layer, ridge = line
        cells.append((code(known_as(layer)), _ridge(ridge), count(len(found.of(line))), *told))
    heads = (Head("layer", False), Head("ridge"), Head("steps"),
             *(Head(f"{name}, rise") for name in figures))  # fmt: skip
    intro = paragraph(
        "Accuracies at many steps in a row. The table has the largest rise of each figure along "
        "the way, in points: 0 where it never rises."
    )
    largest = table(heads, cells, caption="Largest rises")
    return joined((intro, step_charts(record, edit), largest))


def _ridge(ridge: float | None) -> str | None:
    return None if ridge is None else number(ridge)


def together(dossier: Dossier) -> list[Section]:
    """Show what became of the concepts that were forgotten with this one, search by search."""
    return [
        section(f"Forgotten together: {label}", found, _together)
        for label, found in dossier.joint.items()
    ]


def _together(record: JointSearch) -> Html:
    last = record.stages[-1]
    moves: list[tuple[Child, ...]] = [
        (
            concept,
            code(known_as(move.layer)),
            _ridge(move.ridge),
            number(move.step),
            share(move.share),
            *_pair(record.baseline_forget[move.name], last.forget[move.name], "top1"),
            *_pair(record.baseline_forget[move.name], last.forget[move.name], "top5"),
        )
        for concept, move in zip(record.concepts, last.moves, strict=True)
    ]
    heads = (Head("concept", False), Head("layer", False), Head("ridge"), Head("step"),
             Head("of its norm"), Head("FA@1, original"), Head("FA@1, edited"),
             Head("FA@5, original"), Head("FA@5, edited"))  # fmt: skip
    sets = sorted(record.baseline_utility)
    kept = [("none", None, record.baseline_utility)] + [
        (concept, stage, stage.utility or {})
        for concept, stage in zip(record.concepts, record.stages, strict=True)
    ]
    stages: list[tuple[Child, ...]] = [
        (
            str(place),
            added,
            percent(max(each.top1 for each in stage.forget.values())) if stage else None,
            *(percent(utility[name].top1) if name in utility else None for name in sets),
        )
        for place, (added, stage, utility) in enumerate(kept)
    ]
    columns = (Head("concepts"), Head("added", False), Head("FA@1, at most"),
               *(Head(f"TA@1 {name}") for name in sets))  # fmt: skip
    return joined(
        (
            table(heads, moves, caption="All edits in place, each concept on its own images"),
            table(columns, stages, caption="What is kept, on images of none of the concepts"),
        )
    )


def swept(dossier: Dossier) -> list[Section]:
    """Show the concept beside the other classes of its sweeps, and their means."""
    return [
        section(f"Sweep: {label}", found, lambda record: _swept(record, dossier.name))
        for label, found in dossier.sweeps.items()
    ]


def _swept(record: Sweep, name: str) -> Html:
    sets = sorted(record.rows[0].baseline_utility)
    rows = [_sweep_row(row, sets) for row in record.rows]
    columns = zip(*(_top1s(row, sets) for row in record.rows), strict=True)
    means = [sum(column) / len(record.rows) for column in columns]
    rows.append(("mean", None, *map(percent, means)))
    heads = [Head("class", False), Head("layer", False)]
    for figure in ("FA@1", *(f"TA@1 {name}" for name in sets)):
        heads += [Head(f"{figure}, original"), Head(f"{figure}, edited")]
    own = [index for index, row in enumerate(record.rows) if row.name == name]
    return table(heads, rows, caption=f"{count(len(record.rows))} classes, each forgotten alone",
                 marked=own)  # fmt: skip


def _sweep_row(row: SweepRow, sets: list[str]) -> tuple[Child, ...]:
    return (row.name, code(known_as(row.layer)), *map(percent, _top1s(row, sets)))


def _top1s(row: SweepRow, sets: list[str]) -> list[float]:
    pairs = [(row.baseline_forget, row.forget)]
    pairs += [(row.baseline_utility[name], row.utility[name]) for name in sets]
    return [figure.top1 for pair in pairs for figure in pair]


def _pair(before: Accuracy, after: Accuracy, attribute: str) -> tuple[str, str]:
    return percent(getattr(before, attribute)), percent(getattr(after, attribute))
