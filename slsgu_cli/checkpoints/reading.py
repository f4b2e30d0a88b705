"""What a model reads of a CLIP tower, and so which layers can influence it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.records.method import Tower

_NORM = re.compile(r"ln_final|ln_post|attn_pool|(?:^|\.)norm\.|fc_norm")
_POOL = re.compile(r"attn_pool")
_PROJECTION = re.compile(r"text_projection|^text\.proj|^visual\.(?:proj|head|trunk\.head)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFrom:
    """What a model reads of one tower.

    `blocks` is how many blocks run before the place that is read (None for all of them);
    `norm` and `projection` tell whether the final norm and the projection are read too.
    `reads` says it in words.
    """

    tower: Tower
    blocks: int | None = None
    norm: bool = True
    projection: bool = True
    reads: str = "the projected features"

    def why_not(self, name: str) -> str | None:
        """Return why a layer cannot influence the model; None where it can."""
        layer = Layer.parse(name)
        if layer.tower is not self.tower:
            return f"the {layer.tower} tower is not part of it"
        if layer.block is not None:
            unread = self.blocks is not None and layer.block >= self.blocks
            before = f"it reads {self.reads}, which lies before block {layer.block}"
            return before if unread else None
        if not self.norm and _NORM.search(name):
            return f"it reads {self.reads}, which lies before the final norm"
        if not self.projection and _POOL.search(name):
            return f"it reads {self.reads}, which is not pooled"
        if not self.projection and _PROJECTION.search(name):
            return f"it reads {self.reads}, which is not projected"
        return None


def last_state(blocks: int | None) -> ReadFrom:
    """Return that the last hidden state of a text encoder is read."""
    reads = "the last hidden state" + (f" of {blocks} blocks" if blocks else "")
    return ReadFrom(tower=Tower.TEXT, blocks=blocks, projection=False, reads=reads)


def penultimate(blocks: int, *, norm: bool) -> ReadFrom:
    """Return that what enters the last of a text encoder's `blocks` blocks is read.

    With `norm`, the final norm is applied to it.
    """
    return ReadFrom(
        tower=Tower.TEXT, blocks=blocks - 1, norm=norm, projection=False, reads=PENULTIMATE
    )


PENULTIMATE = "the penultimate hidden state"
PENULTIMATE_AND_POOLED = f"{PENULTIMATE} and the projected pooled vector"
POOLED, EVERY_TOKEN = "the pooled vector alone", "every token"


def vision_features(layers: Iterable[int], blocks: int) -> ReadFrom:
    """Return that hidden states of a vision tower of `blocks` blocks are read.

    State 0 enters block 0, and `blocks` leaves the last; negative ones count from the end.
    """
    states = [state if state >= 0 else blocks + 1 + state for state in layers]
    names = ", ".join(str(state) for state in layers)
    reads = f"vision layer {names}"
    return ReadFrom(
        tower=Tower.VISION, blocks=max(states), norm=False, projection=False, reads=reads
    )


def unpooled() -> ReadFrom:
    """Return that a vision tower is read after its final norm, without its attention pool."""
    reads = "the last hidden state, after the final norm"
    return ReadFrom(tower=Tower.VISION, projection=False, reads=reads)


def whole(*towers: Tower) -> tuple[ReadFrom, ...]:
    """Return that all of CLIP's towers are read."""
    return tuple(ReadFrom(tower=tower) for tower in towers)


def why_unread(read_from: Sequence[ReadFrom], layer: str) -> str | None:
    """Return why a layer cannot influence anything that is read; None where it can."""
    reasons = [read.why_not(layer) for read in read_from]
    return None if None in reasons else reasons[-1]
