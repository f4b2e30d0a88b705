"""A torch archive (.pt, .bin, .pth) as tensors at known offsets, without torch.

torch.save writes an uncompressed zip: a pickle that describes the tensors, and one record
of raw bytes for each storage. A tensor's bytes can thus be changed where they lie, and
with them the record's CRC-32: in its local header or the descriptor behind it, and in the
central directory.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slsgu_cli.dtypes import Raw, itemsize
from slsgu_cli.errors import InputError
from slsgu_cli.tensor_file import CHUNK, CONVERT_HINT, Splice, TensorEntry, TensorFile
from slsgu_cli.torch_pickle import PickledTensor, read_pickle

LOCAL, LOCAL_SIZE, LOCAL_CRC = b"PK\x03\x04", 30, 14
DIRECTORY, DIRECTORY_SIZE, DIRECTORY_CRC = b"PK\x01\x02", 46, 16
STORAGES = "data/"
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
    ) -> None:
        super().__init__(path, entries)
        self._all = [*entries, *unnamed]
        self._records = records

    def splices(self, patches: Mapping[str, Raw]) -> list[Splice]:
        """Return what to write into a copy, the records' checksums included."""
        for name in patches:
            self._refuse_shared(self.entry(name))
        changed = super().splices(patches)
        return [
            *changed,
            *(fix for record in self._records for fix in self._fixes(record, changed)),
        ]

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
        stated = record.info.CRC
        if before != stated:
            if stated == 0:
                return []  # written with torch's checksums switched off: they stay off
            raise InputError(
                f"{self.path} is damaged: the checksum of {record.info.filename} is wrong",
                hint="fetch or copy the checkpoint again",
            )
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
                    new[low - start : high - start] = splice.data[
                        low - splice.offset : high - splice.offset
                    ]
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

    Raises InputError for damaged files, TorchScript archives and foreign zip files.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            folder = _folder(path, archive)
            located = {r.info.filename.removeprefix(folder): r for r in _records(path, archive)}
    except InputError:
        raise
    except BAD_ARCHIVE as error:
        raise _damaged(path, str(error)) from error
    if "byteorder" in located and _content(path, located["byteorder"]) != b"little":
        raise InputError(f"{path} is in big-endian byte order", hint=CONVERT_HINT)
    named, tensors = read_pickle(path, _content(path, located["data.pkl"]))
    records = {
        name.removeprefix(STORAGES): record
        for name, record in located.items()
        if name.startswith(STORAGES)
    }
    entries = [_entry(path, name, tensor, records) for name, tensor in named.items()]
    known = {id(tensor) for tensor in named.values()}
    unnamed = [
        _entry(path, "a tensor outside the state dict", tensor, records)
        for tensor in tensors
        if id(tensor) not in known
    ]
    return TorchFile(path, entries, unnamed, list(records.values()))


def _folder(path: Path, archive: zipfile.ZipFile) -> str:
    names = archive.namelist()
    if len(set(names)) != len(names):
        raise _damaged(path, "two records have the same name")
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl")]
    if len(roots) != 1:
        raise InputError(f"{path} is a zip file, but not one that torch.save wrote")
    root = roots[0]
    if f"{root}constants.pkl" in names or any(name.startswith(f"{root}code/") for name in names):
        raise InputError(f"{path} is a TorchScript archive, not a state dict", hint=CONVERT_HINT)
    return root


def _records(path: Path, archive: zipfile.ZipFile) -> list[Record]:
    """Locate every record's bytes and its place in the central directory."""
    records = []
    position = archive.start_dir
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise InputError(f"{path} is a compressed archive", hint=CONVERT_HINT)
            file.seek(info.header_offset)
            local = file.read(LOCAL_SIZE)
            file.seek(position)
            listed = file.read(DIRECTORY_SIZE)
            if local[:4] != LOCAL or listed[:4] != DIRECTORY:
                raise _damaged(path, f"{info.filename} is not where the archive says")
            start = info.header_offset + LOCAL_SIZE + sum(struct.unpack_from("<2H", local, 26))
            if info.file_size != info.compress_size or start + info.file_size > total:
                raise _damaged(path, f"{info.filename} is cut short")
            records.append(Record(info, start, position))
            position += DIRECTORY_SIZE + sum(struct.unpack_from("<3H", listed, 28))
    return records


def _content(path: Path, record: Record) -> bytes:
    """Return a small record. zipfile would refuse archives written without checksums."""
    with path.open("rb") as file:
        file.seek(record.start)
        data = file.read(record.info.file_size)
    if record.info.CRC and zlib.crc32(data) != record.info.CRC:
        raise _damaged(path, f"the checksum of {record.info.filename} is wrong")
    return data


def _entry(
    path: Path, name: str, tensor: PickledTensor, records: Mapping[str, Record]
) -> TensorEntry:
    storage = tensor.storage
    record = records.get(storage.key)
    if record is None:
        raise _damaged(path, f"the bytes of {name} are missing")
    width = itemsize(tensor.dtype) or 1
    empty = 0 in tensor.shape
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    nbytes = 0 if empty else (last + 1) * width
    offset = tensor.start * width
    if max(offset + nbytes, storage.nbytes) > record.info.file_size and not empty:
        raise _damaged(path, f"{name} reaches beyond its bytes")
    strides = None if empty or _in_order(tensor) else tensor.strides
    return TensorEntry(name, tensor.dtype, tensor.shape, record.start + offset, nbytes, strides)


def _in_order(tensor: PickledTensor) -> bool:
    expected = 1
    for count, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if count != 1 and stride != expected:
            return False
        expected *= count
    return True


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged: {why}", hint="fetch or copy the checkpoint again")
