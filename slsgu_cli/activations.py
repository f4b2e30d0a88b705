"""What enters the stages of a tower, kept within a budget so that a forward can resume there."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class CacheBudget:
    """Bytes of activations that may still be kept."""

    left: int

    def take(self, size: int) -> bool:
        """Reserve `size` bytes if they are left."""
        if size > self.left:
            return False
        self.left -= size
        return True


class Activations:
    """What enters one stage, of as many of `rows` rows as there is room for.

    Those whose keys are least are kept. `places` tells where a row lies in `values`, -1 for
    a row that is not kept.
    """

    def __init__(self, rows: int, room: int, like: Tensor) -> None:
        self.values = like.new_empty(room, *like.shape[1:])
        self.places = torch.full((rows,), -1, device=like.device)
        self._rows = torch.full((room,), -1, device=like.device)
        self._keys = torch.full((room,), float("inf"), device=like.device)

    def offer(self, start: int, x: Tensor, keys: Tensor) -> None:
        """Keep rows `start` and following, in place of others whose keys are greater."""
        rows = torch.arange(start, start + len(x), device=x.device)
        if len(self.values) == len(self.places):
            self.values[start : start + len(x)] = x
            self.places[rows] = rows
            return
        chosen = torch.zeros(len(self._keys) + len(x), dtype=torch.bool, device=x.device)
        chosen[torch.cat([self._keys, keys]).topk(len(self._keys), largest=False).indices] = True
        old, new = torch.split(chosen, [len(self._keys), len(x)])
        freed, taken = (~old).nonzero().squeeze(1), new.nonzero().squeeze(1)
        left = self._rows[freed]
        self.places[left[left >= 0]] = -1
        self.values[freed] = x[taken]
        self.places[rows[taken]] = freed
        self._rows[freed], self._keys[freed] = rows[taken], keys[taken]


def room_for_all(
    entering: Mapping[int, Tensor], rows: int, budget: CacheBudget
) -> dict[int, Activations]:
    """Make room for all of `rows` rows where it is left, at the deepest stages first.

    `entering` is what enters each stage, for some rows. The deepest save the most.
    """
    return {
        stage: Activations(rows, rows, entering[stage])
        for stage in sorted(entering, reverse=True)
        if budget.take(rows * entering[stage][0].nbytes)
    }


def room_for_some(
    entering: Mapping[int, Tensor], rows: int, budget: CacheBudget, share: float
) -> dict[int, Activations]:
    """Divide a share of what is left evenly among the stages, each for as many rows as fit.

    What a stage needs less is left to the others.
    """
    kept, left = {}, int(budget.left * share)
    stages = sorted(entering, key=lambda stage: entering[stage][0].nbytes)
    for index, stage in enumerate(stages):
        size = entering[stage][0].nbytes
        room = min(rows, left // (len(stages) - index) // size)
        left -= room * size
        if room and budget.take(room * size):
            kept[stage] = Activations(rows, room, entering[stage])
    return kept
