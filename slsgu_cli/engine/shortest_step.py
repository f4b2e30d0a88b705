"""The shortest step that forgets, found by interpolation on the grid of doubling and bisection."""

from dataclasses import dataclass, field
from math import ceil, floor, log2

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
