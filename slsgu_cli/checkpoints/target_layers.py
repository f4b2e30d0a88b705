"""Which layers of a CLIP a target reads, for a ranking."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slsgu_cli.checkpoints.layers import Layer, block_count
from slsgu_cli.checkpoints.naming_schemes import tensor_places
from slsgu_cli.checkpoints.reading import (
    ReadFrom,
    last_state,
    penultimate,
    unpooled,
    vision_features,
    whole,
    why_unread,
)
from slsgu_cli.checkpoints.targets import (
    KINDS,
    READERS,
    Encoder,
    Family,
    Target,
    read_target,
    text_reading,
    with_edits,
)
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.method import PromptReader, Tower

Shapes = Mapping[str, tuple[int, ...]]

# The second encoder of SDXL and of Stable Diffusion 3 is OpenCLIP's bigG, of this width.
SECOND_WIDTH = 1280


@dataclass(frozen=True, slots=True)
class TargetLayers:
    """The target of a ranking, as the user named it, and the outputs of a CLIP that it reads.

    `readers` are its prompt readers; those that an edit would change are marked.
    """

    target: str
    read_from: tuple[ReadFrom, ...]
    readers: tuple[PromptReader, ...] = ()

    def why_not(self, layer: str) -> str | None:
        """Return why a layer cannot influence the target; None if it can."""
        return why_unread(self.read_from, layer)


def layers_read_by(target: str, shapes: Shapes, *, encoder: str | None) -> TargetLayers:
    """Return the outputs that `target`, a path or a kind, reads of a CLIP with these `shapes`.

    Raises MissingError, InputError, and UsageError if an encoder must be named.
    """
    if target in KINDS and not Path(target).exists():
        family = Family(target)
        # The width tells the encoders of a kind apart.
        width = shapes.get("ln_final.weight", shapes.get("text.ln_final.weight", (0,)))[0]
        is_second = width == SECOND_WIDTH and family in (Family.SDXL, Family.SD3)
        name = encoder or ("text_encoder_2" if is_second else "text_encoder")
        read = with_edits(READERS.get(family, ()), [name])
        return TargetLayers(target, _of_kind(family, shapes, name), read)
    model = read_target(Path(target))
    one = fitting_encoder(model, shapes, encoder)
    return TargetLayers(target, one.read_from, with_edits(model.readers, [one.name]))


def fitting_encoder(model: Target, shapes: Shapes, encoder: str | None) -> Encoder:
    """Return the encoder of a model whose layers have these `shapes`, or the named one.

    Raises InputError if none has them, and UsageError if one must be named.
    """
    fitting = [one for one in model.chosen(encoder) if _fits(one, shapes)]
    if not fitting:
        raise InputError(
            f"the CLIP inside {model.path} is not the one that the gradients are of",
            hint="compute them on the CLIP that the target was built on",
        )
    if len(fitting) > 1:
        raise UsageError(
            f"{model.path} has several encoders of this shape",
            hint=f"--encoder {' or '.join(one.name for one in fitting)}",
        )
    return fitting[0]


def _of_kind(family: Family, shapes: Shapes, encoder: str) -> tuple[ReadFrom, ...]:
    match family:
        case Family.SD1:
            return (last_state(None),)
        case Family.SD2:
            return (penultimate(_depth(shapes, Tower.TEXT), norm=True),)
        case Family.SDXL | Family.SD3 | Family.FLUX:
            clips = [one.name for one in READERS[family] if one.model == "CLIP"]
            if encoder not in clips:
                raise UsageError(
                    f"{family} has no CLIP called {encoder}; it has {', '.join(clips)}"
                )
            pooled = encoder == "text_encoder_2"
            return (text_reading(family, _depth(shapes, Tower.TEXT), pooled=pooled),)
        case Family.LLAVA:
            return (vision_features([-2], _depth(shapes, Tower.VISION)),)
        case Family.PALIGEMMA:
            return (unpooled(),)
    return whole(*Tower)


def _depth(shapes: Shapes, tower: Tower) -> int:
    return block_count(name for name in shapes if Layer.parse(name).tower is tower)


def _fits(encoder: Encoder, shapes: Shapes) -> bool:
    """Return whether every layer of `shapes` in an encoder has the same shape there."""
    weights = encoder.copies[0]
    same = [
        weights.shape(places) == shape
        for place in encoder.towers(weights)
        for layer, shape in shapes.items()
        if weights.holds(places := tensor_places(layer, place))
    ]
    return bool(same) and all(same)
