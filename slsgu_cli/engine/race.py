"""Early stopping of a step's measurement: a betting martingale on rows drawn at random."""

from dataclasses import dataclass, field
from math import log

import numpy as np
import numpy.typing as npt

from slsgu_cli.method.scores import Vector

# Rows whose figure can fall are drawn sooner; the weight of others is at least this.
LEAST_CHANCE = 0.05
# Stakes on a row, as fractions of the largest that is allowed.
STAKES = np.array([0.2, 0.5, 0.9])


@dataclass(frozen=True, slots=True)
class RowDraw:
    """Rows in an order drawn without replacement, those that likely fail sooner.

    `weights` of the rows sum to 1. `known` (models, rows) has the known figures in [0, 1]: the
    original model's, and those of a rival step if there is one. In the sequence of `order`,
    `scale` is the inverse probability with which each row was drawn among the rest, and `most`
    the largest possible scaled difference to the known figures at that time.
    """

    weights: Vector
    known: Vector
    order: npt.NDArray[np.integer]
    scale: Vector
    most: Vector

    @classmethod
    def of(cls, weights: Vector, known: Vector, waits: Vector) -> "RowDraw":
        """Draw an order of rows, each next one with a chance in proportion to w (1 - known).

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
    """A sequential test of whether the mean of figures in [0, 1] is below a mark.

    It bets against every mean of at least `mark` (Waudby-Smith and Ramdas 2024, section 5.3, with
    rows drawn with unequal probabilities): before each row, a fraction of the capital is staked
    on a figure below the known one. If the mean is `mark` or more, no stake has a positive
    expectation, so the probability that the capital ever grows by 1 / risk is at most the risk
    (Ville's inequality), however often it is checked. `least` is a lower bound on the marks of
    all races on this draw; stakes depend on it, so a race with a higher mark stops no later.
    """

    draw: RowDraw
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
        """Observe the figures of the next rows of the draw."""
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
        """Return whether the mean is below the mark, with an error probability up to `risk`."""
        if not risk:
            return False
        highest = float(self._gains.max())
        gained = highest + log(float(np.exp(self._gains - highest).mean()))
        return gained >= -log(risk)
