"""The method's arithmetic on figures: importance, alignment, front, the next step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import ceil, exp, floor, fsum, log, log2

import numpy as np
import numpy.typing as npt

from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import Alignment, Criterion, Trial, Trials, UtilityMetric

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
    front = [False] * len(points)
    least_above = float("inf")
    order = sorted(range(len(points)), key=lambda index: -points[index][0])
    for _, group in groupby(order, key=lambda index: points[index][0]):
        level = list(group)
        for index in level:
            front[index] = points[index][1] <= least_above
        least_above = min(least_above, *(points[index][1] for index in level))
    return front


def _dot(a: Vector, b: Vector) -> float:
    """Return the inner product in fp64 without an fp64 copy of the whole layer.

    Products of fp32 are exact in fp64, and numpy adds them up by halves in an order of its own:
    every machine has the same digits, where those of a BLAS are its kernel's.
    """
    chunk = 1 << 16
    return fsum(
        float(np.multiply(a[i : i + chunk], b[i : i + chunk], dtype=np.float64).sum())
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


# Below this, a cosine is as good as none.
LEAST_SLACK = 1e-12

# How far beyond the step that is expected to be enough the next one goes, and at most and at
# least beyond the longest that was not; at least twice as far once a few were not.
BEYOND, FARTHEST, NEAREST, FEW = 1.06, 5.0, 1.03, 3


@dataclass(slots=True)
class ShortestStep:
    """The shortest step that is enough, of those that doubling and bisection could come to.

    After `trials` trials `next_step` is at one of a grid of steps: the doubled ones, and
    between two of them as many even parts as trials are left to halve. The same one is sought
    here by what steps lack, which is nearly linear in them: steps are enough from some step
    on, as for bisection. What a step has in excess of what is needed is its `slack`, negative
    where it is not enough; `at_zero` is that of the original model.
    """

    first: float
    trials: int
    at_zero: float
    _slack: dict[int, float] = field(init=False)
    # Places in the grid: of the longest step that is not enough, the shortest that is, the last.
    _low: int = field(init=False, default=0)
    _high: int | None = field(init=False, default=None)
    _at: int = field(init=False, default=0)
    _widths: list[int] = field(init=False, default_factory=list)
    # How many trials in a row were on the same side of the root.
    _alike: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._slack = {0: min(self.at_zero, -LEAST_SLACK)}

    def next(self) -> float | None:
        """Return the step to try; None once the shortest is known, or none is enough."""
        end = (1 << self.trials) - 1
        if self._low == (end if self._high is None else self._high - 1):
            return None
        if len(self._slack) == 1:
            self._at = 1 << self.trials - 1
        elif self._high is None:
            longest = self._step(self._low)
            nearest = NEAREST if len(self._slack) <= FEW else 2.0
            beyond = min(max(BEYOND * self._root(), nearest * longest), FARTHEST * longest)
            self._at = min(max(ceil(self._place(beyond)), self._low + 1), end)
        else:
            self._at = self._between(self._low, self._high)
        return self._step(self._at)

    def observe(self, slack: float, *, enough: bool) -> None:
        """Take in what the step that `next` returned has in excess."""
        before = next(reversed(self._slack.values()))
        self._alike = self._alike + 1 if (before > 0) is enough else 1
        self._slack[self._at] = max(slack, LEAST_SLACK) if enough else min(slack, -LEAST_SLACK)
        if enough:
            self._high = self._at
        else:
            self._low = self._at

    def _between(self, low: int, high: int) -> int:
        """Return the place next to the root as seen from the nearer end; or the middle.

        The latter where three trials did not halve what lies between.
        """
        self._widths.append(high - low)
        at = (low + high) // 2
        if len(self._widths) < 4 or self._widths[-1] <= self._widths[-4] / 2:
            root = self._place(self._root())
            at = ceil(root) if root - low < high - root else floor(root)
        return min(max(at, low + 1), high - 1)

    def _root(self) -> float:
        """Return at which step nothing is wanting, by what is known.

        By inverse quadratic interpolation, or along a line where that leads outside. As long
        as no step was enough, along the line through the last two.
        """
        known = sorted(self._slack.items(), key=lambda each: (abs(each[1]), each[0]))
        nearest = [(self._step(place), slack) for place, slack in known[:3]]
        before = max((place for place in self._slack if place < self._low), default=0)
        low, high = (before, self._low) if self._high is None else (self._low, self._high)
        (start, lacks), (stop, has) = ((self._step(n), self._slack[n]) for n in (low, high))
        if lacks >= has:
            return FARTHEST * stop
        if self._high is not None:
            # The end that stays counts for less each time (Illinois), or it holds the root off.
            less = 0.5 ** (self._alike - 1)
            lacks, has = (lacks * less, has) if self._at == high else (lacks, has * less)
        linear = start - lacks * (stop - start) / (has - lacks)
        if self._high is None or len({slack for _, slack in nearest}) < 3:
            return linear
        (a, f), (b, g), (c, h) = nearest
        root = (
            a * g * h / ((f - g) * (f - h))
            + b * f * h / ((g - f) * (g - h))
            + c * f * g / ((h - f) * (h - g))
        )
        return root if start < root < stop else linear

    def _step(self, place: int) -> float:
        """Return the step at a place of the grid, rounded as by bisection."""
        if place == 0:
            return 0.0
        left = (1 << self.trials) - place
        halvings = left.bit_length() - 1
        high: float = self.first * 2.0 ** (self.trials - 1 - halvings)
        low = 0.0 if halvings == self.trials - 1 else high / 2
        # How many parts before the end of the doubling, which has 2^halvings.
        parts = left - (1 << halvings)
        for bit in reversed(range(halvings)):
            middle = (low + high) / 2
            if parts >> bit & 1:
                high = middle
            elif parts & ((1 << bit) - 1):
                low = middle
        return high

    def _place(self, step: float) -> float:
        """Return where a step lies in the grid, between two places of it as a rule."""
        if step <= self.first:
            return step / self.first * (1 << self.trials - 1)
        doublings = floor(log2(step / self.first))
        if doublings >= self.trials - 1:
            return (1 << self.trials) - 1
        parts = 1 << self.trials - 2 - doublings
        return (1 << self.trials) - 2 * parts + (step / self.first / 2.0**doublings - 1) * parts


# Rows on which a figure may fall are drawn sooner than others, whose chance is at least this.
LEAST_CHANCE = 0.05
# Shares of the most that may be staked on a row.
STAKES = np.array([0.2, 0.5, 0.9])


@dataclass(frozen=True, slots=True)
class Draw:
    """Rows in an order drawn without replacement, those sooner that are likely missed.

    `weights` say what each row counts for, and sum to 1; `known` (models, rows) has figures in
    [0, 1] that are known: the original model's, and those of a step if any. Of the rows in
    `order`, `scale` is one over the chance with which each was drawn of those left, and `most`
    the most that a scaled difference to known figures could be then.
    """

    weights: Vector
    known: Vector
    order: npt.NDArray[np.integer]
    scale: Vector
    most: Vector

    @classmethod
    def of(cls, weights: Vector, known: Vector, waits: Vector) -> "Draw":
        """Draw an order of rows: each next one with a chance in proportion to w (1 - known).

        `waits` are drawn for each row from an exponential distribution of mean 1.
        """
        chances = weights * (1 - known.min(axis=0) + LEAST_CHANCE)
        order = np.argsort(waits / chances, kind="stable")
        drawn = chances[order]
        left = np.cumsum(drawn[::-1])[::-1]
        highest = (weights * (1 - known) / chances)[:, order]
        most = np.maximum.accumulate(highest[:, ::-1], axis=1)[:, ::-1] * left
        return cls(weights, known, order, left / drawn, most)


@dataclass(slots=True)
class Race:
    """Whether the mean of figures in [0, 1] is below a mark, by as few of them as show it.

    Bets against every mean of at least `mark` (Waudby-Smith and Ramdas 2024, section 5.3, with
    rows drawn by unequal chances): before each row a share of what there is, is staked on the
    row's figure being low beside each that is known. Where the mean is `mark` or more, no stake
    is expected to gain, so that all together ever multiply what they began with by 1 / risk has
    a chance of at most the risk (Ville), whenever they are looked at. `least` is a mark that no
    race on this draw goes below: stakes follow it, so that a higher mark is lost no later.
    """

    draw: Draw
    mark: float
    least: float
    looked: int = field(init=False, default=0)
    missed: float = field(init=False, default=0.0)
    _seen: Vector = field(init=False)
    _gains: Vector = field(init=False)

    def __post_init__(self) -> None:
        self._seen = np.zeros(len(self.draw.known))
        self._gains = np.zeros((len(STAKES), len(self.draw.known)))

    def look(self, figures: Vector) -> None:
        """Take in the figures of the next rows of the draw."""
        rows = slice(self.looked, self.looked + len(figures))
        chosen = self.draw.order[rows]
        weights, known = self.draw.weights[chosen], self.draw.known[:, chosen]
        beyond = weights * (figures - known)
        seen = self._seen[:, None] + np.cumsum(beyond, axis=1) - beyond
        others = (self.draw.known @ self.draw.weights)[:, None]
        wanted, least = (mark - others - seen for mark in (self.mark, min(self.mark, self.least)))
        room = np.maximum(self.draw.most[:, rows] - least, 1e-12)
        gains = (wanted - beyond * self.draw.scale[rows]) / room
        self._gains += np.log1p(np.multiply.outer(STAKES, np.maximum(gains, -1.0))).sum(axis=2)
        self._seen += beyond.sum(axis=1)
        self.missed += float((weights * (1 - figures)).sum())
        self.looked = rows.stop

    def lost(self, risk: float) -> bool:
        """Return whether the mean is below the mark, but for a chance of `risk` that it is not."""
        if not risk:
            return False
        highest = float(self._gains.max())
        gained = highest + log(float(np.exp(self._gains - highest).mean()))
        return gained >= -log(risk)


def left_to_forget(trial: Trial, criterion: Criterion, margin: float | None) -> float:
    """Return what the search drives to zero: a forget accuracy, or what the margin lacks."""
    return left_of(trial.forget, trial.gap, criterion, margin)


def left_of(forget: Accuracy, gap: float, criterion: Criterion, margin: float | None) -> float:
    """Return what a forget accuracy, and the gap that comes with it, leave to forget."""
    if criterion is Criterion.MARGIN:
        return max(0.0, (margin or 0.0) - gap)
    return forget.top1 if criterion is Criterion.FA1 else forget.top5


def mean_top1(utility: Mapping[str, Accuracy]) -> float:
    """Return the mean TA@1 over the evaluation sets, in percent."""
    return sum(figure.top1 for figure in utility.values()) / len(utility)


def kept(trial: Trial, by: UtilityMetric) -> float:
    """Return what a measured trial keeps, in percent: the figure steps are compared by."""
    if by is UtilityMetric.EXPECTED and trial.expected is not None:
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
        forget = left_to_forget(trial, trials.criterion, trials.margin)
        keeps = mean_top1(trial.utility) if trial.utility else -1.0
        return trial != chosen, forget, -keeps, trial.step

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
