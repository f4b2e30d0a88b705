"""What `slsgu trajectory` does: accuracies over a fine grid of steps, layer by layer.

The steps of a layer share what the base pass kept. A trajectory is recorded as trials, so
that steps which were measured before are not measured again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slsgu_cli import progress
from slsgu_cli.method.search import Line, SetSearch, bisection
from slsgu_cli.method.search_plan import read_plan, share_evaluation
from slsgu_cli.records.method import Trial, Trials
from slsgu_cli.records.sets import Purpose
from slsgu_cli.records.studies import TrajectoryOptions
from slsgu_cli.store.artifacts import Artifact, plot_path
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from slsgu_cli.method.trial import Probe


# A layer is followed up to this share of its norm where no step on the way forgets.
FARTHEST = 6.4


@dataclass(frozen=True, slots=True)
class Rise:
    """The largest rise of a figure along the steps, in points: 0 where it never rises.

    `share` is the step it rises up to, as a share of the layer's norm.
    """

    points: float
    share: float


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The steps of each line in order, and how many of them were measured now."""

    trials: Trials
    measured: int

    def lines(self) -> list[Line]:
        """Return the layers and ridges in the order they were followed in."""
        return list(dict.fromkeys((trial.layer, trial.ridge) for trial in self.trials.trials))

    def of(self, line: Line) -> list[Trial]:
        """Return the steps along one line, the shortest first."""
        return [trial for trial in self.trials.trials if (trial.layer, trial.ridge) == line]

    def figures(self, trial: Trial | None = None) -> dict[str, float]:
        """Return the accuracies at a step by their names in tables; of the original for none."""
        trials = self.trials
        forget = trial.forget if trial else trials.baseline_forget
        utility = (trial.utility or {}) if trial else trials.baseline_utility
        forgotten = {"FA@1": forget.top1, "FA@5": forget.top5}
        return forgotten | {f"TA@1 {name}": kept.top1 for name, kept in sorted(utility.items())}

    def rises(self, line: Line) -> dict[str, Rise]:
        """Return the largest rise of each figure, from the original model on."""
        steps = self.of(line)
        path = [self.figures(), *map(self.figures, steps)]
        shares = [0.0, *(trial.share for trial in steps)]
        return {name: largest_rise([each[name] for each in path], shares) for name in path[0]}


def largest_rise(values: Sequence[float], shares: Sequence[float]) -> Rise:
    """Return by how much a later value lies above the least one before it, at most."""
    least, rise = values[0], Rise(0.0, 0.0)
    for value, share in zip(values, shares, strict=True):
        least = min(least, value)
        if value - least > rise.points:
            rise = Rise(value - least, share)
    return rise


def trajectory(store: Store, name: str, *, options: TrajectoryOptions) -> Trajectory:
    """Follow the front layers of set `name` along their steps and record the trials.

    Raises MissingError, StaleError, InputError and UsageError.
    """
    import torch

    from slsgu_cli.method.gradient_pass import arithmetic

    plan = read_plan(store, name, options=options.search)
    followed = []
    with torch.no_grad(), arithmetic(plan.options.precision):
        shared = share_evaluation(store, [plan], Purpose.REPORT)
        evaluation = plan.measured(shared, resumed=True)
        run = SetSearch(store, Artifact.TRAJECTORY, plan, evaluation)
        for probe in plan.probes(store, evaluation):
            with progress.bar(probe.score.layer, options.points) as ticker:
                for step in _grid(probe, run, options):
                    followed.append(run.with_utility(probe, run.trial(probe, step)))
                    ticker.advance()
            run.write()
    trials = replace(run.record, trials=tuple(followed))
    return Trajectory(trials, len(run.trials) - run.reused)


def trajectory_and_plots(
    store: Store, name: str, *, options: TrajectoryOptions
) -> tuple[Trajectory, list[str]]:
    """Follow a set's layers and draw each, and all of them side by side."""
    from slsgu_cli.figures.curves import step_plot, trajectories_plot

    result = trajectory(store, name, options=options)
    drawn = {"trajectories": trajectories_plot(result.trials, result.lines())}
    for layer, ridge in result.lines():
        kind = f"trajectory-{layer}" + ("" if ridge is None else f"-{ridge:g}")
        drawn[kind] = step_plot(result.trials, layer=layer, ridge=ridge)
    for kind, picture in drawn.items():
        store.write_bytes(plot_path(name, kind), picture)
    return result, [store.where(plot_path(name, kind)) for kind in drawn]


def _grid(probe: "Probe", run: SetSearch, options: TrajectoryOptions) -> list[float]:
    """Return evenly spaced steps, the last one at the end of the trajectory."""
    until = options.until
    end = _forgetting(probe, run) if until is None else until / 0.1 * probe.first
    return [end * (index + 1) / options.points for index in range(options.points)]


def _forgetting(probe: "Probe", run: SetSearch) -> float:
    """Return the first step that forgets when doubling steps, or where to give up."""
    trials = bisection(probe.measure, run.left, probe.first)
    enough = (t.step for t in trials if run.left(t) == 0 or 2 * t.share > FARTHEST * 1.001)
    return next(enough)
