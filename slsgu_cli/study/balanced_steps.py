"""The steps of several concepts, balanced against each other by Rprop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp

# Factor on the step of a concept that is still recognised next to the others.
RAISE = 1.25

# The change of a step's logarithm in one round: initial, smallest and largest.
PACE, SLOWEST, FASTEST = 0.1, 0.005, 0.5
# A step is longer than an insufficient one by at least this share.
CLOSE = 0.02


@dataclass(slots=True)
class BalancedSteps:
    """The steps of several concepts, each lengthened or shortened as that lowers a cost.

    Rprop on the steps' logarithms (Riedmiller and Braun 1993): only the signs of the slopes
    count. The pace of a step grows by a fifth while the sign stays the same. When the sign
    changes, the pace is halved and the step stays for one round. A concept that is still
    recognised gets a longer step at any cost, and never again one as short.
    """

    steps: dict[str, float]
    _pace: dict[str, float] = field(init=False, default_factory=dict)
    _sign: dict[str, int] = field(init=False, default_factory=dict)
    _too_short: dict[str, float] = field(init=False, default_factory=dict)

    def observe(self, slopes: Mapping[str, float], residuals: Mapping[str, float]) -> None:
        """Choose the next steps by the cost's slopes and the residuals at `steps`."""
        for name, slope in slopes.items():
            sign = (slope < 0) - (slope > 0)
            if residuals[name]:
                sign = 1
                longest = self._too_short.get(name, 0.0)
                self._too_short[name] = max(longest, self.steps[name])
            pace, agreement = self._pace.get(name, PACE), sign * self._sign.get(name, 0)
            if agreement > 0:
                pace = min(1.2 * pace, FASTEST)
            elif agreement < 0:
                sign, pace = 0, max(0.5 * pace, SLOWEST)
            self._pace[name], self._sign[name] = pace, sign
            least = (1 + CLOSE) * self._too_short.get(name, 0.0)
            self.steps[name] = max(self.steps[name] * exp(sign * pace), least)
