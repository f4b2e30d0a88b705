"""The safetensors format, read and written."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from slsgu_cli.checkpoints.number_formats import CHUNK, STORAGE, Raw
from slsgu_cli.checkpoints.tensor_file import TensorEntry, TensorFile, damaged
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
    def itemsize(self) -> int:
        """Return the bytes that one element takes."""
        return np.dtype(STORAGE[self.dtype]).itemsize


def write_safetensors(path: Path, tensors: Iterable[NewTensor], *, holes: bool = False) -> None:
    """Write a new .safetensors file, one tensor after another.

    With `holes` only the header is written, and the file has the same size.
    """
    # Wide elements come first, for alignment.
    ordered = sorted(tensors, key=lambda each: (-each.itemsize, each.name))
    # Without this, transformers does not load it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in ordered:
        start, end = end, end + math.prod(each.shape) * each.itemsize
        header[each.name] = {
            "dtype": each.dtype,
            "shape": [*each.shape],
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(LENGTH, "little") + text)
        for each in [] if holes else ordered:
            file.write(_bytes(each.values()))
        file.truncate(LENGTH + len(text) + end)


class SafetensorsFile(TensorFile):
    """Random access to the tensors of a safetensors file, read a few MB at a time.

    `spans` are the first byte of each tensor and the byte behind it.
    """

    container = "safetensors"

    def __init__(
        self, path: Path, entries: Mapping[str, TensorEntry], spans: Mapping[str, tuple[int, int]]
    ) -> None:
        super().__init__(path, entries)
        self.spans = spans

    def _stored(self, name: str) -> Raw:
        entry, (start, end) = self.entries[name], self.spans[name]
        kind = np.dtype(STORAGE[entry.dtype])
        flat = np.fromfile(self.path, kind, (end - start) // kind.itemsize, offset=start)
        return flat.reshape(entry.shape)

    def chunks(self, name: str) -> Iterator[Raw]:
        """Yield a tensor's stored elements in order, a few MB at a time, flat."""
        kind = np.dtype(STORAGE.get(self.entries[name].dtype, "|u1"))
        step = CHUNK * kind.itemsize
        start, end = self.spans[name]
        for at in range(start, end, step):
            yield np.fromfile(self.path, kind, min(step, end - at) // kind.itemsize, offset=at)

    def write_copy(self, target: Path, values: Mapping[str, Raw]) -> None:
        """Write a copy in which tensors have new values; all other bytes are the same."""
        copy_file(self.path, target)
        pieces = ((self.spans[name][0], _bytes(new)) for name, new in values.items())
        write_at(target, pieces)


def _bytes(values: Raw) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).data.cast("B")


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
    entries = {name: TensorEntry(v["dtype"], tuple(v["shape"])) for name, v in header.items()}
    offsets = ((name, value["data_offsets"]) for name, value in header.items())
    return SafetensorsFile(
        path, entries, {name: (base + start, base + end) for name, (start, end) in offsets}
    )
