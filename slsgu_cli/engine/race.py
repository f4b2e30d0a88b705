"""Early stopping of a step's measurement: a betting martingale on rows drawn at random."""

from dataclasses import dataclass, field
from math import log

import numpy as np
import numpy.typing as npt

from slsgu_cli.method.scores import Vector

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
