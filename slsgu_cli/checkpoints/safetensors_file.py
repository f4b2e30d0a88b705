"""The safetensors format, read and written."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from slsgu_cli.checkpoints.number_formats import CHUNK, STORAGE, Raw, itemsize
from slsgu_cli.checkpoints.tensor_file import TensorEntry, TensorFile, damaged
from slsgu_cli.errors import InputError
from slsgu_cli.store.copying import copy_file, write_at
from slsgu_cli.store.tensor_format import LENGTH, safetensors_header


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor of a file to be written: `values` reads its elements as the format stores them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], Raw]

    @property
    def nbytes(self) -> int:
        """Return the bytes that its elements take."""
        return math.prod(self.shape) * np.dtype(STORAGE[self.dtype]).itemsize


def write_safetensors(path: Path, tensors: Iterable[NewTensor], *, holes: bool = False) -> None:
    """Write a new .safetensors file, one tensor after another.

    With `holes` only the header is written, and the file has the same size.
    """
    header, ordered = _new_header(tensors)
    with path.open("xb") as file:
        file.write(header)
        for each in [] if holes else ordered:
            file.write(np.ascontiguousarray(each.values()).reshape(-1).data.cast("B"))
        file.truncate(len(header) + sum(each.nbytes for each in ordered))


def safetensors_size(tensors: Iterable[NewTensor]) -> int:
    """Return the bytes that a .safetensors file of these tensors takes."""
    header, ordered = _new_header(tensors)
    return len(header) + sum(each.nbytes for each in ordered)


def _new_header(tensors: Iterable[NewTensor]) -> tuple[bytes, list[NewTensor]]:
    """Return the header of a file, and its tensors in order: wide elements first, for alignment."""
    ordered = sorted(tensors, key=lambda each: (-(itemsize(each.dtype) or 0), each.name))
    # Without this, transformers does not load it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in ordered:
        start, end = end, end + each.nbytes
        header[each.name] = {
            "dtype": each.dtype,
            "shape": [*each.shape],
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH)
    return len(text).to_bytes(LENGTH, "little") + text, ordered


def looks_like_safetensors(start: bytes) -> bool:
    """Return whether a file that begins with these bytes has a safetensors header."""
    return len(start) > LENGTH and start[LENGTH : LENGTH + 1] == b"{"


@dataclass(frozen=True)
class PlacedEntry(TensorEntry):
    """A tensor of a safetensors file: `offset` is from the start of the file."""

    offset: int
    nbytes: int


class SafetensorsFile(TensorFile):
    """Random access to the tensors of a safetensors file, read a few MB at a time."""

    container = "safetensors"

    def __init__(self, path: Path, entries: Sequence[PlacedEntry]) -> None:
        super().__init__(path, entries)
        self._places = {entry.name: entry for entry in entries}

    def stored(self, name: str) -> Raw:
        """Return a tensor's elements as they are stored (bf16 as uint16), in its shape."""
        self._require_known(name)
        entry = self._places[name]
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            data = self._whole(file.read(entry.nbytes), entry.nbytes)
        return np.frombuffer(data, STORAGE[entry.dtype]).reshape(entry.shape)

    def chunks(self, name: str) -> Iterator[Raw]:
        """Yield a tensor's stored elements in order, a few MB at a time, flat."""
        self.entry(name)
        entry = self._places[name]
        kind = np.dtype(STORAGE.get(entry.dtype, "|u1"))
        step = CHUNK * kind.itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            for start in range(0, entry.nbytes, step):
                count = min(step, entry.nbytes - start)
                yield np.frombuffer(self._whole(file.read(count), count), kind)

    def write_copy(self, target: Path, values: Mapping[str, Raw]) -> None:
        """Write a copy in which tensors have new values; all other bytes are the same."""
        copy_file(self.path, target)
        pieces = ((self._places[name].offset, new) for name, new in values.items())
        write_at(
            target,
            ((at, np.ascontiguousarray(new).reshape(-1).data.cast("B")) for at, new in pieces),
        )

    def _whole(self, data: bytes, count: int) -> bytes:
        if len(data) != count:
            raise InputError(f"{self.path} became shorter while it was read")
        return data


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read the header of a .safetensors file.

    Raises InputError if the file is truncated or its header is invalid.
    """
    try:
        # The library checks the header: its types, its shapes, gaps and overlaps of tensors.
        with safe_open(path, "np"), path.open("rb") as file:

            def part(start: int, end: int) -> bytes:
                file.seek(start)
                return file.read(end - start)

            header, base = safetensors_header(part, os.fstat(file.fileno()).st_size)
    except (SafetensorError, ValueError) as error:
        raise damaged(path, str(error)) from error
    header.pop("__metadata__", None)
    entries = []
    for name, value in header.items():
        start, end = value["data_offsets"]
        shape = tuple(value["shape"])
        entries.append(PlacedEntry(name, value["dtype"], shape, base + start, end - start))
    return SafetensorsFile(path, entries)
