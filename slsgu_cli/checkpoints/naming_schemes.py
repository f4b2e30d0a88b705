"""Naming schemes: which tensors of a checkpoint hold a layer.

open_clip and transformers differ in names, in transposes and in axes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from slsgu_cli.checkpoints.layers import LETTERS, Layer, qkv_slice
from slsgu_cli.records.method import Tower

_PREFIX = {Tower.TEXT: "text.", Tower.VISION: "visual."}


class NamingScheme(StrEnum):
    """Whose names and shapes a checkpoint's towers have."""

    OPEN_CLIP = "open_clip"
    TRANSFORMERS = "transformers"
    SIGLIP = "siglip of transformers"
    BERT = "bert of transformers"


# A name that a tower has, behind the prefix of all its names.
_ANCHORS = (
    (Tower.TEXT, NamingScheme.TRANSFORMERS, r"(.*\.|)embeddings\.token_embedding\.weight"),
    (Tower.VISION, NamingScheme.TRANSFORMERS, r"(.*\.|)embeddings\.patch_embedding\.weight"),
    (Tower.TEXT, NamingScheme.OPEN_CLIP, r"((?!.*embeddings\.).*\.|)token_embedding\.weight"),
    (Tower.TEXT, NamingScheme.OPEN_CLIP, r"((?!.*visual\.).*\.|)transformer\.resblocks\.\d+\..*"),
    # Only SigLIP has these tensors.
    (Tower.TEXT, NamingScheme.SIGLIP, r"((?:.*\.|)text_model\.)head\.weight"),
    (Tower.VISION, NamingScheme.SIGLIP, r"(.*\.|)embeddings\.patch_embedding\.bias"),
    # The text tower of a Chinese CLIP.
    (
        Tower.TEXT,
        NamingScheme.BERT,
        r"((?:.*\.|)text_model\.)embeddings\.word_embeddings\.weight",
    ),
    # A text tower of another family in open_clip.
    (Tower.TEXT, NamingScheme.OPEN_CLIP, r"((?!.*visual\.)(?:.*\.|)text\.).*"),
    (Tower.VISION, NamingScheme.OPEN_CLIP, r"(.*\.|)visual\..*"),
)


@dataclass(frozen=True, slots=True)
class TowerPlace:
    """One CLIP tower among a checkpoint's tensors; its names begin with `prefix`."""

    tower: Tower
    scheme: NamingScheme
    prefix: str


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor that holds a layer, or its q, k or v slice (`part`).

    With `within`, the layer is itself a slice of the tensor, or that many `slices` from there on.
    `lead` is 1 if the layer has an additional first axis of size one, and -1 if the tensor has
    one.
    """

    key: str
    part: int | None = None
    within: int | None = None
    slices: int = 1
    transposed: bool = False
    lead: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the tensor's bytes are the layer's."""
        return self == TensorPlace(self.key) or bool(self.lead)

    def from_layer(self, layer: Any) -> Any:
        """Return this tensor's part of a layer (array or tensor) in open_clip's shape."""
        if self.part is not None:
            layer = qkv_slice(layer, self.part)
        if self.lead:
            return layer.reshape(_with_leading_axis(tuple(layer.shape), -self.lead))
        return layer.T if self.transposed else layer

    def rows(self, values: Any) -> Any:
        """Return the rows of this tensor's values that belong to the layer, as a view."""
        if self.within is None:
            return values
        rows = values.shape[0] // len(LETTERS)
        return values[self.within * rows : (self.within + self.slices) * rows]

    def to_layer(self, values: Any) -> Any:
        """Return the layer's rows of this tensor in open_clip's shape."""
        if self.lead:
            return values.reshape(_with_leading_axis(tuple(values.shape), self.lead))
        return self.rows(values).T if self.transposed else self.rows(values)


Places = tuple[TensorPlace, ...]


def _with_leading_axis(shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """Return a shape with an additional first axis of size one, or without it."""
    if axes > 0:
        return (1, *shape)
    return shape[1:] if axes < 0 and shape[:1] == (1,) else shape


KINDS = ("weight", "bias")


def _tensors(names: Mapping[str, str]) -> dict[str, Places]:
    """Return the places of tensors that differ in name only."""
    return {name: (TensorPlace(theirs),) for name, theirs in names.items()}


def _modules(names: Mapping[str, str]) -> dict[str, Places]:
    """Return the places of modules' weights and biases that differ in name only."""
    return _tensors(
        {f"{name}.{kind}": f"{theirs}.{kind}" for name, theirs in names.items() for kind in KINDS}
    )


def _blocks(ours: str, theirs: str, modules: Mapping[str, str]) -> dict[str, Places]:
    """Return the places of the modules of a block."""
    return _modules({ours + name: theirs + other for name, other in modules.items()})


def _fused(name: str) -> dict[str, Places]:
    """Return the places of a weight and a bias that open_clip fuses and transformers does not."""
    return {
        name.format("{}", kind): tuple(
            TensorPlace(f"encoder.layers.{{}}.self_attn.{letter}_proj.{kind}", part)
            for part, letter in enumerate(LETTERS)
        )
        for kind in KINDS
    }


_CLIP_BLOCKS = _fused("transformer.resblocks.{}.attn.in_proj_{}") | _blocks(
    "transformer.resblocks.{}.",
    "encoder.layers.{}.",
    {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
)
_CLIP_TEXT = (
    _CLIP_BLOCKS
    | _modules({"ln_final": "final_layer_norm"})
    | _tensors(
        {
            "token_embedding.weight": "embeddings.token_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
        }
    )
)
_POOL = "head.attention.in_proj_"

# The tensors of a tower in transformers, by their names in open_clip behind the tower's prefix.
# `{}` is the number of a block.
_TABLES: dict[tuple[NamingScheme, Tower], dict[str, Places]] = {
    (NamingScheme.TRANSFORMERS, Tower.TEXT): _CLIP_TEXT
    | {"text_projection": (TensorPlace("text_projection.weight", transposed=True),)},
    (NamingScheme.TRANSFORMERS, Tower.VISION): _CLIP_BLOCKS
    | _modules({"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"})
    | _tensors(
        {
            "class_embedding": "embeddings.class_embedding",
            "positional_embedding": "embeddings.position_embedding.weight",
            "conv1.weight": "embeddings.patch_embedding.weight",
        }
    )
    | {"proj": (TensorPlace("visual_projection.weight", transposed=True),)},
    (NamingScheme.SIGLIP, Tower.TEXT): _CLIP_TEXT | _modules({"text_projection": "head"}),
    (NamingScheme.SIGLIP, Tower.VISION): _fused("trunk.blocks.{}.attn.qkv.{}")
    | _blocks(
        "trunk.blocks.{}.",
        "encoder.layers.{}.",
        {
            "attn.proj": "self_attn.out_proj",
            "norm1": "layer_norm1",
            "norm2": "layer_norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
    )
    | _modules(
        {
            "trunk.patch_embed.proj": "embeddings.patch_embedding",
            "trunk.norm": "post_layernorm",
            "trunk.attn_pool.proj": "head.attention.out_proj",
            "trunk.attn_pool.norm": "head.layernorm",
            "trunk.attn_pool.mlp.fc1": "head.mlp.fc1",
            "trunk.attn_pool.mlp.fc2": "head.mlp.fc2",
        }
    )
    | {
        "trunk.attn_pool.latent": (TensorPlace("head.probe"),),
        "trunk.pos_embed": (TensorPlace("embeddings.position_embedding.weight", lead=1),),
        "trunk.attn_pool.q.weight": (TensorPlace(f"{_POOL}weight", within=0),),
        "trunk.attn_pool.q.bias": (TensorPlace(f"{_POOL}bias", within=0),),
        "trunk.attn_pool.kv.weight": (TensorPlace(f"{_POOL}weight", within=1, slices=2),),
        "trunk.attn_pool.kv.bias": (TensorPlace(f"{_POOL}bias", within=1, slices=2),),
    },
    # open_clip uses the names of transformers inside this tower.
    (NamingScheme.BERT, Tower.TEXT): _blocks(
        "transformer.encoder.layer.{}.",
        "encoder.layer.{}.",
        {
            name: name
            for name in (
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
                "attention.output.LayerNorm",
                "intermediate.dense",
                "output.dense",
                "output.LayerNorm",
            )
        },
    )
    | _modules({"transformer.embeddings.LayerNorm": "embeddings.LayerNorm"})
    | _tensors(
        {
            f"transformer.embeddings.{name}.weight": f"embeddings.{name}.weight"
            for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
        }
    )
    | _tensors({"proj.weight": "text_projection.weight"}),
}

# A folder of transformers may hold weights by open_clip's names.
_TABLES |= {
    (NamingScheme.OPEN_CLIP, tower): _TABLES[NamingScheme.TRANSFORMERS, tower] for tower in Tower
}

# These tensors are next to the tower, which is called `text_model` or `vision_model`.
_NEXT_TO_TOWER = ("text_projection.weight", "visual_projection.weight")
_INNER = re.compile(r"(text|vision)_model\.$")

# Tensors of neither tower.
SCALES = {
    NamingScheme.OPEN_CLIP: {"logit_scale": TensorPlace("logit_scale")},
    NamingScheme.TRANSFORMERS: {"logit_scale": TensorPlace("logit_scale")},
    NamingScheme.BERT: {"logit_scale": TensorPlace("logit_scale")},
    NamingScheme.SIGLIP: {
        name: TensorPlace(name, lead=-1) for name in ("logit_scale", "logit_bias")
    },
}


def tower_places(keys: Iterable[str]) -> list[TowerPlace]:
    """Return the CLIP towers among the names of a checkpoint's tensors, sorted by prefix."""
    places = {
        TowerPlace(tower, scheme, match[1])
        for key in keys
        for tower, scheme, anchor in _ANCHORS
        if (match := re.fullmatch(anchor, key))
    }
    # A SigLIP also has the tensors by which a CLIP is found.
    places -= {
        replace(place, scheme=NamingScheme.TRANSFORMERS)
        for place in places
        if place.scheme is NamingScheme.SIGLIP
    }
    return sorted(places, key=lambda place: (place.tower, place.prefix, place.scheme))


def tensor_places(name: str, tower_place: TowerPlace) -> Places:
    """Return the tensors of a tower that hold the layer open_clip calls `name`, in order.

    Empty if the layer is in the other tower or has no counterpart in this scheme.
    """
    layer, tower, prefix = Layer.parse(name), tower_place.tower, tower_place.prefix
    if layer.tower is not tower:
        return ()
    name = layer.parameter.removeprefix(_PREFIX[tower])
    if tower_place.scheme is NamingScheme.OPEN_CLIP:
        start = _PREFIX[tower] if tower is Tower.VISION else ""
        return (TensorPlace(f"{prefix}{start}{name}", within=layer.part),)
    template = name.replace(f".{layer.block}.", ".{}.", 1)
    places = []
    for place in _TABLES[tower_place.scheme, tower].get(template, ()):
        start = _INNER.sub("", prefix) if place.key in _NEXT_TO_TOWER else prefix
        key = start + place.key.format(layer.block)
        if layer.part is None:
            places.append(replace(place, key=key))
        elif layer.part == place.part:
            places.append(TensorPlace(key))
    return tuple(places)


def names(tower: Tower, blocks: int, scheme: NamingScheme = NamingScheme.TRANSFORMERS) -> list[str]:
    """Return open_clip's names for all tensors of a tower in a naming scheme."""
    is_plain = scheme in (NamingScheme.OPEN_CLIP, NamingScheme.TRANSFORMERS)
    start = "" if is_plain and tower is Tower.TEXT else _PREFIX[tower]
    return [
        start + name.format(block)
        for name in _TABLES[scheme, tower]
        for block in (range(blocks) if "{}" in name else (None,))
    ]
