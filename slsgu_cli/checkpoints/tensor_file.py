"""Tensors at known offsets of a file, their number formats and digests; the safetensors format."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slsgu_cli.errors import InputError, near_names
from slsgu_cli.store.files import LENGTH, copy_file, safetensors_header, write_at

Floats = npt.NDArray[np.floating[Any]]
Raw = npt.NDArray[Any]
STORAGE: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|u1",
    "F8_E4M3": "|u1",
    "F8_E5M2": "|u1",
    "C64": "<c8",
    "C128": "<c16",
}
FLOATS = ("F64", "F32", "F16", "BF16")
PRECISION = {"F64": "fp32", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
DIGEST_PRECISIONS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
CHUNK = 1 << 20
BFLOAT16_QUIET = np.uint32(0x0040_0000)


def itemsize(dtype: str) -> int | None:
    """Return the bytes one element takes, None for a format this module does not know."""
    return np.dtype(STORAGE[dtype]).itemsize if dtype in STORAGE else None


def widen(stored: Raw, dtype: str) -> Floats:
    """Return stored elements as fp32 (fp64 for F64), exactly; the shape is kept."""
    if dtype == "BF16":
        # asarray: numpy makes a scalar of a shift of a 0-dimensional array.
        wide: Floats = np.asarray(stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide
    return stored.astype(np.float64 if dtype == "F64" else np.float32, copy=False)


def narrow(values: Floats, dtype: str) -> Raw:
    """Return values as the elements a tensor of `dtype` stores, rounded to nearest even.

    Too large values become infinities and NaN stays NaN.
    """
    if dtype == "BF16":
        return _bfloat16(values)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(STORAGE[dtype], copy=False)


def rounded(values: Floats, dtype: str) -> Floats:
    """Return the values a tensor of `dtype` would hold, as fp32 (fp64 for F64)."""
    return widen(narrow(values, dtype), dtype)


def _bfloat16(values: Floats) -> Raw:
    bits = _to_odd(values).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    up = (bits + (np.uint32(0x7FFF) + even)) >> np.uint32(16)
    # A NaN whose payload lies in the lower half would round to infinity.
    quiet = (bits | BFLOAT16_QUIET) >> np.uint32(16)
    return np.where(np.isnan(values), quiet, up).astype("<u2")


def _to_odd(values: Floats) -> npt.NDArray[np.float32]:
    """Return fp64 as fp32 rounded to odd, after which a second rounding acts as the first."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        near = values.astype(np.float32)
    if values.dtype == np.float32:
        return near
    exact = values.astype(np.float64, copy=False)
    back = near.astype(np.float64)
    inexact = (back != exact) & ~np.isnan(exact)
    bits = near.view(np.uint32)
    toward_zero = bits - (inexact & (np.abs(back) > np.abs(exact))).astype(np.uint32)
    odd: npt.NDArray[np.float32] = (toward_zero | inexact.astype(np.uint32)).view(np.float32)
    return odd


def layer_digests(values: Floats) -> dict[str, str]:
    """Return digests of a layer's values as they are in fp32, rounded to fp16, to bf16.

    Equal digests under `fp32` and `fp16` mean that the values are all fp16 numbers.
    """
    return {precision: layer_digest(values, precision) for precision in DIGEST_PRECISIONS}


def layer_digest(values: Floats, precision: str) -> str:
    """Return the digest of values rounded to `precision`: fp32, fp16 or bf16."""
    flat, dtype = values.reshape(-1), DIGEST_PRECISIONS[precision]
    parts = (flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK))
    singles = (part.astype(np.float32, copy=False) for part in parts)
    return values_digest((narrow(single, dtype) for single in singles), dtype)


def values_digest(chunks: Iterable[Raw], dtype: str) -> str:
    """Return the digest of stored elements that stand in the number format `dtype`."""
    value = hashlib.sha256()
    if dtype not in FLOATS:
        value.update(f"{dtype} ".encode())
    for chunk in chunks:
        wide = widen(chunk, dtype).astype("<f4", copy=False) if dtype in FLOATS else chunk
        value.update(np.ascontiguousarray(wide).data)
    return value.hexdigest()


# What torch.compile puts before every name, and training in several processes.
COMPILED = "_orig_mod."
TRAINING_PREFIXES = ("module.", COMPILED)
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


def copy_spliced(source: Path, target: Path, splices: Iterable[Splice]) -> None:
    """Copy a file to a new place and overwrite the spliced bytes in the copy."""
    copy_file(source, target)
    write_at(target, ((splice.offset, splice.data) for splice in splices))


class TensorFile:
    """Random access to the tensors of one checkpoint file.

    `is_script` tells TorchScript, which has a model's code beside its weights.
    """

    container = "safetensors"
    is_script = False

    def __init__(self, path: Path, entries: list[TensorEntry]) -> None:
        self.path = path
        self._entries = {entry.name: entry for entry in entries}

    def names(self) -> list[str]:
        """Return the file's own tensor names, in the file's order."""
        return list(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Return where the tensor the file calls `name` lies. Raises InputError."""
        if name not in self._entries:
            near = near_names(name, [*map(canonical_name, self._entries)])
            raise InputError(f"{self.path} holds no {name}{near}")
        return self._entries[name]

    def resolve_name(self, name: str) -> str:
        """Return the file's own name of the parameter open_clip calls `name`.

        Training checkpoints have prefixes before every name; models with a text tower of
        their own (`text.`) also load from files of models without. Raises InputError.
        """
        plain = {canonical_name(stored): stored for stored in self._entries}
        if name in plain:
            return plain[name]
        older = name.removeprefix(TEXT_PREFIX)
        if older in plain and "positional_embedding" in plain:
            return plain[older]
        hint = None
        if any(key.startswith(("text_model.", "vision_model.")) for key in plain):
            hint = "this file has the names of transformers: name it with --target"
        raise InputError(f"{self.path} holds no layer {name}{near_names(name, plain)}", hint=hint)

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
                count = min(step, entry.nbytes - start)
                yield np.frombuffer(self._whole(file.read(count), count), kind)

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
    """Write a new .safetensors file, one tensor after another; with `holes` its header alone.

    It has the same size then.
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
    """Return how a file begins, and its tensors in order: wide elements first are aligned."""
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


def canonical_name(name: str) -> str:
    """Return a tensor's name without the prefixes of training checkpoints."""
    while name.startswith(TRAINING_PREFIXES):
        name = name.partition(".")[2]
    return name


def strided(flat: Any, entry: TensorEntry) -> Raw:
    """Return the span `flat` of a tensor's elements in its shape."""
    if entry.strides is None:
        return np.asarray(flat).reshape(entry.shape)
    steps = tuple(stride * flat.itemsize for stride in entry.strides)
    return np.lib.stride_tricks.as_strided(flat, entry.shape, steps)


def looks_like_safetensors(start: bytes) -> bool:
    """Return whether a file that begins with these bytes has a safetensors header."""
    return len(start) > LENGTH and start[LENGTH : LENGTH + 1] == b"{"


def open_safetensors(path: Path) -> TensorFile:
    """Read the header of a .safetensors file.

    Raises InputError where the file is cut short or its header cannot be right.
    """
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size

        def part(start: int, end: int) -> bytes:
            file.seek(start)
            return file.read(end - start)

        try:
            header, base = safetensors_header(part, total)
        except ValueError as error:
            raise damaged(path, str(error)) from error
    header.pop("__metadata__", None)
    entries = [_entry(path, name, value, base) for name, value in header.items()]
    _check_layout(path, entries, base, total)
    return TensorFile(path, entries)


def _entry(path: Path, name: str, value: Any, base: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"the header's entry of {name} is malformed") from error
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise damaged(path, f"the header's entry of {name} is malformed")
    if not all(type(count) is int and count >= 0 for count in [*shape, begin, end]):
        raise damaged(path, f"the header's entry of {name} has odd figures")
    width = itemsize(dtype)
    nbytes = end - begin
    if nbytes < 0 or (width is not None and math.prod(shape) * width != nbytes):
        raise damaged(path, f"{name} ({dtype}, shape {shape}) cannot take {nbytes} bytes")
    return TensorEntry(name, dtype, tuple(shape), base + begin, nbytes)


def _check_layout(path: Path, entries: list[TensorEntry], base: int, total: int) -> None:
    """Refuse overlaps, gaps and a wrong end, as the format does."""
    position = base
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            raise damaged(path, f"{entry.name} does not begin where the tensor before it ends")
        position += entry.nbytes
    if position != total:
        raise damaged(path, f"its header tells of {position} bytes, the file has {total}")


def damaged(path: Path, why: str) -> InputError:
    """Return the error of a file that is not whole."""
    return InputError(f"{path} is damaged: {why}", hint="fetch or copy the checkpoint again")
