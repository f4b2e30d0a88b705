"""The conversion of a model's weights to another layout."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slsgu_cli.checkpoints.layouts import WeightSet, assembled, hollow, joined
from slsgu_cli.checkpoints.naming_schemes import (
    SCALES,
    NamingScheme,
    Places,
    TensorPlace,
    TowerPlace,
    names,
    tensor_places,
)
from slsgu_cli.checkpoints.number_formats import Raw
from slsgu_cli.checkpoints.safetensors_file import (
    NewTensor,
)
from slsgu_cli.checkpoints.tensor_file import canonical_name
from slsgu_cli.errors import InputError
from slsgu_cli.records.method import Tower
from slsgu_cli.text import listed

# Buffers next to the weights, which every library creates again.
_BUFFER = re.compile(r"(.*\.)?(position_ids|attn_mask|input_resolution|context_length|vocab_size)")
_NOT_TEXT = re.compile(r"(.*\.)?(visual|vision_model|visual_projection|logit_scale|logit_bias)\b.*")


@dataclass(frozen=True, slots=True)
class OtherLayout:
    """Another layout to write a model in, for a `client`.

    All weights of `towers` go into one `file`, next to other `files` and `texts`; the name "" means
    that this file is the whole copy. `names` is the naming scheme of the model's tensors, and
    `weights` is the copy to read: None for the edited one. Layers in `optional` may be missing.
    """

    client: str
    file: str
    names: NamingScheme
    towers: tuple[TowerPlace, ...]
    weights: Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()


def converted(
    weights: WeightSet, layout: OtherLayout, current: Callable[[str], Raw]
) -> list[NewTensor]:
    """Return a model's tensors in another layout.

    Towers without a place in the layout are left out. `current` reads a stored tensor with the
    edits applied. Raises InputError if some tensors have no place in the layout.
    """
    pieces: dict[str, list[tuple[TensorPlace, Places]]] = {}
    used: set[str] = set()
    for name, (sources, places) in _both_places(weights, layout).items():
        if not weights.holds(sources):
            if name in layout.optional:
                continue
            raise InputError(f"{weights.path} holds no {name}, which its layout must have")
        used |= {place.key for place in sources}
        for place in places:
            pieces.setdefault(place.key, []).append((place, sources))
    others = sorted(key for key in weights.owners.keys() - used if not _BUFFER.fullmatch(key))
    if len(layout.towers) < len(Tower):
        others = [key for key in others if not _NOT_TEXT.fullmatch(key)]
    if others:
        raise InputError(
            f"{weights.path} holds {listed(others, 1)}, which the other layout has no place for"
        )
    return [_combined(key, parts, weights, current) for key, parts in pieces.items()]


def _both_places(weights: WeightSet, layout: OtherLayout) -> dict[str, tuple[Places, Places]]:
    """Return the present and the new places of each tensor, by open_clip's name."""
    both = {}
    for tower in layout.towers:
        source = weights.tower(tower.tower)
        for name in names(tower.tower, weights.blocks(source), layout.names):
            both[name] = tensor_places(name, source), tensor_places(name, tower)
    if len(layout.towers) == len(Tower):
        keys = {canonical_name(stored): stored for stored in weights.owners}
        for name in SCALES[layout.names]:
            # A file may hold it as a number, or as a list of one.
            key = keys.get(name, name)
            axes = len(weights.entry(key).shape) if key in weights.owners else 0
            place = SCALES[layout.towers[0].scheme].get(name, TensorPlace(name))
            both[name] = ((TensorPlace(key, lead=-axes),), (place,))
    return both


def _combined(
    key: str,
    parts: Sequence[tuple[TensorPlace, Places]],
    weights: WeightSet,
    current: Callable[[str], Raw],
) -> NewTensor:
    """Return a tensor of the other layout, which may combine several of this one."""
    ordered = sorted(parts, key=lambda part: part[0].within or 0)

    def values(tensors: Callable[[str], Raw]) -> Raw:
        return joined([place.from_layer(assembled(sources, tensors)) for place, sources in ordered])

    shape = values(lambda key: hollow(weights.entry(key).shape)).shape
    dtype = weights.number_format(each for _, sources in ordered for each in sources)
    return NewTensor(key, dtype, shape, lambda: values(current))
