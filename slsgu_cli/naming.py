"""Which parameters are candidate layers, which tower they belong to, how they are shown."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from slsgu_cli.records import Tower

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
