"""Which layers a ranking for a target may hold, from the target's path or its kind."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records import Tower
from slsgu_cli.targets.mapping import slots
from slsgu_cli.targets.reach import (
    Family,
    Reach,
    last_state,
    penultimate,
    vision_features,
    whole,
)
from slsgu_cli.targets.target import Encoder, read_target

_BLOCK = re.compile(r"(?:resblocks|blocks)\.(\d+)\.")
Shapes = Mapping[str, tuple[int, ...]]
# SDXL's second encoder is OpenCLIP's bigG, of this width.
SECOND_WIDTH = 1280


@dataclass(frozen=True, slots=True)
class Aim:
    """What a ranking is for: the target in the user's words, and what it reads of a CLIP."""

    target: str
    reach: tuple[Reach, ...]

    def why_not(self, layer: str) -> str | None:
        """Return why a layer cannot influence the target; None where it can."""
        reasons = [reach.why_not(layer) for reach in self.reach]
        return None if None in reasons else reasons[-1]


def aim_at(target: str, shapes: Shapes, *, encoder: str | None) -> Aim:
    """Return what `target`, a path or a kind, reads of the CLIP whose layers have `shapes`.

    Raises MissingError, InputError, and UsageError where an encoder must be named.
    """
    if target in list(Family) and not Path(target).exists():
        return Aim(target, _of_kind(Family(target), shapes, encoder))
    model = read_target(Path(target))
    fitting = [one for one in model.chosen(encoder) if _fits(one, shapes)]
    if not fitting:
        raise InputError(
            f"the CLIP inside {target} is another than the one the gradients are of",
            hint="compute them on the CLIP that the target was built on",
        )
    if len(fitting) > 1:
        raise UsageError(
            f"{target} has several encoders of this shape",
            hint=f"--encoder {' or '.join(one.name for one in fitting)}",
        )
    return Aim(target, fitting[0].reach)


def _of_kind(family: Family, shapes: Shapes, encoder: str | None) -> tuple[Reach, ...]:
    match family:
        case Family.SD1:
            return (last_state(None),)
        case Family.SD2:
            return (penultimate(_depth(shapes, Tower.TEXT), norm=True),)
        case Family.SDXL:
            width = shapes.get("ln_final.weight", shapes.get("text.ln_final.weight", (0,)))[0]
            if encoder == "text_encoder_2" or (encoder is None and width == SECOND_WIDTH):
                return whole(Tower.TEXT)
            return (penultimate(_depth(shapes, Tower.TEXT), norm=False),)
        case Family.LLAVA:
            return (vision_features([-2], _depth(shapes, Tower.VISION)),)
    return whole(*Tower)


def _depth(shapes: Shapes, tower: Tower) -> int:
    own = (name for name in shapes if name.startswith("visual.") is (tower is Tower.VISION))
    return max((int(match[1]) for name in own if (match := _BLOCK.search(name))), default=-1) + 1


def _fits(encoder: Encoder, shapes: Shapes) -> bool:
    """Return whether every layer of `shapes` that lies in an encoder has the same shape there."""
    state = encoder.states[0]
    found = [
        state.shape(places) == shape
        for home in encoder.homes(state)
        for layer, shape in shapes.items()
        if state.holds(places := slots(layer, home))
    ]
    return bool(found) and all(found)
