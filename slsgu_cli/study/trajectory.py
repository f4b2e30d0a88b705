"""What `slsgu trajectory` does: accuracies over a fine grid of steps, layer by layer.

The steps of a layer share what the base pass kept. A trajectory is recorded as trials, so
that steps which were measured before are not measured again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slsgu_cli import progress
from slsgu_cli.method.scoring import first_step, left_to_forget
from slsgu_cli.method.search import load_evaluation
from slsgu_cli.method.search_plan import SearchOptions, fresh_trials, read_plan, recorded_trials
from slsgu_cli.records.method import Trial, Trials
from slsgu_cli.store.artifacts import plot_path, trajectory_path
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from slsgu_cli.method.trial import Probe


# A layer is followed up to this share of its norm where no step on the way forgets.
FARTHEST = 6.4

# A layer, and the ridge that whitened its direction; None for the gradient.
Line = tuple[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryOptions:
    """How fine and how far. `until` is a share of the layer's norm, None for where it forgets."""

    search: SearchOptions
    points: int = 20
    until: float | None = None


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
        found = {"FA@1": forget.top1, "FA@5": forget.top5}
        return found | {f"TA@1 {name}": kept.top1 for name, kept in sorted(utility.items())}

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
    """Follow the front layers of set `name` along their steps and record what is met.

    Raises MissingError, StaleError, InputError and UsageError.
    """
    import torch

    from slsgu_cli.method.gradient_pass import arithmetic
    from slsgu_cli.method.trial import UtilityMeter

    case = read_plan(store, name, options=options.search)
    path, followed, measured = trajectory_path(name), [], 0
    with torch.no_grad(), arithmetic(case.options.precision):
        evaluation = load_evaluation(store, case)
        fresh = fresh_trials(case, evaluation)
        recorded = recorded_trials(store, path, fresh).trials
        known = {(trial.layer, trial.ridge, trial.step): trial for trial in recorded}
        meter = UtilityMeter(evaluation)
        for probe in case.probes(store, evaluation):
            line = probe.score.layer, probe.ridge
            with progress.bar(probe.score.layer, options.points) as ticker:
                for step in _grid(probe, options):
                    trial = known.get((*line, step))
                    if trial is None:
                        trial = probe.trial(step)
                        kept = meter.measure(probe, step, beat=float("-inf"))
                        trial = known[*line, step] = replace(trial, utility=kept)
                        measured += 1
                    followed.append(trial)
                    ticker.advance()
            store.write_record(path, replace(fresh, trials=tuple(known.values())))
    return Trajectory(replace(fresh, trials=tuple(followed)), measured)


def trajectory_and_plots(
    store: Store, name: str, *, options: TrajectoryOptions
) -> tuple[Trajectory, list[str]]:
    """Follow a set's layers and draw each, and all of them side by side."""
    from slsgu_cli.figures.curves import step_plot, trajectories_plot

    found = trajectory(store, name, options=options)
    drawn = {"trajectories": trajectories_plot(found.trials, found.lines())}
    for layer, ridge in found.lines():
        kind = f"trajectory-{layer}" + ("" if ridge is None else f"-{ridge:g}")
        drawn[kind] = step_plot(found.trials, layer=layer, ridge=ridge)
    for kind, picture in drawn.items():
        store.write_bytes(plot_path(name, kind), picture)
    return found, [store.where(plot_path(name, kind)) for kind in drawn]


def _grid(probe: "Probe", options: TrajectoryOptions) -> list[float]:
    """Return evenly spaced steps, the last one at the end of the trajectory."""
    first = first_step(probe.score.weight_norm, probe.norm)
    if options.until is None:
        end = _forgetting(probe, first, options.search)
    else:
        end = options.until / 0.1 * first
    return [end * (index + 1) / options.points for index in range(options.points)]


def _forgetting(probe: "Probe", first: float, search: SearchOptions) -> float:
    """Return the first step that forgets when doubling from `first`, or where to give up."""
    step = first
    while True:
        trial = probe.trial(step)
        left = left_to_forget(trial, search.steer, search.margin)
        if left == 0 or 2 * trial.share > FARTHEST * 1.001:
            return step
        step *= 2
