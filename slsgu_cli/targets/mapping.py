"""Where a layer of open_clip's CLIP lies in checkpoints that spell it otherwise.

transformers keeps query, key and value apart, where open_clip has one matrix of their rows
(in this order), and keeps the final projections transposed. Everything else differs in
name only. In front of a tower's own names stands whatever the model around it adds
(`text_model.`, `vision_tower.vision_model.`, `cond_stage_model.transformer.text_model.`),
so towers are found by what their names end with.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from slsgu_cli.dtypes import Raw
from slsgu_cli.naming import tower_of
from slsgu_cli.records import Tower
from slsgu_cli.thirds import LETTERS, parameter_of, rows_of, third_of

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_FUSED = re.compile(r"attn\.in_proj_(weight|bias)")
_IN_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    Tower.TEXT: {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    },
    Tower.VISION: {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
        "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    },
}
_PROJECTION = {
    Tower.TEXT: ("text_projection", "text_projection.weight", "text_model."),
    Tower.VISION: ("proj", "visual_projection.weight", "vision_model."),
}
_PREFIX = {Tower.TEXT: "text.", Tower.VISION: "visual."}


class Spelling(StrEnum):
    """Whose names and shapes a checkpoint's towers have."""

    OPEN_CLIP = "open_clip"
    TRANSFORMERS = "transformers"


# The name that tells where a tower is, and what must not stand before it.
_ANCHORS = (
    (Tower.TEXT, Spelling.TRANSFORMERS, re.compile(r"(.*\.|)embeddings\.token_embedding\.weight")),
    (
        Tower.VISION,
        Spelling.TRANSFORMERS,
        re.compile(r"(.*\.|)embeddings\.patch_embedding\.weight"),
    ),
    (
        Tower.TEXT,
        Spelling.OPEN_CLIP,
        re.compile(r"((?!.*embeddings\.).*\.|)token_embedding\.weight"),
    ),
    (Tower.VISION, Spelling.OPEN_CLIP, re.compile(r"(.*\.|)visual\.conv1\.weight")),
)


@dataclass(frozen=True, slots=True)
class Home:
    """One CLIP tower among a checkpoint's tensors: `prefix` stands before its own names."""

    tower: Tower
    spelling: Spelling
    prefix: str


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor that holds a layer, or a third of its rows: `part` of query, key, value.

    With `within`, the layer is itself that third of the tensor's rows.
    """

    key: str
    part: int | None = None
    within: int | None = None
    transposed: bool = False

    def take(self, layer: Any) -> Any:
        """Return what this tensor holds of a layer, array or tensor, of open_clip's shape."""
        if self.part is not None:
            layer = rows_of(self.part, layer)
        return layer.T if self.transposed else layer

    def rows(self, values: Any) -> Any:
        """Return the rows of this tensor's values that belong to the layer, as a view."""
        return values if self.within is None else rows_of(self.within, values)

    def held(self, values: Any) -> Any:
        """Return what `rows` does in open_clip's shape."""
        return self.rows(values).T if self.transposed else self.rows(values)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what is held, from that of this tensor."""
        if self.within is not None:
            whole = (whole[0] // len(LETTERS), *whole[1:])
        return whole[::-1] if self.transposed else whole


def homes(keys: Iterable[str]) -> list[Home]:
    """Return the CLIP towers among the names of a checkpoint's tensors, sorted by prefix."""
    found = [
        Home(tower, spelling, match[1])
        for key in keys
        for tower, spelling, anchor in _ANCHORS
        if (match := anchor.fullmatch(key))
    ]
    return sorted(found, key=lambda home: (home.tower, home.prefix))


def slots(layer: str, home: Home) -> tuple[Slot, ...]:
    """Return the tensors of a tower that hold the layer open_clip calls `layer`, in order.

    Empty where the layer is of the other tower, or has no counterpart in this spelling.
    """
    if tower_of(layer) is not home.tower:
        return ()
    name = parameter_of(layer).removeprefix(_PREFIX[home.tower])
    third = third_of(layer)
    if home.spelling is Spelling.OPEN_CLIP:
        own = _PREFIX[Tower.VISION] if home.tower is Tower.VISION else ""
        return (Slot(f"{home.prefix}{own}{name}", within=third),)
    projection, key, inner = _PROJECTION[home.tower]
    if name == projection:
        return (Slot(home.prefix.removesuffix(inner) + key, transposed=True),)
    if name in _OUTSIDE[home.tower]:
        return (Slot(home.prefix + _OUTSIDE[home.tower][name]),)
    block = _BLOCK.fullmatch(name)
    if block is None:
        return ()
    found = _in_block(f"{home.prefix}encoder.layers.{block[1]}.", block[2])
    return found if third is None else (Slot(found[third].key),)


def names(tower: Tower, blocks: int) -> list[str]:
    """Return the names that open_clip's CLIP has for all tensors of a tower."""
    prefix = _PREFIX[tower] if tower is Tower.VISION else ""
    modules = ("attn.in_proj_{}", *(f"{module}.{{}}" for module in _IN_BLOCK))
    inside = [module.format(kind) for module in modules for kind in ("weight", "bias")]
    return [
        *(prefix + name for name in (*_OUTSIDE[tower], _PROJECTION[tower][0])),
        *(
            f"{prefix}transformer.resblocks.{block}.{name}"
            for block in range(blocks)
            for name in inside
        ),
    ]


def _in_block(prefix: str, name: str) -> tuple[Slot, ...]:
    if fused := _FUSED.fullmatch(name):
        keys = (f"{prefix}self_attn.{letter}_proj.{fused[1]}" for letter in LETTERS)
        return tuple(Slot(key, part) for part, key in enumerate(keys))
    module, _, kind = name.rpartition(".")
    known = _IN_BLOCK.get(module)
    return (Slot(f"{prefix}{known}.{kind}"),) if known else ()


def assembled(places: Sequence[Slot], tensors: Mapping[str, Raw]) -> Raw:
    """Return a layer in open_clip's shape from the tensors that hold it, by their names."""
    parts = [slot.held(tensors[slot.key]) for slot in places]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def placed(places: Sequence[Slot], layer: Raw, tensors: Callable[[str], Raw]) -> dict[str, Raw]:
    """Return a layer's tensors with its values in them, by name: the inverse of `assembled`.

    `tensors` tells the values as they are, of a tensor that holds more than the layer.
    """
    new = {}
    for slot in places:
        if slot.within is None:
            new[slot.key] = slot.take(layer)
        else:
            new[slot.key] = tensors(slot.key).copy()
            slot.rows(new[slot.key])[...] = slot.take(layer)
    return new
