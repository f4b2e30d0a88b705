"""Layers: which parameter one is, its tower and block, the rows it holds; layers by name.

Then, which tensors hold one in other layouts, which differ in names, transposes and axes.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from slsgu_cli.method.layers import candidates, tower_of
from slsgu_cli.records.method import Qkv, Tower

_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|encoder\.layers?)\.(\d+)\.")

LETTERS = ("q", "k", "v")
_FUSED = re.compile(r"attn\.(?:in_proj_weight|qkv\.weight)$")
_THIRD = re.compile(r"(.*attn\.(?:in_proj_weight|qkv\.weight))\.([qkv])")


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer: a parameter of open_clip's, or a third of one that fuses query, key and value.

    `tower` is None for a parameter of neither, `block` for one outside the blocks, and
    `third` (0, 1 or 2: query, key or value) for a layer that is all of its parameter.
    """

    name: str
    parameter: str
    tower: Tower | None
    block: int | None
    third: int | None

    @staticmethod
    @functools.cache
    def parse(name: str) -> "Layer":
        """Return the layer of a name, as records and files spell it.

        >>> layer = Layer.parse("visual.transformer.resblocks.7.attn.in_proj_weight.k")
        >>> layer.parameter, layer.block, layer.third
        ('visual.transformer.resblocks.7.attn.in_proj_weight', 7, 1)
        """
        third = _THIRD.fullmatch(name)
        tower = tower_of(name)
        return Layer(
            name,
            parameter=third[1] if third else name,
            tower=None if tower is None else Tower(tower),
            block=block_of(name),
            third=LETTERS.index(third[2]) if third else None,
        )

    @property
    def short(self) -> str:
        """Return the name without the parts that every layer of its tower shares."""
        name = self.name
        for prefix in ("visual.trunk.", "visual.", "text."):
            name = name.removeprefix(prefix)
        return known_as(name)

    @property
    def recorded_tower(self) -> Tower:
        """Return the tower as records have it: text for a parameter of neither."""
        return self.tower or Tower.TEXT

    def is_of(self, qkv: Qkv) -> bool:
        """Return whether it is a layer where query, key and value are fused, or split."""
        return not _FUSED.search(self.name) if qkv is Qkv.SPLIT else self.third is None

    def rows(self, values: Any) -> Any:
        """Return the layer's rows of its parameter's values, array or tensor, as a view."""
        return values if self.third is None else third_of(values, self.third)

    def replaced(self, values: Any, new: Any) -> Any:
        """Return its parameter's values with `new` ones for the layer; `values` stay as they are.

        Both are arrays, or both tensors. Of a layer that is all of its parameter, `new` itself
        is returned.
        """
        if self.third is None:
            return new
        whole = deepcopy(values)
        self.rows(whole)[...] = new
        return whole


def third_of(values: Any, third: int) -> Any:
    """Return a third of the rows of an array or tensor, as a view."""
    rows = values.shape[0] // len(LETTERS)
    return values[third * rows : (third + 1) * rows]


def block_of(name: str) -> int | None:
    """Return the number of the block that a tensor is in, by open_clip's names or transformers'."""
    match = _BLOCK.search(name)
    return int(match[1]) if match else None


def block_count(names: Iterable[str]) -> int:
    """Return how many blocks the tensors of a tower are in, by their names."""
    return max((block for name in names if (block := block_of(name)) is not None), default=-1) + 1


def layers_of(parameters: Iterable[str], qkv: Qkv) -> list[str]:
    """Return the layers that may be edited among a model's parameters, sorted."""
    layers = candidates(parameters)
    if qkv is Qkv.FUSED:
        return layers
    return [
        layer
        for whole in layers
        for layer in ([f"{whole}.{x}" for x in LETTERS] if _FUSED.search(whole) else [whole])
    ]


def both_held(layers: Iterable[str]) -> str | None:
    """Return a parameter that is held as a whole and in thirds as well, if there is one."""
    names = set(layers)
    thirds = (layer for layer in map(Layer.parse, sorted(names)) if layer.third is not None)
    return next((third.parameter for third in thirds if third.parameter in names), None)


def selected(name: str, *, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether `name` matches any glob of `include` (or none is given), none of `exclude`.

    A pattern without wildcards matches any name that contains it.
    """

    def matches(pattern: str) -> bool:
        whole = pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*"
        return fnmatchcase(name, whole)

    return (not include or any(map(matches, include))) and not any(map(matches, exclude))


def known_as(name: str) -> str:
    """Return a layer's name, or one that holds it, as tables show it: short, still its own.

    >>> known_as("visual.transformer.resblocks.7.mlp.c_fc.weight")
    'visual.7.mlp.c_fc'
    """
    name = name.replace("transformer.resblocks.", "").replace("visual.trunk.", "visual.")
    return name.removesuffix(".weight")


def find_layers(wanted: str, names: Sequence[str]) -> list[str]:
    """Return the layers that `wanted` may mean: by name, as tables show it, or by a part of it."""
    for same in (lambda name: wanted == name, lambda name: wanted == known_as(name)):
        exact = [name for name in names if same(name)]
        if exact:
            return exact
    return [name for name in names if wanted in name]


_PREFIX = {Tower.TEXT: "text.", Tower.VISION: "visual."}


class Spelling(StrEnum):
    """Whose names and shapes a checkpoint's towers have."""

    OPEN_CLIP = "open_clip"
    TRANSFORMERS = "transformers"
    SIGLIP = "siglip of transformers"
    BERT = "bert of transformers"


# The names that tell where a tower is, and what must not stand before it.
_ANCHORS = [
    (tower, spelling, re.compile(anchor))
    for tower, spelling, anchor in (
        (Tower.TEXT, Spelling.TRANSFORMERS, r"(.*\.|)embeddings\.token_embedding\.weight"),
        (Tower.VISION, Spelling.TRANSFORMERS, r"(.*\.|)embeddings\.patch_embedding\.weight"),
        (Tower.TEXT, Spelling.OPEN_CLIP, r"((?!.*embeddings\.).*\.|)token_embedding\.weight"),
        (Tower.TEXT, Spelling.OPEN_CLIP, r"((?!.*visual\.).*\.|)transformer\.resblocks\.\d+\..*"),
        # SigLIP's have what CLIP's have not.
        (Tower.TEXT, Spelling.SIGLIP, r"((?:.*\.|)text_model\.)head\.weight"),
        (Tower.VISION, Spelling.SIGLIP, r"(.*\.|)embeddings\.patch_embedding\.bias"),
        # The text tower of a Chinese CLIP.
        (Tower.TEXT, Spelling.BERT, r"((?:.*\.|)text_model\.)embeddings\.word_embeddings\.weight"),
        # A text tower of another family, as open_clip holds it.
        (Tower.TEXT, Spelling.OPEN_CLIP, r"((?!.*visual\.)(?:.*\.|)text\.).*"),
        (Tower.VISION, Spelling.OPEN_CLIP, r"(.*\.|)visual\..*"),
    )
]


@dataclass(frozen=True, slots=True)
class TowerPlace:
    """One CLIP tower among a checkpoint's tensors: `prefix` stands before its own names."""

    tower: Tower
    spelling: Spelling
    prefix: str


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor that holds a layer, or a third of its rows: `part` of query, key, value.

    With `within`, the layer is itself that third of the tensor's rows, or so many `thirds` from
    there on. `lead` is 1 where the layer has an axis of one before the tensor's, and -1 where
    the tensor has one before the layer's.
    """

    key: str
    part: int | None = None
    within: int | None = None
    thirds: int = 1
    transposed: bool = False
    lead: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the tensor's bytes are the layer's."""
        return self == TensorPlace(self.key) or bool(self.lead)

    def from_layer(self, layer: Any) -> Any:
        """Return what this tensor holds of a layer, array or tensor, of open_clip's shape."""
        if self.part is not None:
            layer = third_of(layer, self.part)
        if self.lead:
            return layer.reshape(_led(tuple(layer.shape), -self.lead))
        return layer.T if self.transposed else layer

    def rows(self, values: Any) -> Any:
        """Return the rows of this tensor's values that belong to the layer, as a view."""
        if self.within is None:
            return values
        rows = values.shape[0] // len(LETTERS)
        return values[self.within * rows : (self.within + self.thirds) * rows]

    def to_layer(self, values: Any) -> Any:
        """Return what `rows` does in open_clip's shape."""
        if self.lead:
            return values.reshape(_led(tuple(values.shape), self.lead))
        return self.rows(values).T if self.transposed else self.rows(values)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what is held, from that of this tensor."""
        if self.within is not None:
            whole = (whole[0] // len(LETTERS) * self.thirds, *whole[1:])
        return _led(whole, self.lead)[::-1] if self.transposed else _led(whole, self.lead)


Places = tuple[TensorPlace, ...]


def _led(shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """Return a shape with an axis of one before it, or without the one that it has there."""
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
    """What transformers calls the tensors of a tower, by open_clip's names for them.

    These begin with `start`. Tensors `outside` of blocks lie inside of the tower, those `beside`
    where the tower lies itself, under the name of `inner`. In each of `blocks`, which they call
    `their_blocks`, open_clip fuses the weights and biases of query, key and value into one
    tensor, `fused`, unless that is empty; all else are `modules` with a weight and a bias.
    """

    start: str
    inner: str
    outside: Mapping[str, TensorPlace]
    beside: Mapping[str, TensorPlace] = field(default_factory=dict)
    blocks: str = "transformer.resblocks"
    their_blocks: str = "encoder.layers"
    fused: str = "attn.in_proj_{}"
    modules: Mapping[str, str] = field(default_factory=lambda: _OPEN_CLIPS_BLOCK)

    def listed(self, blocks: int) -> list[str]:
        """Return open_clip's names of all tensors of a tower of so many blocks."""
        fused = (self.fused,) if self.fused else ()
        modules = (*fused, *(f"{module}.{{}}" for module in self.modules))
        inside = [module.format(kind) for module in modules for kind in ("weight", "bias")]
        in_blocks = [f"{self.blocks}.{block}.{name}" for block in range(blocks) for name in inside]
        return [self.start + name for name in (*self.outside, *self.beside, *in_blocks)]

    def places(self, name: str, block: int | None, prefix: str) -> Places:
        """Return where a tensor lies that open_clip calls `name`, after `start`, in a block."""
        if name in self.beside:
            place, prefix = self.beside[name], prefix.removesuffix(self.inner)
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
    (Spelling.TRANSFORMERS, Tower.TEXT): TowerNames(
        start="",
        outside=_TEXT_OUTSIDE,
        beside={"text_projection": TensorPlace("text_projection.weight", transposed=True)},
        inner="text_model.",
    ),
    (Spelling.TRANSFORMERS, Tower.VISION): TowerNames(
        start="visual.",
        outside=_tensors(
            {
                "class_embedding": "embeddings.class_embedding",
                "positional_embedding": "embeddings.position_embedding.weight",
                "conv1.weight": "embeddings.patch_embedding.weight",
            }
        )
        | _modules({"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}),
        beside={"proj": TensorPlace("visual_projection.weight", transposed=True)},
        inner="vision_model.",
    ),
    (Spelling.SIGLIP, Tower.TEXT): TowerNames(
        start="text.",
        outside=_TEXT_OUTSIDE | _modules({"text_projection": "head"}),
        inner="text_model.",
    ),
    (Spelling.SIGLIP, Tower.VISION): TowerNames(
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
            "trunk.attn_pool.kv.weight": TensorPlace(f"{_POOL}weight", within=1, thirds=2),
            "trunk.attn_pool.kv.bias": TensorPlace(f"{_POOL}bias", within=1, thirds=2),
        },
        inner="vision_model.",
        blocks="trunk.blocks",
        fused="attn.qkv.{}",
        modules=_TIMMS_BLOCK,
    ),
    # open_clip has the tower as transformers has it.
    (Spelling.BERT, Tower.TEXT): TowerNames(
        start="text.",
        outside=_tensors(
            {f"transformer.embeddings.{name}": f"embeddings.{name}" for name in _BERTS_EMBEDDINGS}
        ),
        beside=_tensors({"proj.weight": "text_projection.weight"}),
        inner="text_model.",
        blocks="transformer.encoder.layer",
        their_blocks="encoder.layer",
        fused="",
        modules={name: name for name in _BERTS_BLOCK},
    ),
}
# A folder of transformers may hold weights by open_clip's names.
_NAMES |= {(Spelling.OPEN_CLIP, tower): _NAMES[Spelling.TRANSFORMERS, tower] for tower in Tower}
# What is of neither tower.
SCALES = {
    Spelling.OPEN_CLIP: {"logit_scale": TensorPlace("logit_scale")},
    Spelling.TRANSFORMERS: {"logit_scale": TensorPlace("logit_scale")},
    Spelling.BERT: {"logit_scale": TensorPlace("logit_scale")},
    Spelling.SIGLIP: {name: TensorPlace(name, lead=-1) for name in ("logit_scale", "logit_bias")},
}


def tower_places(keys: Iterable[str]) -> list[TowerPlace]:
    """Return the CLIP towers among the names of a checkpoint's tensors, sorted by prefix."""
    places = {
        TowerPlace(tower, spelling, match[1])
        for key in keys
        for tower, spelling, anchor in _ANCHORS
        if (match := anchor.fullmatch(key))
    }
    # A SigLIP has what tells a CLIP as well.
    places -= {
        replace(place, spelling=Spelling.TRANSFORMERS)
        for place in places
        if place.spelling is Spelling.SIGLIP
    }
    return sorted(places, key=lambda place: (place.tower, place.prefix, place.spelling))


def tensor_places(name: str, tower_place: TowerPlace) -> Places:
    """Return the tensors of a tower that hold the layer open_clip calls `name`, in order.

    Empty where the layer is of the other tower, or has no counterpart in this spelling.
    """
    layer = Layer.parse(name)
    if layer.tower is not tower_place.tower:
        return ()
    name = layer.parameter.removeprefix(_PREFIX[tower_place.tower])
    if tower_place.spelling is Spelling.OPEN_CLIP:
        start = _PREFIX[Tower.VISION] if tower_place.tower is Tower.VISION else ""
        return (TensorPlace(f"{tower_place.prefix}{start}{name}", within=layer.third),)
    spelt = _NAMES[tower_place.spelling, tower_place.tower]
    places = spelt.places(name, layer.block, tower_place.prefix)
    if layer.third is None:
        return places
    return tuple(TensorPlace(place.key) for place in places if place.part == layer.third)


def names(tower: Tower, blocks: int, spelling: Spelling = Spelling.TRANSFORMERS) -> list[str]:
    """Return open_clip's names for all tensors of a tower that transformers spells so."""
    return _NAMES[spelling, tower].listed(blocks)
