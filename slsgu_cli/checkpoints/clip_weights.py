"""The weights of a CLIP by open_clip's names, in a file or a folder of transformers."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.layouts import WeightSet, read_weight_set, read_weight_sets
from slsgu_cli.checkpoints.naming_schemes import SCALES, Places, TensorPlace, names, tensor_places
from slsgu_cli.checkpoints.number_formats import (
    FLOATS,
    Floats,
    layer_digest,
    values_digest,
    widen,
)
from slsgu_cli.checkpoints.tensor_file import canonical_name
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.method import Tower

# The order in which transformers looks for weights.
PREFERRED = ("model.safetensors", "model-", "pytorch_model.bin", "pytorch_model-")
TEXT_PREFIX = "text."
THREADS = 8


class ClipWeights:
    """The tensors of a set of weights, whose `places` are by open_clip's names."""

    def __init__(self, weights: WeightSet, places: Mapping[str, Places]) -> None:
        self.weights = weights
        self.places = places

    @classmethod
    def of_file(cls, path: Path) -> "ClipWeights":
        """Open a file with open_clip's names. Raises MissingError or InputError."""
        weights = read_weight_set([path])
        return cls(weights, {canonical_name(key): (TensorPlace(key),) for key in weights.owners})

    @classmethod
    def of_folder(cls, folder: Path) -> "ClipWeights":
        """Open the weights that transformers would load. Raises MissingError or InputError."""
        weights = _preferred(folder)
        places: dict[str, Places] = {}
        for tower in weights.towers:
            places |= {name: (place,) for name, place in SCALES[tower.scheme].items()}
            for name in names(tower.tower, weights.blocks(tower), tower.scheme):
                places[name] = tensor_places(name, tower)
        for each in places.values():
            if not weights.holds(each):
                raise InputError(f"{folder} holds no {each[0].key}, which a CLIP has")
        return cls(weights, places)

    def read(self, name: str) -> Floats:
        """Return the parameter open_clip calls `name`: fp16 of an fp16 file, else fp32 (or fp64).

        Raises InputError if there is none.
        """
        stored, dtype = self.weights.layer(self.places[self._known(name)])
        if dtype not in FLOATS:
            raise InputError(f"{name} in {self.weights.path} is {dtype}, not floating point")
        values: Floats = np.ascontiguousarray(stored if dtype == "F16" else widen(stored, dtype))
        return values.reshape(stored.shape)

    def layer(self, name: str) -> Floats:
        """Return a layer, which may be the q, k or v slice of a parameter, as `read` does."""
        layer = Layer.parse(name)
        values: Floats = layer.rows(self.read(layer.parameter))
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        return {name: self.weights.shape(places) for name, places in self.places.items()}

    def fingerprint(self, instead: Mapping[str, Floats] | None = None) -> str:
        """Return 64 hexadecimal digits that identify the weights.

        The same weights have one fingerprint in every layout and after upcasting, because the
        values are hashed as fp32 under open_clip's names. Other content of a checkpoint does not
        count. Values in `instead` replace those of the parameters.
        """
        other = {self._known(name): values for name, values in (instead or {}).items()}

        def digest(name: str) -> str:
            return layer_digest(other[name], "fp32") if name in other else self._digest(name)

        shapes = sorted(self.shapes().items())
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            digests = pool.map(digest, [name for name, _ in shapes])
            lines = [
                f"{name} {list(shape)} {value}\n"
                for (name, shape), value in zip(shapes, digests, strict=True)
            ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _known(self, name: str) -> str:
        """Return the name of a parameter here: models with a separate text tower may lack `text.`.

        Raises InputError if there is none.
        """
        older = name.removeprefix(TEXT_PREFIX)
        if name in self.places:
            return name
        if older in self.places and "positional_embedding" in self.places:
            return older
        hint = None
        if any(key.startswith(("text_model.", "vision_model.")) for key in self.places):
            hint = "this file has the names of transformers: use --target"
        raise InputError(f"{self.weights.path} holds no layer {name}", hint=hint)

    def _digest(self, name: str) -> str:
        places = self.places[name]
        if len(places) > 1 or not places[0].is_plain:
            stored, dtype = self.weights.layer(places)
            return values_digest([stored], dtype)
        key = places[0].key
        file = self.weights.files[self.weights.owners[key]]
        return values_digest(file.chunks(key), file.entries[key].dtype)


def _preferred(folder: Path) -> WeightSet:
    weight_sets, unread = read_weight_sets(folder)
    whole = [each for each in weight_sets if {place.tower for place in each.towers} == {*Tower}]
    first = [each for start in PREFERRED for each in whole if each.path.name.startswith(start)]
    if whole:
        return (first or whole)[0]
    why = f": {next(iter(unread.values()))}" if unread else ""
    raise MissingError(f"{folder} holds no weights of a whole CLIP{why}")
