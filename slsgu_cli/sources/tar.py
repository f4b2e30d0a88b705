"""Read samples from a webdataset tar shard, as img2dataset writes them.

Consecutive members whose names agree up to the first dot are one sample: an image with a
`.txt` caption, a `.json` of fields and a `.cls` label, all of them optional. A tar within
the tar, as in ImageNet's train set, is a folder of samples whose label is its name.

Shards come from strangers. What one member, header or compressed byte may cost is bounded:
beyond that a sample is counted and left out, or a shard ends there.
"""

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import fsspec

from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import TooDeepError, parse_json
from slsgu_cli.records.sets import Origin
from slsgu_cli.sources.rows import (
    BOMB,
    CAPTION_FIELDS,
    IMAGE_LIMIT,
    IMAGE_SUFFIXES,
    LABEL_FIELDS,
    TEXT_LIMIT,
    TOO_LARGE,
    Columns,
    Extent,
    Filters,
    Held,
    Passing,
    Reader,
    Row,
    Selected,
    Sieve,
    Wanted,
    as_text,
    file_identity,
    no_column,
    opened,
    passes,
)

MEMBER = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")
TEXT_SUFFIXES = frozenset(("txt", "json", "cls"))

# Fields by which a collected sample tells where it comes from.
ORIGIN_FILE, ORIGIN_ROW = "origin_file", "origin_row"
TRUNCATED = "truncated shard"
Members = dict[str, bytes | None]

# The most bytes that a sample's JSON may have, and a member's name.
JSON_LIMIT, NAME_LIMIT = 1 << 20, 1 << 12
SPARSE, DEEP = "sparse file", "JSON nested too deeply"
LIMITS = {**dict.fromkeys(IMAGE_SUFFIXES, IMAGE_LIMIT), **dict.fromkeys(TEXT_SUFFIXES, TEXT_LIMIT)}
LIMITS["json"] = JSON_LIMIT
# Members of a sample, and fields to name where a filter has none of them.
MEMBERS, FIELDS = 256, 1024

# What a compressed shard may unpack to: so much, or so many times what was read of it.
ROOM, INFLATION = 1 << 28, 100
# The module says it with an OSError, as a file that cannot be read does.
BZ2_DAMAGE = "Invalid data stream"

# The most bytes of a header that goes before another one, and entries for all members.
HEADER_LIMIT, ENTRIES = 1 << 16, 1024
FARTHEST = 1 << 60
BEFORE_OTHERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class Bomb(tarfile.ReadError):
    """A shard that unpacks to far more than it is."""


class Unpacked:
    """The bytes of a file in their order, unpacked as they are read. Raises ReadError."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._start = file.read(10)
        self._consumed, self._unpacked = 0, 0
        unpacker = self._opened(self._start)
        self._read = self.packed if unpacker is None else unpacker.read1

    def _opened(self, start: bytes) -> Any:
        """Return what unpacks a file that begins so; None where it is not compressed."""
        source: Any = _Packed(self.packed)
        if start.startswith(b"\x1f\x8b\x08"):
            return gzip.GzipFile(fileobj=source, mode="rb")
        if start.startswith(b"BZh") and start[4:] == b"1AY&SY":
            return bz2.BZ2File(source)
        if start.startswith((b"\xfd7zXZ\0", b"]\0\0\x80")):
            return lzma.LZMAFile(source)
        return None

    def packed(self, size: int) -> bytes:
        """Return the next bytes of the file itself."""
        data, self._start = self._start[:size], self._start[size:]
        data = data or self._file.read(size)
        self._consumed += len(data)
        return bytes(data)

    def read(self, size: int) -> bytes:
        """Return at most `size` of the next bytes; none at the end."""
        try:
            data = self._read(size)
        except OSError as error:
            if str(error) != BZ2_DAMAGE:
                raise
            raise tarfile.ReadError("invalid compressed data") from error
        self._unpacked += len(data)
        if self._unpacked > max(ROOM, INFLATION * self._consumed):
            raise Bomb(f"it unpacks to more than {INFLATION} times its size")
        return bytes(data)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A file that can only be read on: what the modules that unpack take."""

    read: Callable[[int], bytes]


class ShardHeader(tarfile.TarInfo):
    """A member's header. A usual file's owner, times and devices are left unread.

    The module spends more on these than on all else: without this it takes half as long
    again to read a shard's captions. Where the pieces of a sparse member lie is not read
    either, for such a member is not used.
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
            member = super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            end_mark = tarfile.EOFHeaderError  # type: ignore[attr-defined]
            tar.broken_off = not isinstance(error, end_mark)
            raise
        except (ValueError, IndexError, RecursionError) as error:
            # The module reads headers before headers by recursion, and trusts their figures.
            raise tarfile.ReadError("a header cannot be right") from error
        # A size below zero would lead back, and round for ever.
        if not member.offset_data <= tar.offset <= FARTHEST or len(tar.pax_headers) > ENTRIES:
            raise tarfile.ReadError("a header cannot be right")
        return member

    def _proc_member(self, tar: Any) -> Any:
        """Process a header by its type, one before others only if it is of a usual size."""
        if self.type in BEFORE_OTHERS and not 0 <= self.size <= HEADER_LIMIT:
            raise tarfile.ReadError("a header is too long")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _proc_sparse(self, tar: Any) -> Any:
        """Pass over what tells where the pieces of a sparse member lie."""
        _, more, _ = self._sparse_structs  # type: ignore[attr-defined]
        for _ in range(HEADER_LIMIT // tarfile.BLOCKSIZE):
            if not more:
                self.sparse = []  # type: ignore[assignment]
                return self._proc_builtin(tar)  # type: ignore[attr-defined]
            block = tar.fileobj.read(tarfile.BLOCKSIZE)
            more = block[504]
        raise tarfile.ReadError("a header is too long")

    def _no_pieces(self, member: Any, *_: Any) -> None:
        """Take a member for sparse, and leave where its pieces lie unread."""
        member.sparse = []

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _no_pieces


class Shard(tarfile.TarFile):
    """A tar that knows if it broke off: a header cut short, or none, is the module's end."""

    tarinfo = ShardHeader
    broken_off = False


@dataclass(slots=True)
class Group:
    """The members of one sample by suffix: their headers, and what was read of them.

    `flaw` is why the sample cannot be used, if one of its members is not read. `within` is
    the header of the tar in the tar that it is in.
    """

    tar: Shard
    index: int
    key: str
    within: tarfile.TarInfo | None = None
    heads: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    members: Members = field(default_factory=dict)
    flaw: str | None = None

    def add(self, suffix: str, head: tarfile.TarInfo, *, read: bool) -> None:
        """Take the next member into the sample; with `read`, what is in it too."""
        self.heads[suffix] = head
        self.members[suffix] = None
        self.flaw = self.flaw or _flaw(suffix, head, len(self.heads))
        if read and self.flaw is None:
            self.members[suffix] = self.read(suffix)

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
        start = self.within.offset_data if self.within else 0
        return (start + head.offset_data, head.size) if head and head.sparse is None else None

    def folder(self) -> str | None:
        """Return the name of the tar in the tar that the sample is in."""
        return self.within.name.rsplit("/", 1)[-1][: -len(".tar")] if self.within else None


@dataclass(frozen=True, slots=True)
class TarSource(Reader):
    """Samples of one tar shard, compressed or not."""

    path: str
    columns: Columns
    filters: Filters

    def identity(self) -> Any:
        """Return path, size and time of change."""
        return file_identity(self.path)

    def rows_passing(self, filters: Sequence[Filters], trouble: Counter[str]) -> Passing:
        """Yield the rows that pass any of the filters, and which they pass.

        A shard that breaks off is read as far as it goes and counted in `trouble`.
        Raises InputError if the file is no tar, or if no sample has a field to filter by.
        """
        sieve, fields_seen, streams = Sieve(filters), set[str](), self._streams()
        for group in self._groups(lambda index, suffix: suffix in TEXT_SUFFIXES, trouble):
            fields = self._usable_fields(group, trouble)
            if fields is None:
                continue
            # Names that strangers made up are many; to tell what there is, some will do.
            few = len(fields_seen) < FIELDS
            fields_seen.update(fields if few else filters[0].keys() & fields.keys())
            if places := sieve.passed(fields):
                yield self._row(group, fields, None if streams else group.extent()), places
        for name in filters[0]:
            if fields_seen and name not in fields_seen:
                raise no_column(
                    self.path, f"field {name}", sorted(fields_seen), "correct the filter's name"
                )

    def select(self, wants: Callable[[Row], bool], trouble: Counter[str]) -> Selected:
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
            fields = self._usable_fields(group, trouble)
            if fields is None or not passes(self.filters, fields):
                continue
            row = self._row(group, fields)
            if wants(row):
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

    def _usable_fields(self, group: Group, trouble: Counter[str]) -> dict[str, Any] | None:
        """Return a sample's fields; None, counted in `trouble`, where it cannot be used."""
        fields = None if group.flaw else self._fields(group)
        if fields is None:
            trouble[group.flaw or DEEP] += 1
            return None
        texts = (as_text(fields["caption"]), as_text(fields["label"]))
        if max(len(text or "") for text in texts) > TEXT_LIMIT:
            trouble[TOO_LARGE] += 1
            return None
        return fields

    def _row(self, group: Group, fields: dict[str, Any], extent: Extent | None = None) -> Row:
        caption, label = as_text(fields["caption"]), as_text(fields["label"])
        origin = _origin(self.path, group.index, fields)
        return Row(group.index, group.key, caption, label, bool(group.image()), origin, extent)

    def _fields(self, group: Group) -> dict[str, Any] | None:
        """Return the sample's JSON fields, with its key, caption and label among them.

        None where they are nested too deeply to be read.
        """
        members = group.members
        fields = _json(members.get("json"))
        if fields is None:
            return None
        columns = self.columns
        caption = fields.get(columns.caption) if columns.caption else None
        label = fields.get(columns.label) if columns.label else None
        fallback = next((fields[name] for name in CAPTION_FIELDS if fields.get(name)), None)
        usual = next((fields[name] for name in LABEL_FIELDS if name in fields), None)
        fields["caption"] = caption or as_text(members.get("txt")) or fallback
        labels = (label, as_text(members.get("cls")), usual, group.folder())
        fields["label"] = next((value for value in labels if value is not None), None)
        return fields | {"key": group.key}

    def _at(self, extents: Mapping[int, Extent]) -> Iterator[tuple[int, bytes]]:
        """Yield images by their extents, in the order of the rows."""
        with opened(self.path) as file:
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
        with opened(self.path) as file:
            try:
                content: Any = Unpacked(file) if self._streams() else file
                mode: Any = "r|" if self._streams() else "r:"
                with Shard.open(fileobj=content, mode=mode) as tar:
                    started = True
                    yield from _grouped(tar, read, trouble)
            except BROKEN as error:
                if not started and "empty" not in str(error):
                    raise InputError(
                        f"{self.path} cannot be read as a tar shard: {error}",
                        hint="the file is damaged or no tar; fetch it again",
                    ) from error
                trouble[BOMB if isinstance(error, Bomb) else TRUNCATED] += 1

    def _streams(self) -> bool:
        """Return whether image bytes cannot be skipped: only those of a plain local file can."""
        fs, _ = fsspec.core.url_to_fs(self.path)
        return "file" not in fs.protocol or not self.path.endswith(".tar")


def _grouped(
    tar: Shard,
    read: Callable[[int, str], bool],
    trouble: Counter[str],
    *,
    first: int = 0,
    within: tarfile.TarInfo | None = None,
) -> Iterator[Group]:
    """Yield the samples of a tar, and of those in it, numbered from `first` on."""
    group = Group(tar, first - 1, "", within)
    for member, key, suffix in _files(tar):
        if suffix == "tar" and within is None and member.sparse is None:
            if group.heads:
                yield group
            last = group.index
            for inner in _grouped_within(tar, member, read, trouble, first=last + 1):
                yield inner
                last = inner.index
            group = Group(tar, last, "")
            continue
        # A key met twice in a row is two samples; none of them may swallow the other.
        if key != group.key or suffix in group.members:
            if group.heads:
                yield group
            group = Group(tar, group.index + 1, key, within)
        if len(group.heads) <= MEMBERS:
            group.add(suffix, member, read=read(group.index, suffix))
    if group.heads:
        yield group
    if tar.broken_off:
        raise tarfile.ReadError("it breaks off")


def _files(tar: Shard) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yield the files of a tar: header, name up to the first dot, and suffix."""
    while (member := tar.next()) is not None:
        # The module remembers every member it has met; a stream must not.
        tar.members.clear()  # type: ignore[attr-defined]
        match = MEMBER.match(member.name)
        if match is not None and member.isfile():
            yield member, match[1], match[2].lower()


def _grouped_within(
    tar: Shard,
    member: tarfile.TarInfo,
    read: Callable[[int, str], bool],
    trouble: Counter[str],
    *,
    first: int,
) -> Iterator[Group]:
    """Yield the samples of a tar in the tar; one that is broken is counted in `trouble`."""
    streams = isinstance(tar.fileobj, tarfile._Stream)  # type: ignore[attr-defined]
    try:
        mode: Any = "r|" if streams else "r:"
        with Shard.open(fileobj=tar.extractfile(member), mode=mode) as inner:
            yield from _grouped(inner, read, trouble, first=first, within=member)
    except BROKEN as error:
        if isinstance(error, Bomb):
            raise
        trouble[TRUNCATED] += 1


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


def _flaw(suffix: str, head: tarfile.TarInfo, members: int) -> str | None:
    """Return why a sample with this member, one of so many, is not used; None if it can be."""
    limit = LIMITS.get(suffix)
    if limit is not None and head.sparse is not None:
        return SPARSE
    fits = limit is None or 0 <= head.size <= limit
    return None if fits and len(head.name) <= NAME_LIMIT and members <= MEMBERS else TOO_LARGE


def _json(data: bytes | None) -> dict[str, Any] | None:
    """Return the object that JSON holds, an empty one where it is none; None if too deep."""
    try:
        value = parse_json(data) if data else {}
    except TooDeepError:
        return None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True)
class TarFiles:
    """Images in a tar, by their names there, with a suffix or without."""

    path: str

    def where(self, name: str) -> str:
        """Return the name and the tar."""
        return f"{name} in {self.path}"

    def has(self, name: str) -> None:
        """Return None: the tar would have to be read."""

    def names(self) -> list[str]:
        """Return the names of all images without suffixes, sorted."""
        return sorted(
            _key(row.key)
            for row in TarSource(self.path, Columns(), {}).rows(Counter())
            if row.has_image
        )

    def identity(self, names: Iterable[str]) -> Any:
        """Return the tar's path, size and time of change."""
        return file_identity(self.path)

    def read(self, images: Iterable[tuple[int, Held]]) -> Iterator[tuple[int, bytes | None]]:
        """Yield images as they are asked for; of a tar that streams, as they lie."""
        held = dict(images)
        wanted: dict[str, list[int]] = {}
        for number, name in held.items():
            if isinstance(name, str):
                wanted.setdefault(_key(name), []).append(number)
        shard = TarSource(self.path, Columns(), {})
        rows = {
            row.index: row
            for row in shard.rows(Counter())
            if row.has_image and _key(row.key) in wanted
        }
        numbers = {index: wanted.pop(_key(row.key), []) for index, row in rows.items()}
        at_hand = all(row.extent is not None for row in rows.values())
        order = sorted(rows, key=lambda index: numbers[index]) if at_hand else [*rows]
        for part in [[index] for index in order] if at_hand else [order]:
            for index, data in shard.images({i: rows[i].extent for i in part}) if part else ():
                for number in numbers[index]:
                    yield number, data
        for number, image in held.items():
            if not isinstance(image, str):
                yield number, image
            elif number in wanted.get(_key(image), ()):
                yield number, None


def _key(name: str) -> str:
    """Return an image's name as tars have it for a key: up to the first dot."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    return f"{folder}{slash}{base.split('.', 1)[0]}"
