"""Layers by name: which parameters they are, which tower they are in, which rows they hold."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from slsgu_cli.records.method import Qkv, Tower

# Parts of a parameter name that rule it out: what is added, scaled or looked up by
# position or token is not a layer in the sense of the method.
_EXCLUDED = re.compile(
    r"bias|logit_scale|position|pos_embed|token_embedding|class_embedding|embeddings\."
    r"|cls_token|cls_emb|reg_token|mask_token|(^|\.)ls_?\d\.gamma|(^|\.)gamma(_\d)?$"
)
_NEITHER = re.compile(r"^(text_decoder\.|logit_)")


def tower_of(name: str) -> Tower | None:
    """Return the tower that the parameter `name` belongs to; None for neither."""
    if _NEITHER.match(name):
        return None
    return Tower.VISION if name.startswith("visual.") else Tower.TEXT


def is_candidate(name: str) -> bool:
    """Return whether `name` may be edited: weight matrices and norms of both towers.

    Biases, scales, class, position and token embeddings are not candidates.
    """
    return tower_of(name) is not None and not _EXCLUDED.search(name)


def selected(name: str, *, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether `name` matches any glob of `include` (or none is given), none of `exclude`.

    A pattern without wildcards matches any name that contains it.
    """

    def matches(pattern: str) -> bool:
        whole = pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*"
        return fnmatchcase(name, whole)

    return (not include or any(map(matches, include))) and not any(map(matches, exclude))


def short(name: str) -> str:
    """Return `name` without the parts that every layer of its tower shares."""
    for prefix in ("visual.trunk.", "visual.", "text."):
        name = name.removeprefix(prefix)
    return name.replace("transformer.resblocks.", "").removesuffix(".weight")


def known_as(name: str) -> str:
    """Return the layer's name as tables show it: short, still one layer's own.

    >>> known_as("visual.transformer.resblocks.7.mlp.c_fc.weight")
    'visual.7.mlp.c_fc'
    """
    for part in ("transformer.resblocks.", "trunk."):
        name = name.replace(part, "")
    return name.removesuffix(".weight")


def find_layers(wanted: str, names: Sequence[str]) -> list[str]:
    """Return the layers that `wanted` may mean: by name, as tables show it, or by a part of it."""
    for same in (lambda name: wanted == name, lambda name: wanted == known_as(name)):
        exact = [name for name in names if same(name)]
        if exact:
            return exact
    return [name for name in names if wanted in name]


LETTERS = ("q", "k", "v")
_FUSED = re.compile(r"attn\.(?:in_proj_weight|qkv\.weight)$")
_THIRD = re.compile(r"(.*attn\.(?:in_proj_weight|qkv\.weight))\.([qkv])")


def parameter_of(layer: str) -> str:
    """Return the name of the parameter that a layer is, or is a third of.

    >>> parameter_of("visual.transformer.resblocks.7.attn.in_proj_weight.k")
    'visual.transformer.resblocks.7.attn.in_proj_weight'
    """
    match = _THIRD.fullmatch(layer)
    return match[1] if match else layer


def third_of(layer: str) -> int | None:
    """Return which third of its parameter a layer is: 0, 1, 2; None where it is all of it."""
    match = _THIRD.fullmatch(layer)
    return LETTERS.index(match[2]) if match else None


def layers_of(parameters: Iterable[str], qkv: Qkv) -> list[str]:
    """Return the layers that may be edited among a model's parameters, sorted."""
    layers = filter(is_candidate, sorted(parameters))
    if qkv is Qkv.FUSED:
        return list(layers)
    return [
        layer
        for whole in layers
        for layer in ([f"{whole}.{x}" for x in LETTERS] if _FUSED.search(whole) else [whole])
    ]


def is_of(qkv: Qkv, layer: str) -> bool:
    """Return whether a layer is one where query, key and value are fused, or split."""
    return not _FUSED.search(layer) if qkv is Qkv.SPLIT else third_of(layer) is None


def both_held(layers: Iterable[str]) -> str | None:
    """Return a parameter that is held as a whole and in thirds as well, if there is one."""
    known = set(layers)
    return next((parameter_of(name) for name in sorted(known) if _overlaps(name, known)), None)


def held(layer: str, values: Any) -> Any:
    """Return a layer's rows of its parameter's values, array or tensor, as a view."""
    third = third_of(layer)
    return values if third is None else rows_of(third, values)


def put(layer: str, new: Any, *, into: Any) -> Any:
    """Return a parameter's values, an array, with new ones for a layer; `into` stays as it is."""
    if third_of(layer) is None:
        return new
    values = into.copy()
    held(layer, values)[...] = new
    return values


def rows_of(third: int, values: Any) -> Any:
    """Return a third of the rows of an array or tensor, as a view."""
    rows = values.shape[0] // len(LETTERS)
    return values[third * rows : (third + 1) * rows]


def _overlaps(layer: str, known: set[str]) -> bool:
    return third_of(layer) is not None and parameter_of(layer) in known
