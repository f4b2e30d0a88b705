"""A cache of the inputs of tower stages, within a budget of bytes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slsgu_cli.clip.towers import EMBED


@dataclass(slots=True)
class CacheBudget:
    """The bytes that are left for cached activations."""

    left: int

    def take(self, size: int) -> bool:
        """Reserve `size` bytes; return whether they were available."""
        if size > self.left:
            return False
        self.left -= size
        return True


class Activations:
    """The inputs of one stage, for the `capacity` rows with the lowest keys among `rows`.

    `places` is the index in `values` of each row, -1 for rows that are not cached.
    """

    def __init__(self, rows: int, capacity: int, like: Tensor) -> None:
        self.values = like.new_empty(capacity, *like.shape[1:])
        self.places = torch.full((rows,), -1, device=like.device)
        self._rows = torch.full((capacity,), -1, device=like.device)
        self._keys = torch.full((capacity,), float("inf"), device=like.device)

    def offer(self, rows: Tensor, x: Tensor, keys: Tensor) -> None:
        """Cache the inputs `x` of `rows`, in place of rows with higher keys."""
        if len(self.values) == len(self.places):
            self.values[rows] = x
            self.places[rows] = rows
            return
        chosen = torch.zeros(len(self._keys) + len(x), dtype=torch.bool, device=x.device)
        chosen[torch.cat([self._keys, keys]).topk(len(self._keys), largest=False).indices] = True
        old, new = torch.split(chosen, [len(self._keys), len(x)])
        freed, entering = (~old).nonzero().squeeze(1), new.nonzero().squeeze(1)
        evicted = self._rows[freed]
        self.places[evicted[evicted >= 0]] = -1
        self.values[freed] = x[entering]
        self.places[rows[entering]] = freed
        self._rows[freed], self._keys[freed] = rows[entering], keys[entering]


def allocate(
    entering: Mapping[int, Tensor],
    rows: int,
    budget: CacheBudget,
    resumed: Mapping[int, int],
    share: float = 1.0,
    least: float = 0.0,
) -> dict[int, Activations]:
    """Return caches at some stages, each for as many of `rows` rows as fit into the budget.

    Together they take a `share` of the budget. `entering` holds the inputs of each stage for some
    rows, and `resumed` the number of edits that resume at each stage. Stages that save the most
    per byte come first. A row that is not cached runs from its pixels or tokens. A cache must save
    at least the fraction `least` of the stages that run before the edits.
    """
    caches: dict[int, Activations] = {}
    left, waiting = int(budget.left * share), {stage: x[0].nbytes for stage, x in entering.items()}
    from_start = sum(count * (stage - EMBED) for stage, count in resumed.items())
    while waiting:
        saved = {stage: _saved(stage, caches, resumed) for stage in waiting}
        stage = max(waiting, key=lambda each: (saved[each] / waiting[each], each))
        size = waiting.pop(stage)
        count = min(rows, left // size)
        if count and saved[stage] >= least * from_start and budget.take(count * size):
            left -= count * size
            caches[stage] = Activations(rows, count, entering[stage])
    return caches


def _saved(stage: int, cached: Iterable[int], resumed: Mapping[int, int]) -> int:
    """Return how many stages of one row all edits save by another cache at `stage`."""
    return sum(
        count * max(0, stage - max((each for each in cached if each <= at), default=EMBED))
        for at, count in resumed.items()
        if at >= stage
    )
