"""The shortest step that forgets, found by interpolation on the grid of doubling and bisection."""

from dataclasses import dataclass, field
from math import ceil, floor, log2

# A cosine below this counts as 0.
LEAST_SLACK = 1e-12

# The next step relative to the one that is expected to be enough, and its upper and lower bound
# relative to the longest that was not enough; the lower one is 2 after a few such steps.
BEYOND, FARTHEST, NEAREST, FEW = 1.06, 5.0, 1.03, 3


@dataclass(slots=True)
class ShortestStep:
    """Search for the step that doubling and bisection find, in fewer trials.

    After `trials` trials, doubling and bisection end at a point of a grid: the doubled steps,
    and equal parts between two of them, as many as the remaining trials can halve. The slack of
    a step, negative where it is not enough, is nearly linear in the step, so interpolation finds
    the same grid point sooner. `at_zero` is the slack of the original model.
    """

    first: float
    trials: int
    at_zero: float
    _slack: dict[int, float] = field(init=False)
    # Grid points of the longest step that is not enough, the shortest that is, and the last one.
    _low: int = field(init=False, default=0)
    _high: int | None = field(init=False, default=None)
    _at: int = field(init=False, default=0)
    _widths: list[int] = field(init=False, default_factory=list)
    # Consecutive trials on the same side of the root.
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
        """Observe the slack of the step that `next` returned."""
        before = next(reversed(self._slack.values()))
        self._alike = self._alike + 1 if (before > 0) is enough else 1
        self._slack[self._at] = max(slack, LEAST_SLACK) if enough else min(slack, -LEAST_SLACK)
        if enough:
            self._high = self._at
        else:
            self._low = self._at

    def _between(self, low: int, high: int) -> int:
        """Return the grid point next to the estimated root, towards the nearer end.

        It is the middle where three trials did not halve the bracket.
        """
        self._widths.append(high - low)
        at = (low + high) // 2
        if len(self._widths) < 4 or self._widths[-1] <= self._widths[-4] / 2:
            root = self._place(self._root())
            at = ceil(root) if root - low < high - root else floor(root)
        return min(max(at, low + 1), high - 1)

    def _root(self) -> float:
        """Return the step at which the slack is estimated to be 0.

        The estimate is by inverse quadratic interpolation, or linear where that leaves the
        bracket, or linear through the last two steps as long as none was enough.
        """
        known = sorted(self._slack.items(), key=lambda each: (abs(each[1]), each[0]))
        nearest = [(self._step(place), slack) for place, slack in known[:3]]
        before = max((place for place in self._slack if place < self._low), default=0)
        low, high = (before, self._low) if self._high is None else (self._low, self._high)
        (start, lacks), (stop, has) = ((self._step(n), self._slack[n]) for n in (low, high))
        if lacks >= has:
            return FARTHEST * stop
        if self._high is not None:
            # The end that stays is weighted down each time (Illinois), or convergence is slow.
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
        """Return the step at a grid point, rounded as by bisection."""
        if place == 0:
            return 0.0
        left = (1 << self.trials) - place
        halvings = left.bit_length() - 1
        high: float = self.first * 2.0 ** (self.trials - 1 - halvings)
        low = 0.0 if halvings == self.trials - 1 else high / 2
        # Parts before the end of this doubling, which has 2^halvings.
        parts = left - (1 << halvings)
        for bit in reversed(range(halvings)):
            middle = (low + high) / 2
            if parts >> bit & 1:
                high = middle
            elif parts & ((1 << bit) - 1):
                low = middle
        return high

    def _place(self, step: float) -> float:
        """Return the position of a step on the grid, usually between two grid points."""
        if step <= self.first:
            return step / self.first * (1 << self.trials - 1)
        doublings = floor(log2(step / self.first))
        if doublings >= self.trials - 1:
            return (1 << self.trials) - 1
        parts = 1 << self.trials - 2 - doublings
        return (1 << self.trials) - 2 * parts + (step / self.first / 2.0**doublings - 1) * parts
