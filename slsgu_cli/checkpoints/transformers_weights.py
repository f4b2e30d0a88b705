"""The weights of a CLIP in transformers' layout, by open_clip's names."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from slsgu_cli.checkpoints.layouts import WeightSet, combined_fingerprint, read_weight_sets
from slsgu_cli.checkpoints.naming_schemes import SCALES, Places, names, tensor_places
from slsgu_cli.checkpoints.number_formats import FLOATS, Floats, values_digest, widen
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.method import Tower

# The order in which transformers looks for weights.
PREFERRED = ("model.safetensors", "model-", "pytorch_model.bin", "pytorch_model-")


class ClipWeights:
    """Every tensor of a model of transformers by open_clip's name."""

    def __init__(self, folder: Path) -> None:
        """Find the weights that transformers would load. Raises MissingError or InputError."""
        self.weights = _preferred(folder)
        self._places = _places(self.weights)
        for places in self._places.values():
            if not self.weights.holds(places):
                raise InputError(f"{folder} holds no {places[0].key}, which a CLIP has")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, name: str) -> Floats:
        """Return the parameter open_clip calls `name`: fp16 of an fp16 file, else fp32 (or fp64).

        Raises InputError if there is none.
        """
        if name not in self._places:
            raise InputError(f"{self.weights.path} holds no layer {name}")
        stored, dtype = self.weights.layer(self._places[name])
        if dtype not in FLOATS:
            raise InputError(f"{name} in {self.weights.path} is {dtype}, not floating point")
        values: Floats = np.ascontiguousarray(stored if dtype == "F16" else widen(stored, dtype))
        return values.reshape(stored.shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        return {name: self.weights.shape(places) for name, places in self._places.items()}

    def fingerprint(self, instead: Mapping[str, Floats] | None = None) -> str:
        """Return the fingerprint that the same weights have in open_clip's layout.

        Parameters of `instead` count with these values in place of their own.
        """
        return combined_fingerprint(self.shapes(), self._digest, instead or {})

    def _digest(self, name: str) -> str:
        places = self._places[name]
        if len(places) > 1 or not places[0].is_plain:
            stored, dtype = self.weights.layer(places)
            return values_digest([stored], dtype)
        key = places[0].key
        file = self.weights.files[self.weights.owners[key]]
        return values_digest(file.chunks(key), file.entry(key).dtype)


def _places(weights: WeightSet) -> dict[str, Places]:
    """Return the places of each tensor of a model, by open_clip's name."""
    places: dict[str, Places] = {}
    for scheme in sorted({tower.scheme for tower in weights.towers}):
        places |= {name: (place,) for name, place in SCALES[scheme].items()}
    for tower in weights.towers:
        for name in names(tower.tower, weights.blocks(tower), tower.scheme):
            places[name] = tensor_places(name, tower)
    return places


def _preferred(folder: Path) -> WeightSet:
    weight_sets, unread = read_weight_sets(folder)
    whole = [each for each in weight_sets if {place.tower for place in each.towers} == {*Tower}]
    first = [each for start in PREFERRED for each in whole if each.path.name.startswith(start)]
    if whole:
        return (first or whole)[0]
    why = f": {next(iter(unread.values()))}" if unread else ""
    raise MissingError(f"{folder} holds no weights of a whole CLIP{why}")
