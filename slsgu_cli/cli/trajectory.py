"""The command `trajectory`."""

from typing import TYPE_CHECKING

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import Name, Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.formats import step_size
from slsgu_cli.figures.numbers import roughly
from slsgu_cli.records.studies import Trajectory, TrajectoryOptions

if TYPE_CHECKING:
    from slsgu_cli.store.store import Store


@command("trajectory")
def trajectory(session: Session, name: Name, options: TrajectoryOptions) -> None:
    """Example: slsgu trajectory facebook --points 40"""
    from slsgu_cli.study.series import trajectory_and_plots

    steps, plots = trajectory_and_plots(session.store, name, options=options)
    show_trajectory(session.console, session.store, steps, plots)


def show_trajectory(
    console: Console, store: "Store", trajectory: "Trajectory", plots: list[str]
) -> None:
    """Print the largest rise of each figure along each layer, and off a terminal every step."""
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
    title = f"trajectories of {trials.name}: largest rise of each figure between steps"
    console.table("rises", columns, rows, title=title)
    console.paths("files", [store.where(Artifact.TRAJECTORY.path(trials.name)), *plots])
    again = len(trials.trials) - trajectory.measured
    if again:
        console.note(f"{again} recorded steps were reused")


def _steps(console: Console, trajectory: "Trajectory") -> None:

    columns = [
        Column("layer", shown=known_as),
        Column("direction"),
        Column("step", shown=step_size),
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
