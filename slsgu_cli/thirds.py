"""A layer is a whole parameter, or the third of one that is query, key or value.

Attention keeps the three as rows of one parameter, in this order. Where they are taken
apart, a third is called by its parameter's name with `.q`, `.k` or `.v` behind it. It is
a part of the parameter's rows and nothing else: its gradient is these rows of the
parameter's, and an edit of it leaves the others as they are.
"""

import re
from collections.abc import Iterable
from typing import Any

from slsgu_cli.naming import is_candidate
from slsgu_cli.records import Qkv

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
