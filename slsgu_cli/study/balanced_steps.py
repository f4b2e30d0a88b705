"""The steps of several concepts, balanced against each other by Rprop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp

# Factor on the step of a concept that is still recognised next to the others.
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
