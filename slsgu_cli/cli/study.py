"""The studies `compare`, `trajectory` and `sweep`, searches of several sets, and their tables."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli import tables
from slsgu_cli.cli.app import Name, Names, Session, command
from slsgu_cli.cli.usage import Asked
from slsgu_cli.errors import NotForgottenError
from slsgu_cli.figures.numbers import roughly
from slsgu_cli.records.comparison import CompareOptions, Method, PipelineCompareOptions
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.studies import SweepRequest, Trajectory, TrajectoryOptions
from slsgu_cli.records.words import ROWS, Option

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from slsgu_cli.cli.console import Console
    from slsgu_cli.compare.tables import TableRow
    from slsgu_cli.store.store import Store
    from slsgu_cli.study.joint import JointResult
    from slsgu_cli.study.series import SweepResult


def show_trajectory(
    console: "Console", store: "Store", trajectory: "Trajectory", plots: list[str]
) -> None:
    """Print how far each figure rises on each layer's way; every step too, but on a terminal."""
    from slsgu_cli.cli.console import Column
    from slsgu_cli.store.artifacts import Artifact

    trials = trajectory.trials
    if not console.brief:
        _steps(console, trajectory)
    columns = [
        Column("layer", shown=known_as),
        Column("direction"),
        Column("steps"),
        Column("% of norm", shown=roughly, label="move\nup to"),
    ]
    for figure in trajectory.figures():
        at = f"{figure} rise at % of norm"
        label = figure.replace("TA@1 ", "TA@1\n")
        columns += [
            Column(f"{figure} rise", shown=_rise, label=label, of=("figures", figure, "rise")),
            Column(at, on_terminal=False, of=("figures", figure, "rise at % of norm")),
        ]
    rows = []
    for move in trajectory.moves():
        steps, rises = trajectory.of(move), trajectory.rises(move).values()
        cells = [cell for rise in rises for cell in (rise.points, 100 * rise.share)]
        rows.append([move[0], str(move[1]), len(steps), 100 * steps[-1].share, *cells])
    title = f"trajectories of {trials.name}: does a figure fall at every step, or how far it rises"
    console.table("rises", columns, rows, title=title)
    console.paths("files", [store.where(Artifact.TRAJECTORY.path(trials.name)), *plots])
    again = len(trials.trials) - trajectory.measured
    if again:
        console.note(f"{again} recorded steps were used again")


def show_joint(console: "Console", store: "Store", result: "JointResult") -> None:
    """Print each concept's layer and step, and what is kept as concepts are added."""
    from slsgu_cli.cli.console import Column
    from slsgu_cli.store.artifacts import Artifact, joint_label

    record, chosen = result.record, result.chosen
    concepts = (
        Column("set"),
        Column("layer", shown=known_as),
        Column("direction", on_terminal=False),
        Column("step", shown=tables.step_size),
        Column("% of norm", shown=roughly, label="move"),
        *(
            Column(f"FA@{k} {when}", shown=roughly, label=f"FA@{k}\n{when}")
            for k in (1, 5)
            for when in ("before", "after")
        ),
    )
    rows = []
    for move in chosen.moves:
        before, after = record.baseline_forget[move.name], chosen.forget[move.name]
        fall = (before.top1, after.top1, before.top5, after.top5)
        rows.append(
            (move.name, move.layer, str(move.direction), move.step, 100 * move.share, *fall)
        )
    title = "all edits in place, each concept on its own images"
    console.table("edits", concepts, rows, title=title, data=record)
    sets = sorted(record.baseline_utility)
    hundredths = "{:.2f}".format
    columns = (
        Column("concepts"),
        Column("added"),
        Column("layer", shown=known_as),
        Column("FA@1 at most", shown=roughly, label="FA@1\nat most"),
        *(
            Column(
                f"{ta} {name}", shown=hundredths, label=f"{ta}\n{name}", of=("utility", name, ta)
            )
            for name in sets
            for ta in ("TA@1", "TA@5")
        ),
    )
    original = _figures(record.baseline_utility, sets)
    stages: list[tuple[object, ...]] = [(0, None, None, None, *original)]
    for stage in record.stages:
        added = stage.moves[-1]
        worst = max(each.top1 for each in stage.forget.values())
        figures = _figures(stage.utility or record.baseline_utility, sets)
        stages.append((len(stage.moves), added.name, added.layer, worst, *figures))
    title = "what is kept as concepts are added, on images of none of them"
    console.table("stages", columns, stages, title=title)
    files = [*map(Artifact.EDIT.path, record.names), Artifact.JOINT.path(joint_label(record.names))]
    console.paths("files", [*map(store.where, files), *result.plots])
    if result.reused:
        console.note(f"{result.reused} recorded joint trials were used again")


def show_sweep(console: "Console", store: "Store", result: "SweepResult") -> None:
    """Print each class's figures before and after, and their means (the paper's Table 2)."""
    from slsgu_cli.cli.console import Column
    from slsgu_cli.store.artifacts import Artifact

    record = result.sweep
    sets = sorted(record.rows[0].baseline_utility)
    figures = [f"FA@{k}" for k in (1, 5)] + [f"TA@{k} {name}" for name in sets for k in (1, 5)]
    before = [_figures(r.baseline_utility, sets, r.baseline_forget) for r in record.rows]
    after = [_figures(r.utility, sets, r.forget) for r in record.rows]
    rows: list[list[object]] = [
        [
            row.name,
            row.layer,
            str(row.direction),
            row.step,
            100 * row.share,
            *_paired(console, one, other),
        ]
        for row, one, other in zip(record.rows, before, after, strict=True)
    ]
    means = [
        [sum(column) / len(column) for column in zip(*part, strict=True)]
        for part in (before, after)
    ]
    rows.append(["mean", None, None, None, None, *_paired(console, *means)])
    columns = [
        Column("class"),
        Column("layer", shown=known_as),
        Column("direction", on_terminal=False),
        Column("step", shown=tables.step_size, on_terminal=False),
        Column("% of norm", shown=roughly, on_terminal=False),
    ]
    for figure in figures:
        if console.on_terminal:
            columns.append(Column(figure, label=figure.replace(" ", "\n")))
        else:
            columns += [Column(f"{figure} before"), Column(f"{figure} after")]
    title = f"sweep {record.name}: accuracies before and after each class is forgotten"
    console.table("sweep", columns, rows, title=title, data=record)
    console.paths("files", [store.where(Artifact.SWEEP.path(record.name))])
    if result.reused:
        console.note(f"{result.reused} classes were done before")


def _figures(utility: dict[str, Accuracy], sets: Sequence[str], *forget: Accuracy) -> list[float]:
    """Return top-1 and top-5 accuracy of the concept, where it is given, and of each set."""
    accuracies = [*forget, *(utility[name] for name in sets)]
    return [figure for accuracy in accuracies for figure in (accuracy.top1, accuracy.top5)]


def _paired(console: "Console", before: Sequence[float], after: Sequence[float]) -> list[object]:
    """Return figures before and after: in one cell for a person, in two for a program."""
    pairs = zip(before, after, strict=True)
    if console.on_terminal:
        return [f"{one:.1f} {other:.1f}" for one, other in pairs]
    return [figure for pair in pairs for figure in pair]


def _steps(console: "Console", trajectory: "Trajectory") -> None:
    from slsgu_cli.cli.console import Column

    columns = [
        Column("layer", shown=known_as),
        Column("direction"),
        Column("step", shown=tables.step_size),
        Column("% of norm", shown=roughly, label="move"),
        *(Column(figure, shown=roughly) for figure in trajectory.figures()),
    ]
    rows = [
        [
            trial.layer,
            str(trial.direction),
            trial.step,
            100 * trial.share,
            *trajectory.figures(trial).values(),
        ]
        for move in trajectory.moves()
        for trial in trajectory.of(move)
    ]
    title = f"accuracies of {trajectory.trials.name} by layer and step"
    console.table("trajectory", columns, rows, title=title, data=trajectory.trials)


def _rise(points: float) -> str:
    return f"+{points:.2f}" if points else "falls"


def search_sets(session: Session, names: Sequence[str], options: SearchOptions) -> None:
    """Search sets one after another. Raises NotForgottenError at the end if a concept is left."""
    from slsgu_cli.engine.plots import draw_steps, search_and_plot
    from slsgu_cli.engine.set_edits import require_forgotten

    store, console = session.store, session.console
    if len(names) == 1:
        result = search_and_plot(store, names[0], options=options)
        tables.search(console, store, result)
        require_forgotten(result)
        return
    from slsgu_cli.engine.search import search_each

    failed: list[NotForgottenError] = []
    for result in search_each(store, names, options=options):
        name = result.trials.name
        draw_steps(store, result)
        with console.part("sets"):
            console.value("set", f"set\t{name}", data=name, shown=f"\n{name}")
            tables.search(console, store, result)
        try:
            require_forgotten(result)
        except NotForgottenError as error:
            failed.append(error)
    if failed:
        message = "; ".join(error.message for error in failed)
        raise NotForgottenError(message, hint=failed[0].hint)


def search_jointly(session: Session, names: Sequence[str], options: SearchOptions) -> None:
    """Search for edits that forget the concepts of several sets together."""
    from slsgu_cli.processes import refuse_several
    from slsgu_cli.study.joint import joint_search, require_joint

    refuse_several("search --joint")
    result = joint_search(session.store, names, options=options)
    show_joint(session.console, session.store, result)
    require_joint(result)


@command("trajectory")
def trajectory(session: Session, name: Name, options: TrajectoryOptions) -> None:
    """Example: slsgu trajectory facebook --points 40"""
    from slsgu_cli.study.series import trajectory_and_plots

    steps, plots = trajectory_and_plots(session.store, name, options=options)
    show_trajectory(session.console, session.store, steps, plots)


@command("sweep")
def sweep(
    session: Session,
    request: SweepRequest,
    classes: Annotated[
        Path, Option(("--classes",), "File of classes to forget, one a line.", ROWS)
    ],
) -> None:
    """Runs build-sets, grad, rank and search for each class, under the class's name. All, or all
    of a fold (--folds), are kept out of the retain set and share its gradient. `{}` in a
    --source stands for the class.

    Example: slsgu sweep objects --classes seven.txt -m local-dir:clip -s icons.parquet --eval ...
    """
    from slsgu_cli.sets.prompt_files import read_classes
    from slsgu_cli.study.series import require_swept
    from slsgu_cli.study.series import sweep as run

    listed = read_classes(str(classes))
    result = run(session.store, replace(request, classes=listed.names if listed else ()))
    show_sweep(session.console, session.store, result)
    require_swept(result)


def show_comparison(
    console: "Console", rows: "Sequence[TableRow]", names: Sequence[str], plot: str
) -> None:
    """Print a row for each method and setting, and say which baselines beat ours."""
    from slsgu_cli.cli.console import Column
    from slsgu_cli.compare.registry import label_of
    from slsgu_cli.compare.tables import better, hyperparameter_of

    sets = sorted(rows[0].utility)
    tenths = "{:.1f}".format
    columns: list[str | Column] = [
        Column("method", shown=label_of),
        "setting",
        Column("lr", on_terminal=False),
        Column("value", on_terminal=False),
        Column("layer", on_terminal=False),
        Column("epoch", on_terminal=False),
        Column("FA@1", shown=tenths),
        Column("FA@5", shown=tenths),
        *(
            Column(f"TA@1 {n}", shown=tenths, label=f"TA@1\n{n}", of=("utility", n, "TA@1"))
            for n in sets
        ),
        *(Column(f"TA@5 {n}", on_terminal=False, of=("utility", n, "TA@5")) for n in sets),
        Column("seconds", shown=lambda value: f"{value:.0f}", label="s"),
        Column("forget passes", shown=tenths, label="passes\nforget"),
        Column("retain passes", shown=tenths, label="passes\nretain"),
        Column("chosen", on_terminal=False),
    ]
    table = [
        (
            row.method,
            row.words + "*" * (row.chosen and len(names) == 1),
            None if hyperparameter_of(row.method) else row.setting,
            row.setting if hyperparameter_of(row.method) else None,
            row.layer,
            row.epoch,
            row.forget.top1,
            row.forget.top5,
            *(row.utility[name].top1 for name in sets),
            *(row.utility[name].top5 for name in sets),
            row.seconds,
            row.forget_passes,
            row.retain_passes,
            row.chosen,
        )
        for row in rows
    ]
    several = f", mean of {len(names)} concepts" if len(names) > 1 else ""
    title = f"forgetting {', '.join(names)}{several}"
    console.table("comparison", columns, table, title=title)
    if any(row.chosen for row in rows) and len(names) == 1:
        console.note("* the setting of the best trade-off between 100 - FA@1 and mean TA@1")
    for row in better(rows):
        console.warn(
            f"{label_of(row.method)} ({row.words}) beats ours here: FA@1 {row.forget.top1:.2f} "
            f"and mean TA@1 {row.mean_utility:.2f}"
        )
    console.paths("plots", [plot])


def comparison_plot(rows: "Sequence[TableRow]", *, title: str) -> bytes:
    """Draw utility against forgetting, a mark for each method and setting.

    The best methods stand at the top right.
    """
    from slsgu_cli.figures.style import INK, MUTED, TITLE, blank, dress, plain, png

    figure = blank(8.0, 4.8, layout="constrained")
    axes = figure.add_subplot()
    dress(axes)
    for row in rows:
        _mark(axes, row)
        if row.method is Method.ORIGINAL:
            axes.axhline(row.mean_utility, color=MUTED, linewidth=0.9, linestyle=":")
    axes.set_xlim(-3, 103)
    axes.set_ylim(top=102)
    axes.set_xlabel("forgetting: 100 - FA@1 (more is better)", color=INK)
    axes.set_ylabel("utility: mean TA@1, % (more is better)", color=INK)
    axes.set_title(plain(title, 70), loc="left", **TITLE)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return png(figure)


def _mark(axes: "Axes", row: "TableRow") -> None:
    from slsgu_cli.compare.registry import label_of
    from slsgu_cli.figures.style import INK, MARKERS, SERIES

    index = list(Method).index(row.method)
    ours = row.method is Method.OURS
    axes.scatter(
        100 - row.forget.top1,
        row.mean_utility,
        marker="*" if ours else MARKERS[index % len(MARKERS)],
        s=220 if ours else 70,
        color=INK if row.method is Method.ORIGINAL else SERIES[index % len(SERIES)],
        edgecolor="black" if row.chosen else "white",
        linewidths=0.9,
        zorder=4 if ours else 3,
        clip_on=False,
        label=f"{label_of(row.method)} {row.words}".rstrip(),
    )


@command("compare")
def compare(
    session: Session,
    names: Names,
    options: Asked[CompareOptions],
    on_pipeline: Asked[PipelineCompareOptions],
) -> None:
    """With --target, ESD-x, SalUn and the edit that was steered on that pipeline are compared
    by the pictures it makes (its Figure 4).

    Example: slsgu compare facebook --lr auto --retain-rows 256
    """
    names = list(dict.fromkeys(names))
    if "target" in on_pipeline:
        options.refuse(
            "for comparing without --target", hint="--iterations N", beside=[on_pipeline]
        )
        from slsgu_cli.cli.downstream import compare_on_pipeline

        compare_on_pipeline(session, names, on_pipeline.record())
        return
    on_pipeline.refuse("for a diffusion pipeline", hint="--target FOLDER", beside=[options])
    from slsgu_cli.compare import comparison
    from slsgu_cli.compare.tables import mean_rows
    from slsgu_cli.store.artifacts import joint_label, plot_path

    compared = comparison.compare(session.store, names, options=options.record())
    rows = mean_rows(compared.concepts, compared.chosen)
    path = plot_path(joint_label(names), "comparison")
    title = f"forgetting {', '.join(names)}"
    session.store.write_bytes(path, comparison_plot(rows, title=title))
    show_comparison(session.console, rows, names, session.store.where(path))
