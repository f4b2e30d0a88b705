"""The command `trajectory`."""

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import Name, Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.formats import STEP
from slsgu_cli.figures.numbers import roughly
from slsgu_cli.records.studies import Trajectory, TrajectoryOptions


@command("trajectory")
def trajectory(session: Session, name: Name, options: TrajectoryOptions) -> None:
    """Example: slsgu trajectory facebook --points 40"""
    from slsgu_cli.store.artifacts import Artifact
    from slsgu_cli.study.series import trajectory_and_plots

    console = session.console
    result, plots = trajectory_and_plots(session.store, name, options=options)
    if not console.brief:
        _show_steps(console, result)
    columns = [
        Column("layer", shown=known_as),
        Column("direction"),
        Column("steps"),
        Column("% of norm", shown=roughly, label="move\nup to"),
    ]
    for figure in result.figures():
        at = f"{figure} rise at % of norm"
        label = figure.replace("TA@1 ", "TA@1\n")
        columns += [
            Column(f"{figure} rise", shown=_rise, label=label, of=("figures", figure, "rise")),
            Column(at, on_terminal=False, of=("figures", figure, "rise at % of norm")),
        ]
    rows = []
    for move in result.moves():
        steps, rises = result.of(move), result.rises(move).values()
        cells = [cell for rise in rises for cell in (rise.points, 100 * rise.share)]
        rows.append([move[0], str(move[1]), len(steps), 100 * steps[-1].share, *cells])
    title = f"trajectories of {name}: largest rise of each figure between steps"
    console.table("rises", columns, rows, title=title)
    console.paths("files", [session.store.where(Artifact.TRAJECTORY.path(name)), *plots])
    if reused := len(result.trials.trials) - result.measured:
        console.note(f"{reused} recorded steps were reused")


def _show_steps(console: Console, trajectory: Trajectory) -> None:
    columns = [
        Column("layer", shown=known_as),
        Column("direction"),
        Column("step", shown=STEP),
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
