"""Naming schemes: which tensors of a checkpoint hold a layer.

open_clip and transformers differ in names, in transposes and in axes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
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


# The names by which a tower is found, and the prefixes that rule one out.
_OURS, _THEIRS = NamingScheme.OPEN_CLIP, NamingScheme.TRANSFORMERS
_ANCHORS = [
    (tower, scheme, re.compile(anchor))
    for tower, scheme, anchor in (
        (Tower.TEXT, _THEIRS, r"(.*\.|)embeddings\.token_embedding\.weight"),
        (Tower.VISION, _THEIRS, r"(.*\.|)embeddings\.patch_embedding\.weight"),
        (Tower.TEXT, _OURS, r"((?!.*embeddings\.).*\.|)token_embedding\.weight"),
        (
            Tower.TEXT,
            _OURS,
            r"((?!.*visual\.).*\.|)transformer\.resblocks\.\d+\..*",
        ),
        # Only SigLIP has these tensors.
        (Tower.TEXT, NamingScheme.SIGLIP, r"((?:.*\.|)text_model\.)head\.weight"),
        (Tower.VISION, NamingScheme.SIGLIP, r"(.*\.|)embeddings\.patch_embedding\.bias"),
        # The text tower of a Chinese CLIP.
        (
            Tower.TEXT,
            NamingScheme.BERT,
            r"((?:.*\.|)text_model\.)embeddings\.word_embeddings\.weight",
        ),
        # A text tower of another family, as open_clip holds it.
        (Tower.TEXT, _OURS, r"((?!.*visual\.)(?:.*\.|)text\.).*"),
        (Tower.VISION, _OURS, r"(.*\.|)visual\..*"),
    )
]


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

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the layer's part, given the shape of this tensor."""
        if self.within is not None:
            whole = (whole[0] // len(LETTERS) * self.slices, *whole[1:])
        whole = _with_leading_axis(whole, self.lead)
        return whole[::-1] if self.transposed else whole


Places = tuple[TensorPlace, ...]


def _with_leading_axis(shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """Return a shape with an additional first axis of size one, or without it."""
    if axes > 0:
        return (1, *shape)
    return shape[1:] if axes < 0 and shape[:1] == (1,) else shape


_OPEN_CLIPS_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@dataclass(frozen=True, slots=True)
class TowerNames:
    """The names of a tower's tensors in transformers, by their names in open_clip.

    open_clip's names begin with `start`. Tensors `outside` the blocks are inside the tower, which
    is called `inner`; the names of `adjacent` tensors lack that part. In each of `blocks`, which
    transformers calls `their_blocks`, open_clip fuses the weights and biases of query, key and
    value into one tensor, `fused`, unless that is empty; all others are `modules` with a weight
    and a bias.
    """

    start: str
    inner: str
    outside: Mapping[str, TensorPlace]
    adjacent: Mapping[str, TensorPlace] = field(default_factory=dict)
    blocks: str = "transformer.resblocks"
    their_blocks: str = "encoder.layers"
    fused: str = "attn.in_proj_{}"
    modules: Mapping[str, str] = field(default_factory=lambda: _OPEN_CLIPS_BLOCK)

    def listed(self, blocks: int) -> list[str]:
        """Return open_clip's names of all tensors of a tower with this many blocks."""
        fused = (self.fused,) if self.fused else ()
        modules = (*fused, *(f"{module}.{{}}" for module in self.modules))
        inside = [module.format(kind) for module in modules for kind in ("weight", "bias")]
        in_blocks = [f"{self.blocks}.{block}.{name}" for block in range(blocks) for name in inside]
        return [self.start + name for name in (*self.outside, *self.adjacent, *in_blocks)]

    def places(self, name: str, block: int | None, prefix: str) -> Places:
        """Return the place of the tensor that open_clip calls `name`, after `start`, in a block."""
        if name in self.adjacent:
            place, prefix = self.adjacent[name], prefix.removesuffix(self.inner)
            return (replace(place, key=prefix + place.key),)
        if name in self.outside:
            return (replace(self.outside[name], key=prefix + self.outside[name].key),)
        inside = name.removeprefix(f"{self.blocks}.{block}.")
        if inside == name:
            return ()
        prefix += f"{self.their_blocks}.{block}."
        for kind in ("weight", "bias"):
            if inside == self.fused.format(kind):
                keys = (f"{prefix}self_attn.{letter}_proj.{kind}" for letter in LETTERS)
                return tuple(TensorPlace(key, part) for part, key in enumerate(keys))
        module, _, kind = inside.rpartition(".")
        theirs = self.modules.get(module)
        return (TensorPlace(f"{prefix}{theirs}.{kind}"),) if theirs else ()


def _tensors(names: Mapping[str, str]) -> dict[str, TensorPlace]:
    """Return the places of tensors that differ in name only."""
    return {name: TensorPlace(theirs) for name, theirs in names.items()}


def _modules(names: Mapping[str, str]) -> dict[str, TensorPlace]:
    """Return the places of modules' weights and biases that differ in name only."""
    kinds = ("weight", "bias")
    return _tensors(
        {f"{name}.{kind}": f"{theirs}.{kind}" for name, theirs in names.items() for kind in kinds}
    )


_TIMMS_BLOCK = {
    "attn.proj": "self_attn.out_proj",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TEXT_OUTSIDE = _tensors(
    {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }
) | _modules({"ln_final": "final_layer_norm"})

_POOL = "head.attention.in_proj_"
_BERTS_BLOCK = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_BERTS_EMBEDDINGS = (
    "word_embeddings.weight",
    "position_embeddings.weight",
    "token_type_embeddings.weight",
    "LayerNorm.weight",
    "LayerNorm.bias",
)
_NAMES = {
    (NamingScheme.TRANSFORMERS, Tower.TEXT): TowerNames(
        start="",
        outside=_TEXT_OUTSIDE,
        adjacent={"text_projection": TensorPlace("text_projection.weight", transposed=True)},
        inner="text_model.",
    ),
    (NamingScheme.TRANSFORMERS, Tower.VISION): TowerNames(
        start="visual.",
        outside=_tensors(
            {
                "class_embedding": "embeddings.class_embedding",
                "positional_embedding": "embeddings.position_embedding.weight",
                "conv1.weight": "embeddings.patch_embedding.weight",
            }
        )
        | _modules({"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}),
        adjacent={"proj": TensorPlace("visual_projection.weight", transposed=True)},
        inner="vision_model.",
    ),
    (NamingScheme.SIGLIP, Tower.TEXT): TowerNames(
        start="text.",
        outside=_TEXT_OUTSIDE | _modules({"text_projection": "head"}),
        inner="text_model.",
    ),
    (NamingScheme.SIGLIP, Tower.VISION): TowerNames(
        start="visual.",
        outside=_modules(
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
            "trunk.attn_pool.latent": TensorPlace("head.probe"),
            "trunk.pos_embed": TensorPlace("embeddings.position_embedding.weight", lead=1),
            "trunk.attn_pool.q.weight": TensorPlace(f"{_POOL}weight", within=0),
            "trunk.attn_pool.q.bias": TensorPlace(f"{_POOL}bias", within=0),
            "trunk.attn_pool.kv.weight": TensorPlace(f"{_POOL}weight", within=1, slices=2),
            "trunk.attn_pool.kv.bias": TensorPlace(f"{_POOL}bias", within=1, slices=2),
        },
        inner="vision_model.",
        blocks="trunk.blocks",
        fused="attn.qkv.{}",
        modules=_TIMMS_BLOCK,
    ),
    # open_clip uses the names of transformers inside this tower.
    (NamingScheme.BERT, Tower.TEXT): TowerNames(
        start="text.",
        outside=_tensors(
            {f"transformer.embeddings.{name}": f"embeddings.{name}" for name in _BERTS_EMBEDDINGS}
        ),
        adjacent=_tensors({"proj.weight": "text_projection.weight"}),
        inner="text_model.",
        blocks="transformer.encoder.layer",
        their_blocks="encoder.layer",
        fused="",
        modules={name: name for name in _BERTS_BLOCK},
    ),
}

# A folder of transformers may hold weights by open_clip's names.
_NAMES |= {
    (NamingScheme.OPEN_CLIP, tower): _NAMES[NamingScheme.TRANSFORMERS, tower] for tower in Tower
}

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
        if (match := anchor.fullmatch(key))
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
    layer = Layer.parse(name)
    if layer.tower is not tower_place.tower:
        return ()
    name = layer.parameter.removeprefix(_PREFIX[tower_place.tower])
    if tower_place.scheme is NamingScheme.OPEN_CLIP:
        start = _PREFIX[Tower.VISION] if tower_place.tower is Tower.VISION else ""
        return (TensorPlace(f"{tower_place.prefix}{start}{name}", within=layer.part),)
    tower_names = _NAMES[tower_place.scheme, tower_place.tower]
    places = tower_names.places(name, layer.block, tower_place.prefix)
    if layer.part is None:
        return places
    return tuple(TensorPlace(place.key) for place in places if place.part == layer.part)


def names(tower: Tower, blocks: int, scheme: NamingScheme = NamingScheme.TRANSFORMERS) -> list[str]:
    """Return open_clip's names for all tensors of a tower in a naming scheme."""
    return _NAMES[scheme, tower].listed(blocks)
