"""How trajectories, sweeps and joint searches are printed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slsgu_cli.console import Console
from slsgu_cli.layout import edit_path, joint_path, sweep_path, trajectory_path
from slsgu_cli.naming import known_as
from slsgu_cli.records import Accuracy
from slsgu_cli.show import before_after
from slsgu_cli.store import Store
from slsgu_cli.tables import Column

if TYPE_CHECKING:
    from slsgu_cli.several.joint import JointResult
    from slsgu_cli.several.measure import SeveralMeasured
    from slsgu_cli.several.sweep import SweepResult
    from slsgu_cli.several.trajectory import Trajectory


def trajectory(console: Console, store: Store, found: "Trajectory", plots: list[str]) -> None:
    """Print how far each figure rises on each layer's way; every step too, but on a terminal."""
    trials = found.trials
    if not console.brief:
        _steps(console, found)
    columns = [
        Column("layer", shown=known_as),
        Column("ridge"),
        Column("steps"),
        Column("% of norm", shown=_percent, label="move\nup to"),
    ]
    for figure in found.figures():
        columns += [
            Column(f"{figure} rise", shown=_rise, label=figure.replace("TA@1 ", "TA@1\n")),
            Column(f"{figure} rise at % of norm", on_terminal=False),
        ]
    rows = []
    for line in found.lines():
        steps, rises = found.of(line), found.rises(line).values()
        cells = [cell for rise in rises for cell in (rise.points, 100 * rise.share)]
        rows.append([*line, len(steps), 100 * steps[-1].share, *cells])
    title = f"trajectories of {trials.name}: does a figure fall at every step, or how far it rises"
    console.table("rises", columns, rows, title=title)
    console.paths("files", [store.where(trajectory_path(trials.name)), *plots])
    again = len(trials.trials) - found.measured
    if again:
        console.note(f"{again} recorded steps were used again")


def joint(console: Console, store: Store, result: "JointResult") -> None:
    """Print each concept's layer and step, and what is kept as concepts are added."""
    found, chosen = result.found, result.chosen
    concepts = (
        Column("set"),
        Column("layer", shown=known_as),
        Column("ridge", on_terminal=False),
        Column("step", shown=_step),
        Column("% of norm", shown=_percent, label="move"),
        *(
            Column(f"FA@{k} {when}", shown=_percent, label=f"FA@{k}\n{when}")
            for k in (1, 5)
            for when in ("before", "after")
        ),
    )
    rows = []
    for move in chosen.moves:
        before, after = found.baseline_forget[move.name], chosen.forget[move.name]
        fall = (before.top1, after.top1, before.top5, after.top5)
        rows.append((move.name, move.layer, move.ridge, move.step, 100 * move.share, *fall))
    title = "all edits in place, each concept on its own images"
    console.table("edits", concepts, rows, title=title, data=found)
    sets = sorted(found.baseline_utility)
    columns = (
        Column("concepts"),
        Column("added"),
        Column("layer", shown=known_as),
        Column("FA@1 at most", shown=_percent, label="FA@1\nat most"),
        *(
            Column(f"TA@{k} {name}", shown=_figure, label=f"TA@{k}\n{name}")
            for name in sets
            for k in (1, 5)
        ),
    )
    kept = [found.baseline_utility, *(stage.utility or {} for stage in found.stages)]
    stages: list[tuple[object, ...]] = []
    for count, utility in enumerate(kept):
        figures = [figure for name in sets for figure in (utility[name].top1, utility[name].top5)]
        stage = found.stages[count - 1] if count else None
        added = stage.moves[-1] if stage else None
        worst = max(each.top1 for each in stage.forget.values()) if stage else None
        stages.append((count, added and added.name, added and added.layer, worst, *figures))
    title = "what is kept as concepts are added, on images of none of them"
    console.table("stages", columns, stages, title=title)
    files = [*(edit_path(name) for name in found.names), joint_path(found.names)]
    console.paths("files", [*map(store.where, files), *result.plots])
    if result.reused:
        console.note(f"{result.reused} recorded joint trials were used again")


def sweep(console: Console, store: Store, result: "SweepResult") -> None:
    """Print each class's figures before and after, and their means (the paper's Table 2)."""
    found = result.sweep
    sets = sorted(found.rows[0].baseline_utility)
    figures = [f"FA@{k}" for k in (1, 5)] + [f"TA@{k} {name}" for name in sets for k in (1, 5)]
    before = [_sweep_figures(r.baseline_forget, r.baseline_utility, sets) for r in found.rows]
    after = [_sweep_figures(r.forget, r.utility, sets) for r in found.rows]
    rows: list[list[object]] = [
        [row.name, row.layer, row.ridge, row.step, 100 * row.share, *_paired(console, one, other)]
        for row, one, other in zip(found.rows, before, after, strict=True)
    ]
    means = [
        [sum(column) / len(column) for column in zip(*part, strict=True)]
        for part in (before, after)
    ]
    rows.append(["mean", None, None, None, None, *_paired(console, *means)])
    columns = [
        Column("class"),
        Column("layer", shown=known_as),
        Column("ridge", on_terminal=False),
        Column("step", shown=_step, on_terminal=False),
        Column("% of norm", shown=_percent, on_terminal=False),
    ]
    for figure in figures:
        if console.on_terminal:
            columns.append(Column(figure, label=figure.replace(" ", "\n")))
        else:
            columns += [Column(f"{figure} before"), Column(f"{figure} after")]
    title = f"sweep {found.name}: accuracies before and after each class is forgotten"
    console.table("sweep", columns, rows, title=title, data=found)
    console.paths("files", [store.where(sweep_path(found.name))])
    if result.reused:
        console.note(f"{result.reused} classes were done before")


def _sweep_figures(
    forget: Accuracy, utility: dict[str, Accuracy], sets: Sequence[str]
) -> list[float]:
    accuracies = [forget, *(utility[name] for name in sets)]
    return [figure for found in accuracies for figure in (found.top1, found.top5)]


def _paired(console: Console, before: Sequence[float], after: Sequence[float]) -> list[object]:
    """Return figures before and after: in one cell for a person, in two for a program."""
    pairs = zip(before, after, strict=True)
    if console.on_terminal:
        return [f"{one:.1f} {other:.1f}" for one, other in pairs]
    return [figure for pair in pairs for figure in pair]


def measured(console: Console, found: "SeveralMeasured") -> None:
    """Print forget accuracy of each concept and utility, before and after."""
    before_after(console, {model.label: (model.forget, model.utility) for model in found.models})
    console.paths("plots", [found.plot])


def _steps(console: Console, found: "Trajectory") -> None:
    columns = [
        Column("layer", shown=known_as),
        Column("ridge"),
        Column("step", shown=_step),
        Column("% of norm", shown=_percent, label="move"),
        *(Column(figure, shown=_percent) for figure in found.figures()),
    ]
    rows = [
        [trial.layer, trial.ridge, trial.step, 100 * trial.share, *found.figures(trial).values()]
        for line in found.lines()
        for trial in found.of(line)
    ]
    title = f"accuracies of {found.trials.name} by layer and step"
    console.table("trajectory", columns, rows, title=title, data=found.trials)


def _percent(value: float) -> str:
    return f"{value:.1f}%"


def _rise(points: float) -> str:
    return f"+{points:.2f}" if points else "falls"


def _figure(value: float) -> str:
    return f"{value:.2f}"


def _step(value: float) -> str:
    return f"{value:.4g}"
