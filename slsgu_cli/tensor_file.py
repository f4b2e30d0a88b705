"""A checkpoint file as named tensors at known offsets, read one at a time.

The formats differ only in how the offsets are found and in what else must change when a
tensor's bytes do (a torch archive keeps checksums). Nothing is mapped: mapped pages count
as the process's memory, and a checkpoint may be larger than that.
"""

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slsgu_cli.dtypes import FLOATS, STORAGE, Floats, Raw, narrow, widen
from slsgu_cli.errors import InputError

CHUNK = 1 << 20
TRAINING_PREFIX = "module."
TEXT_PREFIX = "text."
CONVERT_HINT = "load the model with open_clip and save its state_dict() as safetensors"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in its file.

    `offset` is from the start of the file, `nbytes` the bytes it spans. `strides` are in
    elements, None where the elements lie in order without gaps.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    def overlaps(self, other: "TensorEntry") -> bool:
        """Return whether the two share bytes."""
        return (
            self.offset < other.offset + other.nbytes and other.offset < self.offset + self.nbytes
        )


@dataclass(frozen=True, slots=True)
class Splice:
    """Bytes to write at an offset of a copied file."""

    offset: int
    data: bytes | memoryview


class TensorFile:
    """Random access to the tensors of one checkpoint file."""

    container = "safetensors"

    def __init__(self, path: Path, entries: list[TensorEntry]) -> None:
        self.path = path
        self._entries = {entry.name: entry for entry in entries}

    def names(self) -> list[str]:
        """Return the file's own tensor names, in the file's order."""
        return list(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Return where the tensor the file calls `name` lies. Raises InputError."""
        if name not in self._entries:
            raise InputError(f"{self.path} holds no {name}{self._near(name)}")
        return self._entries[name]

    def resolve_name(self, name: str) -> str:
        """Return the file's own name of the parameter open_clip calls `name`.

        Training checkpoints prefix every name with `module.`; models with a text tower of
        their own (`text.`) also load from files of models without. Raises InputError.
        """
        plain = {canonical_name(own): own for own in self._entries}
        if name in plain:
            return plain[name]
        older = name.removeprefix(TEXT_PREFIX)
        if older in plain and "positional_embedding" in plain:
            return plain[older]
        hint = None
        if any(own.startswith(("text_model.", "vision_model.")) for own in plain):
            hint = "this file has the names of transformers: name it with --target"
        raise InputError(f"{self.path} holds no layer {name}{self._near(name)}", hint=hint)

    def stored(self, name: str) -> Raw:
        """Return a tensor's elements as they are stored (bf16 as uint16), in its shape."""
        entry = self.entry(name)
        if entry.dtype not in STORAGE:
            raise InputError(f"{name} in {self.path} has the unknown number format {entry.dtype}")
        flat = np.frombuffer(self._bytes(entry.offset, entry.nbytes), STORAGE[entry.dtype])
        return strided(flat, entry)

    def read(self, name: str) -> Floats:
        """Return a floating-point tensor as fp32 (fp64 where the file has fp64), exactly."""
        dtype = self.entry(name).dtype
        if dtype not in FLOATS:
            raise InputError(f"{name} in {self.path} is {dtype}, not floating point")
        return widen(self.stored(name), dtype)

    def chunks(self, name: str) -> Iterator[Raw]:
        """Yield a tensor's stored elements in order, a few MB at a time, flat."""
        entry = self.entry(name)
        if entry.strides is not None:
            yield np.ascontiguousarray(self.stored(name)).reshape(-1)
            return
        kind = np.dtype(STORAGE.get(entry.dtype, "|u1"))
        step = CHUNK * kind.itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            for start in range(0, entry.nbytes, step):
                data = file.read(min(step, entry.nbytes - start))
                yield np.frombuffer(self._whole(data, min(step, entry.nbytes - start)), kind)

    def splices(self, patches: Mapping[str, Raw]) -> list[Splice]:
        """Return what to write into a copy of this file to give tensors new values.

        Values already in the tensor's storage type (uint16 for bf16) are taken as they
        are; others are rounded once. Raises InputError.
        """
        return [self._splice(self.entry(name), values) for name, values in patches.items()]

    def _splice(self, entry: TensorEntry, values: Raw) -> Splice:
        if entry.dtype not in FLOATS:
            raise InputError(f"{entry.name} in {self.path} is {entry.dtype}, not floating point")
        if values.shape != entry.shape:
            raise InputError(
                f"{entry.name} in {self.path} has shape {list(entry.shape)}, "
                f"the new values {list(values.shape)}"
            )
        kind = np.dtype(STORAGE[entry.dtype])
        new = values if values.dtype == kind else narrow(values, entry.dtype)
        if entry.strides is not None:
            # The gaps between the elements belong to others: take them from the file.
            flat = np.frombuffer(bytearray(self._bytes(entry.offset, entry.nbytes)), kind)
            strided(flat, entry)[...] = new
            new = flat
        return Splice(entry.offset, np.ascontiguousarray(new).reshape(-1).data.cast("B"))

    def _bytes(self, offset: int, count: int) -> bytes:
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            return self._whole(file.read(count), count)

    def _whole(self, data: bytes, count: int) -> bytes:
        if len(data) != count:
            raise InputError(f"{self.path} became shorter while it was read")
        return data

    def _near(self, name: str) -> str:
        near = difflib.get_close_matches(name, [canonical_name(own) for own in self._entries], n=3)
        return f"; near names: {', '.join(near)}" if near else ""


def canonical_name(name: str) -> str:
    """Return a tensor's name without the prefix of training checkpoints."""
    return name.removeprefix(TRAINING_PREFIX)


def strided(flat: Any, entry: TensorEntry) -> Raw:
    """Return the span `flat` of a tensor's elements in its shape."""
    if entry.strides is None:
        return np.asarray(flat).reshape(entry.shape)
    steps = tuple(stride * flat.itemsize for stride in entry.strides)
    return np.lib.stride_tricks.as_strided(flat, entry.shape, steps)
