"""Read samples from a webdataset tar shard, as img2dataset writes them.

Consecutive members whose names agree up to the first dot are one sample: an image with a
`.txt` caption, a `.json` of fields and a `.cls` label, all of them optional.
"""

import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import fsspec

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.sets import Origin
from slsgu_cli.sources.rows import (
    CAPTION_FIELDS,
    IMAGE_SUFFIXES,
    LABEL_FIELDS,
    Columns,
    Extent,
    Filters,
    Row,
    Wanted,
    as_text,
    file_identity,
    no_column,
    passes,
)

MEMBER = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")
TEXT_SUFFIXES = frozenset(("txt", "json", "cls"))

# Fields by which a collected sample tells where it comes from.
ORIGIN_FILE, ORIGIN_ROW = "origin_file", "origin_row"
TRUNCATED = "truncated shard"
BROKEN = (tarfile.TarError, EOFError, zlib.error)
Members = dict[str, bytes | None]


class ShardHeader(tarfile.TarInfo):
    """A member's header. A usual file's owner, times and devices are left unread.

    The module spends more on these than on all else: without this it takes half as long
    again to read a shard's captions.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return the header in a block of 512 bytes."""
        usual = _usual_file(buf)
        if usual is None:
            return super().frombuf(buf, encoding, errors)
        name, size = usual
        header = cls(name.decode(encoding, errors))
        header.size = size
        return header

    @classmethod
    def fromtarfile(cls, tar: Any) -> Self:
        """Return the next header, noting where there is neither one nor the end mark."""
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            end_mark = tarfile.EOFHeaderError  # type: ignore[attr-defined]
            tar.broken_off = not isinstance(error, end_mark)
            raise


class Shard(tarfile.TarFile):
    """A tar that knows if it broke off: a header cut short, or none, is the module's end."""

    tarinfo = ShardHeader
    broken_off = False


@dataclass(frozen=True, slots=True)
class Group:
    """The members of one sample by suffix: their headers, and what was read of them."""

    tar: Shard
    index: int
    key: str
    heads: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    members: Members = field(default_factory=dict)

    def read(self, suffix: str) -> bytes | None:
        """Read a member, while the next sample is not reached."""
        content = self.tar.extractfile(self.heads[suffix])
        return content.read() if content else None

    def image(self) -> str | None:
        """Return the suffix of the sample's first image."""
        return next((suffix for suffix in self.members if suffix in IMAGE_SUFFIXES), None)

    def image_bytes(self) -> bytes | None:
        """Return the first image of a sample that has one, reading it if it was not."""
        suffix = self.image()
        if suffix is None:
            return None
        data = self.members[suffix]
        return self.read(suffix) if data is None else data

    def extent(self) -> Extent | None:
        """Return where the bytes of the first image lie in the archive, if in one piece."""
        suffix = self.image()
        head = self.heads[suffix] if suffix else None
        return (head.offset_data, head.size) if head and head.sparse is None else None


@dataclass(frozen=True, slots=True)
class TarSource:
    """Samples of one tar shard, compressed or not."""

    path: str
    columns: Columns
    filters: Filters
    labels_are_captions: bool = False

    def identity(self) -> Any:
        """Return path, size and time of change."""
        return file_identity(self.path)

    def rows(self, trouble: Counter[str]) -> Iterator[Row]:
        """Yield the rows that pass the filters.

        A shard that breaks off is read as far as it goes and counted in `trouble`.
        Raises InputError if the file is no tar, or if no sample has a field to filter by.
        """
        fields_seen: set[str] = set()
        streams = self._streams()
        for group in self._groups(lambda index, suffix: suffix in TEXT_SUFFIXES, trouble):
            row = self._row(group, None if streams else group.extent(), fields_seen)
            if row is not None:
                yield row
        for name in self.filters:
            if fields_seen and name not in fields_seen:
                raise no_column(
                    self.path, f"field {name}", sorted(fields_seen), "correct the filter's name"
                )

    def select(
        self, wants: Callable[[Row], bool], trouble: Counter[str]
    ) -> Iterator[tuple[Row, bytes | None]]:
        """Yield the wanted rows with their encoded images, the shard being read once.

        An image mostly comes before its caption. A local shard is gone back in for it; of
        one that streams, the images of one sample at a time are held.
        """
        streams = self._streams()
        groups = self._groups(
            lambda _, suffix: suffix in TEXT_SUFFIXES or (streams and suffix in IMAGE_SUFFIXES),
            trouble,
        )
        for group in groups:
            row = self._row(group)
            if row is not None and wants(row):
                yield row, group.image_bytes()

    def images(self, wanted: Wanted) -> Iterator[tuple[int, bytes | None]]:
        """Yield the encoded images of the wanted rows; the shard is read where they lie."""
        extents = {index: extent for index, extent in wanted.items() if extent is not None}
        if len(extents) == len(wanted):
            yield from self._at(extents)
            return
        last = max(wanted)
        groups = self._groups(
            lambda index, suffix: suffix in IMAGE_SUFFIXES and index in wanted, Counter()
        )
        for group in groups:
            if group.index in wanted:
                yield group.index, group.image_bytes()
            if group.index >= last:
                return

    def _row(
        self, group: Group, extent: Extent | None = None, fields_seen: set[str] | None = None
    ) -> Row | None:
        """Return the sample's row if it passes the filters; note the fields there are."""
        fields = self._fields(group.key, group.members)
        if fields_seen is not None:
            fields_seen.update(fields)
        if not passes(self.filters, fields):
            return None
        caption, label = as_text(fields["caption"]), as_text(fields["label"])
        origin = _origin(self.path, group.index, fields)
        return Row(group.index, group.key, caption, label, bool(group.image()), origin, extent)

    def _fields(self, key: str, members: Members) -> dict[str, Any]:
        """Return the sample's JSON fields, with its key, caption and label among them."""
        fields = _json(members.get("json"))
        columns = self.columns
        caption = fields.get(columns.caption) if columns.caption else None
        label = fields.get(columns.label) if columns.label else None
        fallback = next((fields[name] for name in CAPTION_FIELDS if fields.get(name)), None)
        usual = next((fields[name] for name in LABEL_FIELDS if name in fields), None)
        fields["caption"] = caption or as_text(members.get("txt")) or fallback
        fields["label"] = next(
            (value for value in (label, as_text(members.get("cls")), usual) if value is not None),
            None,
        )
        return fields | {"key": key}

    def _at(self, extents: Mapping[int, Extent]) -> Iterator[tuple[int, bytes]]:
        """Yield images by their extents, in the order of the rows."""
        with self._file() as file:
            for index, (start, size) in sorted(extents.items()):
                file.seek(start)
                data = file.read(size)
                # Where the shard breaks off there is no more to be had.
                if len(data) < size:
                    return
                yield index, data

    def _groups(self, read: Callable[[int, str], bool], trouble: Counter[str]) -> Iterator[Group]:
        """Yield the shard's samples; `read` says which members to read."""
        started = False
        mode: Any = "r|*" if self._streams() else "r:"
        with self._file() as file:
            try:
                with Shard.open(fileobj=file, mode=mode) as tar:
                    started = True
                    yield from _grouped(tar, read)
            except BROKEN as error:
                if not started and "empty" not in str(error):
                    raise InputError(
                        f"{self.path} cannot be read as a tar shard: {error}",
                        hint="the file is damaged or no tar; fetch it again",
                    ) from error
                trouble[TRUNCATED] += 1

    @contextmanager
    def _file(self) -> Iterator[Any]:
        try:
            with fsspec.open(self.path, "rb") as file:
                yield file
        except FileNotFoundError as error:
            raise MissingError(f"there is no {self.path}") from error
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error}") from error

    def _streams(self) -> bool:
        """Return whether image bytes cannot be skipped: only those of a plain local file can."""
        fs, _ = fsspec.core.url_to_fs(self.path)
        return "file" not in fs.protocol or not self.path.endswith(".tar")


def _grouped(tar: Shard, read: Callable[[int, str], bool]) -> Iterator[Group]:
    group = Group(tar, -1, "")
    while (member := tar.next()) is not None:
        # The module remembers every member it has met; a stream must not.
        tar.members.clear()  # type: ignore[attr-defined]
        match = MEMBER.match(member.name)
        if match is None or not member.isfile():
            continue
        key, suffix = match[1], match[2].lower()
        # A key met twice in a row is two samples; none of them may swallow the other.
        if key != group.key or suffix in group.members:
            if group.index >= 0:
                yield group
            group = Group(tar, group.index + 1, key)
        group.heads[suffix] = member
        group.members[suffix] = group.read(suffix) if read(group.index, suffix) else None
    if group.index >= 0:
        yield group
    if tar.broken_off:
        raise tarfile.ReadError("it breaks off")


def _usual_file(header: bytes | bytearray) -> tuple[bytes, int] | None:
    """Return name and size of a regular file whose path is in one field; None for all else."""
    if len(header) != tarfile.BLOCKSIZE or header[156:157] != tarfile.REGTYPE or header[345]:
        return None
    name, size, checksum = header[:100], header[124:136], header[148:156]
    try:
        # The sum is taken with the checksum's own eight bytes as spaces.
        if sum(header) - sum(checksum) + 8 * ord(" ") != int(checksum.split(b"\0", 1)[0], 8):
            return None
        return bytes(name.split(b"\0", 1)[0]), int(size.split(b"\0", 1)[0], 8)
    except ValueError:
        return None


def _origin(path: str, index: int, fields: dict[str, Any]) -> Origin | None:
    """Return where a sample was downloaded or taken from, as its fields tell it."""
    url, file, row = (fields.get(name) for name in ("url", ORIGIN_FILE, ORIGIN_ROW))
    if isinstance(file, str) and isinstance(row, int):
        return Origin(file, row, as_text(url))
    return Origin(path, index, as_text(url)) if url else None


def _json(data: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(data) if data else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
