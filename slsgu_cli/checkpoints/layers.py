"""Layers: their parameter, tower, block and rows, and how to find them by name."""

import functools
import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from slsgu_cli.method.layers import candidates, tower_of
from slsgu_cli.records.method import Qkv, Tower

_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|encoder\.layers?)\.(\d+)\.")

LETTERS = ("q", "k", "v")
_FUSED = re.compile(r"attn\.(?:in_proj_weight|qkv\.weight)$")

_QKV_PART = re.compile(r"(.*attn\.(?:in_proj_weight|qkv\.weight))\.([qkv])")


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer: a parameter of open_clip, or the q, k or v slice of one that fuses the three.

    `tower` is None for a parameter of neither tower, `block` for one outside the blocks, and
    `part` (0, 1 or 2: query, key or value) for a layer that is a whole parameter.
    """

    name: str
    parameter: str
    tower: Tower | None
    block: int | None
    part: int | None

    @staticmethod
    @functools.cache
    def parse(name: str) -> "Layer":
        """Return the layer of a name in records and files.

        >>> layer = Layer.parse("visual.transformer.resblocks.7.attn.in_proj_weight.k")
        >>> layer.parameter, layer.block, layer.part
        ('visual.transformer.resblocks.7.attn.in_proj_weight', 7, 1)
        """
        part = _QKV_PART.fullmatch(name)
        tower = tower_of(name)
        return Layer(
            name,
            parameter=part[1] if part else name,
            tower=None if tower is None else Tower(tower),
            block=block_of(name),
            part=LETTERS.index(part[2]) if part else None,
        )

    @property
    def recorded_tower(self) -> Tower:
        """Return the tower in records: text for a parameter of neither."""
        return self.tower or Tower.TEXT

    def is_of(self, qkv: Qkv) -> bool:
        """Return whether it is a layer when query, key and value are fused, or split."""
        return not _FUSED.search(self.name) if qkv is Qkv.SPLIT else self.part is None

    def rows(self, values: Any) -> Any:
        """Return the layer's rows of its parameter's values, array or tensor, as a view."""
        return values if self.part is None else qkv_slice(values, self.part)

    def replaced(self, values: Any, new: Any) -> Any:
        """Return a copy of its parameter's values with `new` ones for the layer.

        Both are arrays or both are tensors. For a layer that is a whole parameter, this is `new`
        itself.
        """
        if self.part is None:
            return new
        whole = deepcopy(values)
        self.rows(whole)[...] = new
        return whole


def qkv_slice(values: Any, part: int) -> Any:
    """Return the q, k or v slice (0, 1, 2) of an array or tensor, as a view."""
    rows = values.shape[0] // len(LETTERS)
    return values[part * rows : (part + 1) * rows]


def block_of(name: str) -> int | None:
    """Return the number of a tensor's block, by the names of open_clip or transformers."""
    match = _BLOCK.search(name)
    return int(match[1]) if match else None


def block_count(names: Iterable[str]) -> int:
    """Return how many blocks a tower has, by the names of its tensors."""
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


def in_whole_and_in_part(layers: Iterable[str]) -> str | None:
    """Return a parameter that is named both as a whole and by q, k or v slices, if there is one."""
    names = set(layers)
    slices = (layer for layer in map(Layer.parse, sorted(names)) if layer.part is not None)
    return next((layer.parameter for layer in slices if layer.parameter in names), None)


def selected(name: str, *, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether `name` matches any glob of `include` (or none is given), none of `exclude`.

    A pattern without wildcards matches any name that contains it.
    """

    def matches(pattern: str) -> bool:
        whole = pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*"
        return fnmatchcase(name, whole)

    return (not include or any(map(matches, include))) and not any(map(matches, exclude))


def known_as(name: str) -> str:
    """Return a layer's short name, as tables show it. It is unique in a model.

    >>> known_as("visual.transformer.resblocks.7.mlp.c_fc.weight")
    'visual.7.mlp.c_fc'
    """
    name = name.replace("transformer.resblocks.", "").replace("visual.trunk.", "visual.")
    return name.removesuffix(".weight")


def find_layers(wanted: str, names: Sequence[str]) -> list[str]:
    """Return the layers that `wanted` may mean: by name, short name, or a part of the name."""
    for same in (lambda name: wanted == name, lambda name: wanted == known_as(name)):
        exact = [name for name in names if same(name)]
        if exact:
            return exact
    return [name for name in names if wanted in name]
