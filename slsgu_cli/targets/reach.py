"""Which layers of a CLIP can influence a model that is built on it.

Such a model reads one tower, often not its end: a layer behind the place it reads has no
influence on it, however well it scores on CLIP itself.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from slsgu_cli.naming import tower_of
from slsgu_cli.records import Tower

_BLOCK = re.compile(r"(?:resblocks|blocks)\.(\d+)\.")
_NORM = re.compile(r"ln_final|ln_post|attn_pool|(?:^|\.)norm\.|fc_norm")
_PROJECTION = re.compile(r"text_projection|^text\.proj|^visual\.(?:proj|head|trunk\.head)")


class Family(StrEnum):
    """Kinds of models that are built on CLIP, and CLIP itself."""

    CLIP = "clip"
    SD1 = "sd1"
    SD2 = "sd2"
    SDXL = "sdxl"
    LLAVA = "llava"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
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

    def why_not(self, layer: str) -> str | None:
        """Return why the layer cannot influence the model; None where it can."""
        if tower_of(layer) is not self.tower:
            return f"the {tower_of(layer)} tower is not part of it"
        block = _BLOCK.search(layer)
        if block and self.blocks is not None and int(block[1]) >= self.blocks:
            return f"it reads {self.reads}, which lies before block {block[1]}"
        if not block and not self.norm and _NORM.search(layer):
            return f"it reads {self.reads}, which lies before the final norm"
        if not block and not self.projection and _PROJECTION.search(layer):
            return f"it reads {self.reads}, which is not projected"
        return None


def last_state(blocks: int | None) -> Reach:
    """Return the reach of a pipeline that reads the text encoder's last hidden state."""
    reads = "the last hidden state" + (f" of {blocks} blocks" if blocks else "")
    return Reach(tower=Tower.TEXT, blocks=blocks, projection=False, reads=reads)


def penultimate(blocks: int, *, norm: bool) -> Reach:
    """Return the reach of a pipeline that reads what enters the last of `blocks` blocks.

    With `norm`, the final norm is applied to it.
    """
    return Reach(
        tower=Tower.TEXT,
        blocks=blocks - 1,
        norm=norm,
        projection=False,
        reads="the penultimate hidden state",
    )


def vision_features(layers: Iterable[int], blocks: int) -> Reach:
    """Return the reach of a model that reads hidden states of a vision tower of `blocks` blocks.

    State 0 enters block 0, and `blocks` leaves the last; negative ones count from the end.
    """
    states = [state if state >= 0 else blocks + 1 + state for state in layers]
    names = ", ".join(str(state) for state in layers)
    return Reach(
        tower=Tower.VISION,
        blocks=max(states),
        norm=False,
        projection=False,
        reads=f"vision layer {names}",
    )


def whole(*towers: Tower) -> tuple[Reach, ...]:
    """Return the reach of CLIP itself: all of the towers it has."""
    return tuple(Reach(tower=tower) for tower in towers)
