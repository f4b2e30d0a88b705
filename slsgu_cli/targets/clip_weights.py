"""The weights of a CLIPModel folder of transformers under open_clip's names."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slsgu_cli.dtypes import FLOATS, Floats, widen
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records import Tower
from slsgu_cli.targets.mapping import Slot, names, slots
from slsgu_cli.targets.states import State, read_states
from slsgu_cli.weights import combined_fingerprint, values_digest

# Where transformers itself looks first.
PREFERRED = ("model.safetensors", "model-", "pytorch_model.bin", "pytorch_model-")
SCALE = "logit_scale"


class ClipWeights:
    """Every tensor of a CLIP by open_clip's name, read from where transformers keeps it."""

    def __init__(self, folder: Path) -> None:
        """Find the weights that transformers would load. Raises MissingError or InputError."""
        self.state = _preferred(folder)
        self._places: dict[str, tuple[Slot, ...]] = {SCALE: (Slot(SCALE),)}
        for home in self.state.homes:
            for name in names(home.tower, self.state.blocks(home)):
                self._places[name] = slots(name, home)
        for places in self._places.values():
            if not self.state.holds(places):
                raise InputError(f"{folder} holds no {places[0].key}, which a CLIP has")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def read(self, name: str) -> Floats:
        """Return the parameter open_clip calls `name`: fp16 of an fp16 file, else fp32 (or fp64).

        Raises InputError where there is none.
        """
        if name not in self._places:
            raise InputError(f"{self.state.path} holds no layer {name}")
        stored, dtype = self.state.layer(self._places[name])
        if dtype not in FLOATS:
            raise InputError(f"{name} in {self.state.path} is {dtype}, not floating point")
        values: Floats = np.ascontiguousarray(stored if dtype == "F16" else widen(stored, dtype))
        return values.reshape(stored.shape)

    def fingerprint(self) -> str:
        """Return the fingerprint that the same weights have in open_clip's layout."""
        shapes = {name: self.state.shape(places) for name, places in self._places.items()}
        return combined_fingerprint(shapes, self._digest)

    def _digest(self, name: str) -> str:
        places = self._places[name]
        if len(places) > 1 or places[0].transposed:
            stored, dtype = self.state.layer(places)
            return values_digest([stored], dtype)
        file = self.state.files[self.state.owners[places[0].key]]
        return values_digest(file.chunks(places[0].key), file.entry(places[0].key).dtype)


def _preferred(folder: Path) -> State:
    states, unread = read_states(folder)
    towers = {Tower.TEXT, Tower.VISION}
    whole = [state for state in states if {home.tower for home in state.homes} == towers]
    for start in PREFERRED:
        for state in whole:
            if state.path.name.startswith(start):
                return state
    if whole:
        return whole[0]
    why = f": {next(iter(unread.values()))}" if unread else ""
    raise MissingError(f"{folder} holds no weights of a whole CLIP{why}")
