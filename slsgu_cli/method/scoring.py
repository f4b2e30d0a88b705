"""The method's arithmetic on figures: importance, alignment, front, the next step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp

import numpy as np
import numpy.typing as npt

from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import Alignment, Keep, Steer, Trial, Trials

Vector = npt.NDArray[np.floating]


def norm(values: Vector) -> float:
    """Return the L2 norm of an array of any shape, summed in fp64."""
    flat = values.reshape(-1)
    return float(np.sqrt(_dot(flat, flat)))


def importance(forget_norm: float, weight_norm: float) -> float:
    """Return ||grad L_forget|| / ||W|| (Eq. 7); 0 for a layer of zeros."""
    return forget_norm / weight_norm if weight_norm else 0.0


def alignment(forget: Vector, retain: Vector, kind: Alignment) -> float:
    """Return the cosine of the two gradients (Eq. 8), its magnitude for `Alignment.ABS`.

    A gradient of zeros is orthogonal to everything.
    """
    a, b = forget.reshape(-1), retain.reshape(-1)
    length = float(np.sqrt(_dot(a, a)) * np.sqrt(_dot(b, b)))
    cosine = _dot(a, b) / length if length else 0.0
    return abs(cosine) if kind is Alignment.ABS else cosine


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which (importance, alignment) points no other point dominates.

    A point is dominated by one of strictly larger importance and strictly smaller
    alignment. O(n log n): by falling importance, a point is dominated exactly if a point
    of larger importance has a smaller alignment.
    """
    order = sorted(range(len(points)), key=lambda index: -points[index][0])
    front = [False] * len(points)
    least_above = float("inf")
    start = 0
    while start < len(order):
        level = points[order[start]][0]
        stop = start
        while stop < len(order) and points[order[stop]][0] == level:
            index = order[stop]
            front[index] = points[index][1] <= least_above
            stop += 1
        least_above = min(least_above, *(points[index][1] for index in order[start:stop]))
        start = stop
    return front


def _dot(a: Vector, b: Vector) -> float:
    """Return the inner product in fp64 without an fp64 copy of the whole layer."""
    chunk = 1 << 22
    return sum(
        float(np.dot(a[i : i + chunk].astype(np.float64), b[i : i + chunk].astype(np.float64)))
        for i in range(0, a.size, chunk)
    )


def first_step(weight_norm: float, direction_norm: float) -> float:
    """Return the step that moves the layer by 10% of its norm.

    The paper's text has Importance / 10, its inverse up to the factor, which moves a layer
    the less the more it has to move; the released code has this one.
    """
    return 0.1 * weight_norm / direction_norm


def next_step(tried: Sequence[tuple[float, float]], first: float) -> float:
    """Return the step to try after `tried`, a list of (step, what is left to forget) in order.

    Doubles until nothing is left, then bisects between the largest step known to be too
    small and the smallest known to be enough.
    """
    low, high, step = 0.0, None, first
    for tried_step, left in tried:
        if left == 0:
            high = tried_step
        else:
            low = tried_step
        step = 2 * tried_step if high is None else (low + high) / 2
    return step


def left_to_forget(trial: Trial, steer: Steer, margin: float | None) -> float:
    """Return what the search drives to zero: a forget accuracy, or what the margin lacks."""
    return left_of(trial.forget, trial.gap, steer, margin)


def left_of(forget: Accuracy, gap: float, steer: Steer, margin: float | None) -> float:
    """Return what a forget accuracy, and the gap that comes with it, leave to forget."""
    if steer is Steer.MARGIN:
        return max(0.0, (margin or 0.0) - gap)
    return forget.top1 if steer is Steer.FA1 else forget.top5


def mean_top1(utility: Mapping[str, Accuracy]) -> float:
    """Return the mean TA@1 over the evaluation sets, in percent."""
    return sum(figure.top1 for figure in utility.values()) / len(utility)


def kept(trial: Trial, by: Keep) -> float:
    """Return what a measured trial keeps, in percent: the figure steps are compared by."""
    if by is Keep.EXPECTED and trial.expected is not None:
        return trial.expected
    return mean_top1(trial.utility or {})


def best(candidates: Sequence[tuple[float, float]]) -> int:
    """Return the index of what leaves least to forget, ties by the highest utility.

    Candidates are (what is left to forget, utility); of equals the first is kept.
    """
    return min(range(len(candidates)), key=lambda i: (candidates[i][0], -candidates[i][1], i))


def best_of_each(trials: Trials, chosen: Trial | None) -> list[Trial]:
    """Return each layer's trial that forgets most, then keeps most, then moves least.

    Of the layer of `chosen`, that is the one.
    """
    layers: dict[str, list[Trial]] = {}
    for trial in trials.trials:
        layers.setdefault(trial.layer, []).append(trial)

    def order(trial: Trial) -> tuple[bool, float, float, float]:
        forget = left_to_forget(trial, trials.steer, trials.margin)
        kept = [figure.top1 for figure in (trial.utility or {}).values()]
        return trial != chosen, forget, -sum(kept) / len(kept) if kept else 1.0, trial.step

    return [min(trials_of_layer, key=order) for trials_of_layer in layers.values()]


# What a concept's step grows by while the concept is still recognised beside the others.
RAISE = 1.25

# By how much steps are changed in one round, in nepers: at first, and at least and at most.
PACE, SLOWEST, FASTEST = 0.1, 0.005, 0.5


# By how much a step must be longer than one that was too short, as a share of it.
CLOSE = 0.02


@dataclass(slots=True)
class BalancedSteps:
    """The steps of several concepts, each lengthened or shortened as that lowers a cost.

    Rprop on the steps' logarithms (Riedmiller and Braun 1993): only the signs of the slopes
    count. A step's pace grows by a fifth while it goes on the same way, and is halved where
    it turns; it then waits for a round. A concept that is still recognised gets a longer step
    whatever that costs, and never again one as short.
    """

    steps: dict[str, float]
    _pace: dict[str, float] = field(init=False, default_factory=dict)
    _way: dict[str, int] = field(init=False, default_factory=dict)
    _too_short: dict[str, float] = field(init=False, default_factory=dict)

    def observe(self, slopes: Mapping[str, float], left: Mapping[str, float]) -> None:
        """Take in the cost's slopes and what is left to forget at `steps`; choose the next."""
        for name, slope in slopes.items():
            way = (slope < 0) - (slope > 0)
            if left[name]:
                way = 1
                known = self._too_short.get(name, 0.0)
                self._too_short[name] = max(known, self.steps[name])
            pace, went = self._pace.get(name, PACE), way * self._way.get(name, 0)
            if went > 0:
                pace = min(1.2 * pace, FASTEST)
            elif went < 0:
                way, pace = 0, max(0.5 * pace, SLOWEST)
            self._pace[name], self._way[name] = pace, way
            least = (1 + CLOSE) * self._too_short.get(name, 0.0)
            self.steps[name] = max(self.steps[name] * exp(way * pace), least)
