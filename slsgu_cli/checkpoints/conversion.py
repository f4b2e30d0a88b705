"""Layouts other than the model's own, and the conversion of its weights."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from slsgu_cli.checkpoints.layouts import WeightSet, assembled, joined, joined_shape
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


@dataclass(frozen=True, slots=True)
class Conversion:
    """A model's weights converted to another layout, to be written into one file.

    Towers without a place in the `layout` are left out. `current` reads a stored tensor with the
    edits applied.
    """

    weights: WeightSet
    layout: OtherLayout
    current: Callable[[str], Raw]

    def tensors(self) -> list[NewTensor]:
        """Return the tensors of the file. Raises InputError if some have no place in it."""
        pieces: dict[str, list[tuple[TensorPlace, Places]]] = {}
        used: set[str] = set()
        for name, (sources, places) in self._both_places().items():
            if not self.weights.holds(sources):
                if name in self.layout.optional:
                    continue
                raise InputError(f"{self.weights.path} holds no {name}, which its layout must have")
            used |= {place.key for place in sources}
            for place in places:
                pieces.setdefault(place.key, []).append((place, sources))
        self._require_all(used)
        return [self._tensor(key, parts) for key, parts in pieces.items()]

    def _both_places(self) -> dict[str, tuple[Places, Places]]:
        """Return the present and the new places of each tensor, by open_clip's name."""
        both = {}
        for tower in self.layout.towers:
            source = self.weights.tower(tower.tower)
            for name in names(tower.tower, self.weights.blocks(source), self.layout.names):
                both[name] = tensor_places(name, source), tensor_places(name, tower)
        if len(self.layout.towers) == len(Tower):
            keys = {canonical_name(stored): stored for stored in self.weights.owners}
            for name in SCALES[self.layout.names]:
                # A file may hold it as a number, or as a list of one.
                key = keys.get(name, name)
                axes = len(self.weights.entry(key).shape) if key in self.weights.owners else 0
                place = SCALES[self.layout.towers[0].scheme].get(name, TensorPlace(name))
                both[name] = ((TensorPlace(key, lead=-axes),), (place,))
        return both

    def _require_all(self, used: set[str]) -> None:
        """Raise InputError if the other layout has no place for a tensor."""
        left = self.weights.owners.keys() - used
        others = sorted(key for key in left if not _BUFFER.fullmatch(key))
        if len(self.layout.towers) < len(Tower):
            others = [key for key in others if not _NOT_TEXT.fullmatch(key)]
        if others:
            raise InputError(
                f"{self.weights.path} holds {listed(others, 1)}, which the other layout has no "
                "place for"
            )

    def _tensor(self, key: str, parts: list[tuple[TensorPlace, Places]]) -> NewTensor:
        """Return a tensor of the other layout, which may combine several of this one."""
        ordered = sorted(parts, key=lambda part: part[0].within or 0)
        shapes = [
            place.from_layer(np.broadcast_to(np.uint8(0), self.weights.shape(sources))).shape
            for place, sources in ordered
        ]

        def values() -> Raw:
            layers = ((place, assembled(sources, self.current)) for place, sources in ordered)
            return joined([place.from_layer(layer) for place, layer in layers])

        dtype = self.weights.number_format(each for _, sources in ordered for each in sources)
        return NewTensor(key, dtype, joined_shape(shapes), values)
