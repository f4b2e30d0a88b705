"""Which layers of a CLIP a target reads, for a ranking."""

from collections.abc import Mapping
from pathlib import Path

from slsgu_cli.checkpoints.layers import Layer, block_count
from slsgu_cli.checkpoints.naming_schemes import tensor_places
from slsgu_cli.checkpoints.reading import (
    unpooled,
    vision_features,
    whole,
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


def encoder_of_target(
    target: str, shapes: Shapes, *, encoder: str | None
) -> tuple[Encoder, tuple[PromptReader, ...]]:
    """Return the encoder of `target`, a path or a kind, that a CLIP with these `shapes` is.

    The encoder of a kind has no weights. Return the prompt readers too, those that an edit would
    change marked. Raises MissingError, InputError, and UsageError if an encoder must be named.
    """
    if target in KINDS and not Path(target).exists():
        one, readers = _of_kind(Family(target), shapes, encoder)
    else:
        model = read_target(Path(target))
        one, readers = fitting_encoder(model, shapes, encoder), model.readers
    return one, with_edits(readers, [one.name])


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


def _of_kind(
    family: Family, shapes: Shapes, name: str | None
) -> tuple[Encoder, tuple[PromptReader, ...]]:
    readers = READERS.get(family, ())
    if name is None:
        # The width distinguishes the encoders of a kind.
        width = shapes.get("ln_final.weight", shapes.get("text.ln_final.weight", (0,)))[0]
        is_second = width == SECOND_WIDTH and family in (Family.SDXL, Family.SD3)
        name = "text_encoder_2" if is_second else "text_encoder"
    clips = [reader.name for reader in readers if reader.model == "CLIP"]
    if clips and name not in clips:
        raise UsageError(f"{family} has no CLIP called {name}; it has {', '.join(clips)}")
    match family:
        case Family.CLIP:
            read = whole(set(Tower))
        case Family.LLAVA:
            read = vision_features([-2], _depth(shapes, Tower.VISION))
        case Family.PALIGEMMA:
            read = unpooled()
        case _:
            is_second = name == "text_encoder_2"
            read = text_reading(family, _depth(shapes, Tower.TEXT), projected=is_second)
    return Encoder(name, (), read), readers


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
