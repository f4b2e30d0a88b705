"""Where the tensors of a .safetensors file lie: its header, read with every bound checked.

The library's own reader cannot say where a tensor starts and cannot give numpy a bf16
tensor; both are needed to edit one tensor of a copy.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from slsgu_cli.dtypes import itemsize
from slsgu_cli.errors import InputError
from slsgu_cli.tensor_file import TensorEntry, TensorFile

LENGTH = 8
HEADER_LIMIT = 100_000_000


def looks_like_safetensors(start: bytes) -> bool:
    """Return whether a file that begins with these bytes has a safetensors header."""
    return len(start) > LENGTH and start[LENGTH : LENGTH + 1] == b"{"


def open_safetensors(path: Path) -> TensorFile:
    """Read the header of a .safetensors file.

    Raises InputError where the file is cut short or its header cannot be right.
    """
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(LENGTH), "little")
        if total < LENGTH or length > min(HEADER_LIMIT, total - LENGTH):
            raise _damaged(path, "the file ends before its header does")
        text = file.read(length)
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not an object")
    header.pop("__metadata__", None)
    base = LENGTH + length
    entries = [_entry(path, name, value, base) for name, value in header.items()]
    _check_layout(path, entries, base, total)
    return TensorFile(path, entries)


def _entry(path: Path, name: str, value: Any, base: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the header's entry of {name} is malformed") from error
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise _damaged(path, f"the header's entry of {name} is malformed")
    if not all(type(count) is int and count >= 0 for count in [*shape, begin, end]):
        raise _damaged(path, f"the header's entry of {name} has odd figures")
    width = itemsize(dtype)
    nbytes = end - begin
    if nbytes < 0 or (width is not None and math.prod(shape) * width != nbytes):
        raise _damaged(path, f"{name} ({dtype}, shape {shape}) cannot take {nbytes} bytes")
    return TensorEntry(name, dtype, tuple(shape), base + begin, nbytes)


def _check_layout(path: Path, entries: list[TensorEntry], base: int, total: int) -> None:
    """Refuse overlaps, gaps and a wrong end, as the format does."""
    position = base
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            raise _damaged(path, f"{entry.name} does not begin where the tensor before it ends")
        position += entry.nbytes
    if position != total:
        raise _damaged(path, f"its header tells of {position} bytes, the file has {total}")


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged: {why}", hint="fetch or copy the checkpoint again")
