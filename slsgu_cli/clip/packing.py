"""Prompts packed into one sequence of states, so that a shared prefix runs once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.clip.batches import Ints
from slsgu_cli.clip.blocks import mlp_half
from slsgu_cli.clip.onednn import linear
from slsgu_cli.clip.towers import OpenClipText, SplitTower

# A prefix of fewer prompts than this is not packed by itself.
LEAST_ALIKE = 8
# Positions in one MLP call on a CPU, so that intermediate tensors stay in its cache.
IN_CACHE = 2048


def by_prefix(tokens: Tensor, size: int) -> list[Tensor]:
    """Return row indices in groups of at most `size`, in the order of their tokens (N, L)."""
    order = np.lexsort(tokens.cpu().numpy().T[::-1])
    return list(torch.split(torch.from_numpy(order).to(tokens.device), size))


def packed(tower: SplitTower, tokens: Tensor) -> "PackedText | None":
    """Return a tower for exactly the prompts `tokens` (N, L); None if it cannot be packed.

    Packing needs a causal mask and a tower that runs in half blocks.
    """
    plain = type(tower) is OpenClipText and tower.shortens and tower.halves
    return PackedText(tower, tokens) if plain and len(tokens) else None  # type: ignore[arg-type]


class PackedText(SplitTower):
    """A causal text tower for fixed prompts, which runs each shared prefix once.

    States are (positions, width): first the tokens of a prefix, then the remaining tokens of each
    of its prompts. Under a causal mask no position depends on later ones, so the features are
    those of `tower`. `inputs` are always the prompts that the tower was built for.
    """

    halves = True

    def __init__(self, tower: OpenClipText, tokens: Tensor) -> None:
        self.tower, self.blocks, self.depth = tower, tower.blocks, tower.depth
        self._segments: list[Segment] = []
        words, lengths = tokens.cpu().numpy(), tower.lengths(tokens).cpu().numpy()
        # The prompt and the token position of each state.
        rows, places, ends = [], [], []
        at = 0
        for group, shared in _prefix_groups(words, lengths):
            prefix = range(at, at + shared)
            if shared:
                self._segments.append(Segment(at, 1, shared, None))
                rows.append(np.repeat(group[:1], shared))
                places.append(np.arange(shared))
                at += shared
            for length in np.unique(lengths[group]):
                alike, rest = group[lengths[group] == length], int(length) - shared
                self._segments.append(Segment(at, len(alike), rest, prefix))
                rows.append(np.repeat(alike, rest))
                places.append(np.tile(np.arange(shared, length), len(alike)))
                ends.append(alike)
                at += len(alike) * rest
        device = tokens.device
        self.rows, self.places = (
            torch.from_numpy(np.concatenate(each)).to(device) for each in (rows, places)
        )
        self._order = torch.from_numpy(np.argsort(np.concatenate(ends))).to(device)

    def stage_of(self, parameter: str) -> int:
        """Return the first stage that `parameter` acts in."""
        return self.tower.stage_of(parameter)

    def embed(self, inputs: Tensor) -> Tensor:
        """Return token plus position embeddings of all positions."""
        owner = self.tower.owner
        words: Tensor = owner.token_embedding(inputs[self.rows, self.places])
        places: Tensor = owner.positional_embedding[self.places]
        return words + places

    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Run half a block; from the last attention on, only for the end of each prompt."""
        block = self.blocks[index // 2]
        if index % 2:
            size = IN_CACHE if x.device.type == "cpu" else max(len(x), 1)
            return torch.cat([mlp_half(block, part) for part in torch.split(x, size)])
        return packed_attention(block, x, self._segments, ends=index == self.depth - 2)

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Normalise and project, in the order of the prompts."""
        return self.tower.head(x[self._order], inputs)


def _prefix_groups(words: Ints, lengths: Ints) -> list[tuple[Ints, int]]:
    """Return groups of prompts, each with the number of tokens in its shared prefix.

    Every prompt has at least one token after the prefix.
    """
    groups: list[tuple[Ints, int]] = []
    waiting: list[tuple[Ints, int]] = [(np.arange(len(words)), 0)]
    while waiting:
        rows, shared = waiting.pop()
        most = int(lengths[rows].min()) - 1
        while shared < most and (words[rows, shared] == words[rows[0], shared]).all():
            shared += 1
        nexts, counts = np.unique(words[rows, shared], return_counts=True)
        apart = nexts[counts >= LEAST_ALIKE] if len(nexts) > 1 and shared < most else nexts[:0]
        waiting += [(rows[words[rows, shared] == each], shared) for each in apart]
        if len(rest := rows[~np.isin(words[rows, shared], apart)]):
            groups.append((rest, shared))
    return groups


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive packed states from `start` on: `length` positions of each of `rows` prompts.

    `prefix` are the positions of their shared prefix; None if this is a prefix itself.
    """

    start: int
    rows: int
    length: int
    prefix: range | None

    def of(self, states: Tensor) -> Tensor:
        """Return the states at its positions, (rows, length, ...)."""
        part = states[self.start : self.start + self.rows * self.length]
        return part.view(self.rows, self.length, *states.shape[1:])

    def with_prefix(self, states: Tensor) -> Tensor:
        """Return the states of the prompts, prefix included."""
        rest = self.of(states)
        if not self.prefix:
            return rest
        before = states[self.prefix.start : self.prefix.stop]
        return torch.cat([before.expand(self.rows, *before.shape), rest], dim=1)


def packed_attention(
    block: Any, x: Tensor, segments: Sequence[Segment], *, ends: bool = False
) -> Tensor:
    """Run the causal attention of an open_clip residual block over packed states.

    With `ends`, return only the last position of each prompt, segment by segment, and none
    of the prefixes.
    """
    attention, width = block.attn, x.shape[1]
    projected = linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    states = projected.view(len(x), 3, attention.num_heads, width // attention.num_heads)
    mixed, leaving = [], []
    for segment in segments:
        if ends and segment.prefix is None:
            continue
        query = segment.of(states[:, 0])
        keys, values = segment.with_prefix(states[:, 1:]).unbind(2)
        if ends:
            query = query[:, -1:]
            leaving.append(segment.of(x)[:, -1])
        length = query.shape[1]
        before = keys.shape[1] - length
        after = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            _causal_mask(before, length, x.device) if before and length > 1 else None,
            is_causal=not before,
        )
        mixed.append(after.transpose(1, 2).reshape(-1, width))
    projected = linear(torch.cat(mixed), attention.out_proj.weight, attention.out_proj.bias)
    added: Tensor = block.ls_1(projected)
    return (torch.cat(leaving) if ends else x) + added


@lru_cache(maxsize=256)
def _causal_mask(before: int, length: int, device: torch.device) -> Tensor:
    """Return the causal mask of `length` positions after `before` others."""
    return torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)
