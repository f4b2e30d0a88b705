"""PyTorch's zip archives, read and spliced without PyTorch; their pickle is run by nobody.

TorchScript, as OpenAI's own files, has the same records beside its code.
"""

import io
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from slsgu_cli.checkpoints.tensor_file import (
    CHUNK,
    CONVERT_HINT,
    Raw,
    Splice,
    TensorEntry,
    TensorFile,
    damaged,
    itemsize,
)
from slsgu_cli.errors import InputError

# What storage classes, and number formats that have none, are called in a tensor's entry.
FORMATS = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "UntypedStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}

# Tensors of OpenAI's TorchScript models that are settings, not weights.
ATTRIBUTES = ("attn_mask", "input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True, slots=True)
class PickleKind:
    """A storage class or a number format that the pickle names."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of the archive: its record's key and the bytes it should have."""

    key: str
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor over a storage; `start` and `strides` are in elements."""

    storage: Storage
    dtype: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Inert:
    """Stands in for an object that is not a tensor; keeps nothing, does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take and forget any arguments."""

    def __setstate__(self, state: Any) -> None:
        """Forget a state."""

    def append(self, *_: Any) -> None:
        """Forget an item."""

    add = extend = __setitem__ = append


class Script(Inert):
    """Stands in for a module of TorchScript, whose state has its tensors and parts by name."""

    state: Any = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        """Take a state."""
        self.state = state

    def state_dict(self) -> dict[str, PickledTensor]:
        """Return its tensors and those of its parts, each part once, by dotted names."""
        tensors: dict[str, PickledTensor] = {}
        seen, waiting = {id(self)}, [("", self)]
        while waiting:
            prefix, part = waiting.pop()
            for name, value in part.state.items():
                if isinstance(value, PickledTensor) and name not in ATTRIBUTES:
                    tensors[f"{prefix}{name}"] = value
                elif isinstance(value, Script) and id(value) not in seen:
                    seen.add(id(value))
                    waiting.append((f"{prefix}{name}.", value))
        return tensors


class _Reader(pickle._Unpickler):
    """Unpickles to stand-ins.

    The unpickler written in Python is used because the one in C lets a few bytes of a
    pickle ask for gigabytes of memory.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.tensors: list[PickledTensor] = []

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name, whatever it is."""
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils":
            known = {
                "_rebuild_tensor_v2": self._tensor,
                "_rebuild_tensor_v3": self._typed_tensor,
                "_rebuild_parameter": _parameter,
                "_rebuild_parameter_with_state": _parameter,
            }
            return known.get(name, Inert)
        if module in ("torch", "torch.storage") and name in FORMATS:
            return PickleKind(FORMATS[name])
        return Script if module.startswith("__torch__") else Inert

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage a persistent id describes."""
        tag, kind, key, _, count = pid
        if tag != "storage" or not isinstance(kind, PickleKind) or not _is_count(count):
            raise ValueError("a persistent id that is not a storage")
        return Storage(str(key), kind.dtype, count * (itemsize(kind.dtype) or 1))

    def _tensor(self, storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> PickledTensor:
        return self._typed_tensor(storage, start, shape, strides, False, None, None)

    def _typed_tensor(
        self, storage: Any, start: Any, shape: Any, strides: Any, *rest: Any
    ) -> PickledTensor:
        kind = rest[2]
        if not isinstance(storage, Storage) or not _is_count(start):
            raise ValueError("a tensor without a storage")
        shape, strides = tuple(shape), tuple(strides)
        if len(shape) != len(strides) or not all(map(_is_count, shape + strides)):
            raise ValueError("a tensor without a proper shape")
        dtype = kind.dtype if isinstance(kind, PickleKind) else storage.dtype
        tensor = PickledTensor(storage, dtype, start, shape, strides)
        self.tensors.append(tensor)
        return tensor


def read_pickle(path: Path, data: bytes) -> tuple[dict[str, PickledTensor], list[PickledTensor]]:
    """Return the tensors of the state dict by name, and the others of the pickle.

    Raises InputError where the pickle is broken or its tensors are not a state dict;
    a pickle of no tensors at all (training arguments, say) has none to offer.
    """
    reader = _Reader(data)
    try:
        content = reader.load()
        if isinstance(content, Script):
            content = content.state_dict()
    except Exception as error:
        # A damaged pickle may fail in any way at all.
        why = f"its pickle cannot be read ({type(error).__name__}: {error})"
        raise damaged(path, why) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    items = state.items() if isinstance(state, dict) else ()
    named = {key: value for key, value in items if isinstance(value, PickledTensor)}
    if not reader.tensors:
        return {}, []
    if not named or not all(isinstance(key, str) for key in named):
        raise InputError(f"{path} holds no state dict of named tensors", hint=CONVERT_HINT)
    known = {id(tensor) for tensor in named.values()}
    return named, [tensor for tensor in reader.tensors if id(tensor) not in known]


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


# A zip file begins with the header of its first record.
ZIP_START, LOCAL_SIZE, LOCAL_CRC = b"PK\x03\x04", 30, 14
DIRECTORY, DIRECTORY_SIZE, DIRECTORY_CRC = b"PK\x01\x02", 46, 16
STORAGE_RECORD = "data/"
# What TorchScript has beside its tensors, which may be compressed.
CODE = re.compile(r"^([^/]+/)?code/")
DESCRIPTOR = b"PK\x07\x08"
HAS_DESCRIPTOR = 0x08
BAD_ARCHIVE = (zipfile.BadZipFile, struct.error, ValueError, OverflowError, RuntimeError, EOFError)


@dataclass(frozen=True, slots=True)
class Record:
    """One stored entry of the archive: its bytes, its CRC-32 and where that stands."""

    info: zipfile.ZipInfo
    start: int
    directory: int

    @property
    def end(self) -> int:
        """Return the offset behind the record's last byte."""
        return self.start + self.info.file_size


class TorchFile(TensorFile):
    """Random access to the tensors of a torch archive.

    `unnamed` are tensors outside the state dict (an optimizer's, say): they are not
    offered, but an edit must not reach them through a shared storage.
    """

    container = "torch"

    def __init__(
        self,
        path: Path,
        entries: list[TensorEntry],
        unnamed: list[TensorEntry],
        records: list[Record],
        *,
        is_script: bool,
    ) -> None:
        super().__init__(path, entries)
        self._all = [*entries, *unnamed]
        self._records = records
        self.is_script = is_script

    def splices(self, patches: Mapping[str, Raw]) -> list[Splice]:
        """Return what to write into a copy, the records' checksums included."""
        for name in patches:
            self._refuse_shared(self.entry(name))
        changed = super().splices(patches)
        fixes = [fix for record in self._records for fix in self._fixes(record, changed)]
        return changed + fixes

    def _refuse_shared(self, entry: TensorEntry) -> None:
        for other in self._all:
            if other is not entry and other.overlaps(entry):
                raise InputError(
                    f"{entry.name} shares its bytes with {other.name} in {self.path}, "
                    "so one cannot change without the other",
                    hint=CONVERT_HINT,
                )
        reach = 0
        for stride, count in sorted(zip(entry.strides or (), entry.shape, strict=False)):
            if count > 1 and stride <= reach:
                raise InputError(
                    f"{entry.name} in {self.path} repeats its own elements", hint=CONVERT_HINT
                )
            reach += stride * (count - 1)

    def _fixes(self, record: Record, changed: list[Splice]) -> list[Splice]:
        inside = [s for s in changed if record.start <= s.offset < record.end]
        if not inside:
            return []
        before, after = self._checksums(record, inside)
        if before != record.info.CRC:
            if record.info.CRC == 0:
                return []  # written with torch's checksums switched off: they stay off
            raise damaged(self.path, f"the checksum of {record.info.filename} is wrong")
        data = struct.pack("<I", after)
        return [Splice(offset, data) for offset in self._checksum_offsets(record)]

    def _checksums(self, record: Record, inside: list[Splice]) -> tuple[int, int]:
        """Return the record's CRC-32 as it is and as it will be."""
        before = after = 0
        for start in range(record.start, record.end, CHUNK):
            data = self._bytes(start, min(CHUNK, record.end - start))
            before = zlib.crc32(data, before)
            new = bytearray(data)
            for splice in inside:
                low = max(splice.offset, start)
                high = min(splice.offset + len(splice.data), start + len(data))
                if low < high:
                    part = splice.data[low - splice.offset : high - splice.offset]
                    new[low - start : high - start] = part
            after = zlib.crc32(new, after)
        return before, after

    def _checksum_offsets(self, record: Record) -> list[int]:
        places = [record.directory + DIRECTORY_CRC]
        if record.info.flag_bits & HAS_DESCRIPTOR:
            signed = self._bytes(record.end, 4) == DESCRIPTOR
            places.append(record.end + (4 if signed else 0))
        else:
            places.append(record.info.header_offset + LOCAL_CRC)
        stated = struct.pack("<I", record.info.CRC)
        if any(self._bytes(place, 4) != stated for place in places):
            raise InputError(f"{self.path} is damaged: {record.info.filename} has two checksums")
        return places


def open_torch(path: Path) -> TorchFile:
    """Read where the tensors of a torch archive lie.

    Raises InputError for damaged files and foreign zip files.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            folder = _folder(path, archive)
            located = {r.info.filename.removeprefix(folder): r for r in _records(path, archive)}
    except InputError:
        raise
    except BAD_ARCHIVE as error:
        raise damaged(path, str(error)) from error
    if "byteorder" in located and _content(path, located["byteorder"]) != b"little":
        raise InputError(f"{path} is in big-endian byte order", hint=CONVERT_HINT)
    named, others = read_pickle(path, _content(path, located["data.pkl"]))
    entries = [_entry(path, name, tensor, located) for name, tensor in named.items()]
    outside = "a tensor outside the state dict"
    unnamed = [_entry(path, outside, tensor, located) for tensor in others]
    records = list(located.values())
    return TorchFile(path, entries, unnamed, records, is_script="constants.pkl" in located)


def _folder(path: Path, archive: zipfile.ZipFile) -> str:
    names = archive.namelist()
    if len(set(names)) != len(names):
        raise damaged(path, "two records have the same name")
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl")]
    if len(roots) != 1:
        raise InputError(f"{path} is a zip file, but not one that torch.save wrote")
    return roots[0]


def _records(path: Path, archive: zipfile.ZipFile) -> list[Record]:
    """Locate every record's bytes and its place in the central directory."""
    records = []
    position, total = archive.start_dir, path.stat().st_size
    with path.open("rb") as file:
        for info in archive.infolist():
            is_code = CODE.search(info.filename) is not None
            if info.compress_type != zipfile.ZIP_STORED and not is_code:
                raise InputError(f"{path} is a compressed archive", hint=CONVERT_HINT)
            file.seek(info.header_offset)
            local = file.read(LOCAL_SIZE)
            file.seek(position)
            listed = file.read(DIRECTORY_SIZE)
            if local[:4] != ZIP_START or listed[:4] != DIRECTORY:
                raise damaged(path, f"{info.filename} is not where the archive says")
            start = info.header_offset + LOCAL_SIZE + sum(struct.unpack_from("<2H", local, 26))
            if not is_code:
                if info.file_size != info.compress_size or start + info.file_size > total:
                    raise damaged(path, f"{info.filename} is cut short")
                records.append(Record(info, start, position))
            position += DIRECTORY_SIZE + sum(struct.unpack_from("<3H", listed, 28))
    return records


def _content(path: Path, record: Record) -> bytes:
    """Return a small record. zipfile would refuse archives written without checksums."""
    with path.open("rb") as file:
        file.seek(record.start)
        data = file.read(record.info.file_size)
    if record.info.CRC and zlib.crc32(data) != record.info.CRC:
        raise damaged(path, f"the checksum of {record.info.filename} is wrong")
    return data


def _entry(
    path: Path, name: str, tensor: PickledTensor, records: Mapping[str, Record]
) -> TensorEntry:
    record = records.get(f"{STORAGE_RECORD}{tensor.storage.key}")
    if record is None:
        raise damaged(path, f"the bytes of {name} are missing")
    width = itemsize(tensor.dtype) or 1
    empty = 0 in tensor.shape
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    nbytes = 0 if empty else (last + 1) * width
    offset = tensor.start * width
    if max(offset + nbytes, tensor.storage.nbytes) > record.info.file_size and not empty:
        raise damaged(path, f"{name} reaches beyond its bytes")
    strides = None if empty or _in_order(tensor) else tensor.strides
    return TensorEntry(name, tensor.dtype, tensor.shape, record.start + offset, nbytes, strides)


def _in_order(tensor: PickledTensor) -> bool:
    expected = 1
    for count, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if count != 1 and stride != expected:
            return False
        expected *= count
    return True
