"""Which outputs of a CLIP tower a model reads, and so which layers can influence it."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.records.method import Tower

_NORM = re.compile(r"ln_final|ln_post|attn_pool|(?:^|\.)norm\.|fc_norm")
_POOL = re.compile(r"attn_pool")
_PROJECTION = re.compile(r"text_projection|^text\.proj|^visual\.(?:proj|head|trunk\.head)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFrom:
    """The output of a tower, or of both if `tower` is None, that a model reads.

    `blocks` is the number of blocks before that output (None for all of them); `norm` and
    `projection` are True if the final norm and the projection come before it. `reads` describes
    it in words.
    """

    tower: Tower | None
    blocks: int | None = None
    norm: bool = True
    projection: bool = True
    reads: str = "the projected features"

    def why_not(self, name: str) -> str | None:
        """Return why a layer cannot influence the model; None if it can."""
        layer = Layer.parse(name)
        if self.tower not in (None, layer.tower):
            return f"the {layer.tower} tower is not part of it"
        if layer.block is not None:
            unread = self.blocks is not None and layer.block >= self.blocks
            before = f"it reads {self.reads}, which comes before block {layer.block}"
            return before if unread else None
        if not self.norm and _NORM.search(name):
            return f"it reads {self.reads}, which comes before the final norm"
        if not self.projection and _POOL.search(name):
            return f"it reads {self.reads}, which is not pooled"
        if not self.projection and _PROJECTION.search(name):
            return f"it reads {self.reads}, which is not projected"
        return None


def last_state(blocks: int) -> ReadFrom:
    """Describe a model that reads the last hidden state of a text encoder."""
    reads = f"the last hidden state of {blocks} blocks"
    return ReadFrom(tower=Tower.TEXT, blocks=blocks, projection=False, reads=reads)


def penultimate(blocks: int, *, norm: bool) -> ReadFrom:
    """Describe a model that reads the input of the last of a text encoder's `blocks` blocks.

    With `norm`, it applies the final norm.
    """
    return ReadFrom(
        tower=Tower.TEXT, blocks=blocks - 1, norm=norm, projection=False, reads=PENULTIMATE
    )


PENULTIMATE = "the penultimate hidden state"
PENULTIMATE_AND_POOLED = f"{PENULTIMATE} and the projected pooled vector"
POOLED, EVERY_TOKEN = "the pooled vector alone", "every token"


def vision_features(layers: Iterable[int], blocks: int) -> ReadFrom:
    """Describe a model that reads hidden states of a vision tower of `blocks` blocks.

    State 0 is the input of block 0, state `blocks` the output of the last block; negative ones
    count from the end.
    """
    states = [state if state >= 0 else blocks + 1 + state for state in layers]
    names = ", ".join(str(state) for state in layers)
    reads = f"vision layer {names}"
    return ReadFrom(
        tower=Tower.VISION, blocks=max(states), norm=False, projection=False, reads=reads
    )


def unpooled() -> ReadFrom:
    """Describe a model that reads a vision tower after its final norm, without its pool."""
    reads = "the last hidden state, after the final norm"
    return ReadFrom(tower=Tower.VISION, projection=False, reads=reads)


def whole(towers: Collection[Tower]) -> ReadFrom:
    """Describe a model that reads the projected output of these towers."""
    return ReadFrom(tower=None if len(towers) > 1 else next(iter(towers)))
