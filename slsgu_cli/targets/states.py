"""The weights of an encoder as they lie in a folder: whole files, shards, variants.

A folder may hold the same weights several times (an fp16 variant beside the fp32 one, a
.bin beside a .safetensors), and each of these in one file or cut into shards.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slsgu_cli.dtypes import Raw
from slsgu_cli.errors import InputError
from slsgu_cli.targets.mapping import Home, Slot, assembled, homes
from slsgu_cli.tensor_file import TensorFile
from slsgu_cli.weights import open_weights, weight_files

# A shard's number in a file name, with or without a variant before or behind it.
_SHARD = re.compile(r"-\d{5}-of-(\d{5})")
_BLOCK = re.compile(r"(?:resblocks|encoder\.layers)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class State:
    """One whole set of weights: a file, or the shards it was cut into.

    `owners` tells which file holds a tensor, `homes` where CLIP's towers are.
    """

    files: dict[Path, TensorFile]
    owners: dict[str, Path]
    homes: list[Home]

    @property
    def path(self) -> Path:
        """Return the file, or the first of the shards, to name this state by."""
        return next(iter(self.files))

    def holds(self, places: Sequence[Slot]) -> bool:
        """Return whether every one of some tensors is there. Raises InputError for a part."""
        missing = [slot.key for slot in places if slot.key not in self.owners]
        if missing and len(missing) < len(places):
            raise InputError(
                f"{self.path.parent} holds a part of a layer only: {', '.join(missing)} is missing",
                hint="fetch or copy the model again, all of its shards",
            )
        return bool(places) and not missing

    def shape(self, places: Sequence[Slot]) -> tuple[int, ...]:
        """Return a layer's shape as open_clip has it."""
        shapes = [
            slot.shape(self.files[self.owners[slot.key]].entry(slot.key).shape) for slot in places
        ]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def layer(self, places: Sequence[Slot]) -> tuple[Raw, str]:
        """Return a layer's stored values in open_clip's shape, and their number format."""
        files = {slot.key: self.files[self.owners[slot.key]] for slot in places}
        formats = {file.entry(key).dtype for key, file in files.items()}
        if len(formats) > 1:
            raise InputError(
                f"{', '.join(files)} are of different number formats in {self.path}",
                hint="save the model again in one precision",
            )
        return assembled(places, {key: f.stored(key) for key, f in files.items()}), formats.pop()

    def blocks(self, home: Home) -> int:
        """Return how many blocks a tower has."""
        names = (key for key in self.owners if key.startswith(home.prefix))
        return max((int(m[1]) for key in names if (m := _BLOCK.search(key))), default=-1) + 1


def read_state(paths: Iterable[Path]) -> State:
    """Read where the tensors of one set of weights lie. Raises MissingError or InputError."""
    files = {path: open_weights(path) for path in paths}
    owners: dict[str, Path] = {}
    for path, file in files.items():
        for key in file.names():
            if key in owners:
                raise InputError(
                    f"{key} lies in {owners[key]} and in {path.name} as well",
                    hint="remove the shard that is left over from an earlier save",
                )
            owners[key] = path
    return State(files, owners, homes(owners))


def read_states(folder: Path) -> tuple[list[State], dict[Path, str]]:
    """Return each set of weights directly in a folder, and the files that cannot be read.

    Sets without a CLIP tower (an adapter, say) are left out.
    """
    groups: dict[tuple[str, ...], list[Path]] = {}
    for path in weight_files(folder):
        groups.setdefault(tuple(_SHARD.split(path.name)), []).append(path)
    states: list[State] = []
    unread: dict[Path, str] = {}
    for name, paths in groups.items():
        try:
            if len(name) > 1 and len(paths) != int(name[1]):
                raise InputError(f"only {len(paths)} of its {int(name[1])} shards are there")
            state = read_state(paths)
        except InputError as error:
            unread |= dict.fromkeys(paths, error.message)
            continue
        if state.homes:
            states.append(state)
    return states, unread
