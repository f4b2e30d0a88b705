"""Read samples from a parquet file that holds the image bytes.

Images are binary, or the {bytes, path} structs that Hugging Face data sets write. The
first pass reads text columns only; the second skips row groups without a chosen row.

Files come from strangers. What a footer, a page or a cell may cost is bounded, as for a tar:
beyond that rows are counted and left out, or the file is refused.
"""

import io
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from slsgu_cli.errors import InputError, MissingError, SlsguError
from slsgu_cli.records.sets import Origin
from slsgu_cli.sources.rows import (
    BOMB,
    CAPTION_FIELDS,
    IMAGE_LIMIT,
    LABEL_FIELDS,
    TEXT_LIMIT,
    TOO_LARGE,
    Columns,
    Filters,
    Row,
    Unread,
    Wanted,
    as_text,
    file_identity,
    no_column,
    passes,
)

IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes", "image_bytes")
TEXT_BATCH = 4096
IMAGE_BATCH = 64
BUFFER = 1 << 20

# What a page may unpack to, and the pages of rows that are read together: so much, or so many
# times what a page is packed to.
PAGE_ROOM, PAGE_INFLATION = 1 << 28, 32
# The most bytes of a footer, rows that a file may tell of if it has fewer bytes than these, and
# values that a row group's lists may have.
FOOTER_LIMIT, ROWS, LISTED = 1 << 25, 1 << 20, 1 << 24
# Bytes in which a page's header ends, statistics and all.
PAGE_HEADER = 1 << 16


class Bomb(InputError):
    """A row group that unpacks to far more than it is."""


@dataclass(frozen=True, slots=True)
class ParquetSource:
    """Samples of one parquet file."""

    path: str
    columns: Columns
    filters: Filters
    labels_are_captions: bool = False

    def identity(self) -> Any:
        """Return path, size, time of change, and which column the images are in."""
        return [*file_identity(self.path), self.columns.image]

    def rows(self, trouble: Counter[str]) -> Iterator[Row]:
        """Yield the rows that pass the filters; count those that cost too much in `trouble`.

        Raises InputError for a missing column.
        """
        with open_parquet(self.path) as file:
            names = file.schema.names
            self._image(file.schema)
            caption = self._find(names, "caption", self.columns.caption, CAPTION_FIELDS)
            label = self._find(names, "label", self.columns.label, LABEL_FIELDS)
            key = _detect(names, ("key", "__key__", "id"))
            url = _detect(names, ("url",))
            for name in self.filters:
                self._require(names, name)
            wanted = {*self.filters, *filter(None, (caption, label, key, url))}
            stem = self.path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
            for index, fields in _records(file, sorted(wanted), trouble):
                if passes(self.filters, fields):
                    yield Row(
                        index,
                        as_text(fields.get(key)) or f"{stem}:{index}",
                        as_text(fields.get(caption)),
                        as_text(fields.get(label)),
                        origin=_origin(self.path, index, fields.get(url)),
                    )

    def images(self, wanted: Wanted) -> Iterator[tuple[int, bytes | None]]:
        """Yield the encoded images of the wanted rows; row groups without any are skipped."""
        with open_parquet(self.path) as file:
            column = self._image(file.schema)
            start = 0
            for group, rows in enumerate(file.rows):
                chosen = sorted(index for index in wanted if start <= index < start + rows)
                try:
                    yield from _images(file, group, column, start, chosen)
                except Bomb:
                    yield from ((index, Unread(BOMB)) for index in chosen)
                start += rows

    def _find(
        self, names: list[str], what: str, chosen: str | None, usual: Sequence[str]
    ) -> str | None:
        if chosen is not None:
            self._require(names, chosen)
            return chosen
        name = _detect(names, usual)
        if name is None and what in self.columns.needs:
            raise no_column(self.path, f"{what} column", names, f"name it with --{what}-column")
        return name

    def _image(self, schema: pa.Schema) -> str:
        """Return the path of the column that holds image bytes."""
        name = self.columns.image
        if name is not None:
            self._require(schema.names, name)
        name = name or _detect(schema.names, IMAGE_NAMES)
        if name is None:
            hint = "name it with --image-column; img2dataset's own parquet files hold no images"
            raise no_column(self.path, "image column", schema.names, hint)
        kind = schema.field(name).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return f"{name}.bytes"
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return str(name)
        raise InputError(
            f"column {name} of {self.path} holds {kind}, not image bytes",
            hint="name the column of encoded images with --image-column",
        )

    def _require(self, names: list[str], name: str) -> None:
        if name not in names:
            raise no_column(self.path, f"column {name}", names, "correct the column's name")


class Parquet:
    """An open parquet file, read a row group at a time within bounds; `rows` are those of each.

    What pages would unpack to is looked at before PyArrow reads them. Values that many rows
    share stay in a dictionary, so that a row costs no more than its place in it.
    """

    def __init__(self, path: str, raw: Any, *, local: bool) -> None:
        """Read the footer. Raises InputError where it claims what cannot be."""
        self._path, self._raw, self._local = path, raw, local
        size = self._size()
        file = pq.ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False)
        self.schema: pa.Schema = file.schema_arrow
        self._metadata = file.metadata
        self._leaves = [file.schema.column(number) for number in range(len(file.schema))]
        self.rows = [self._metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        if min(self.rows, default=0) < 0 or sum(self.rows) > max(ROWS, size):
            raise InputError(
                f"{path} cannot be read as parquet: its footer tells of {sum(self.rows):,} rows, "
                f"more than its {size:,} bytes can hold",
                hint="the file is damaged or hostile; leave it out",
            )

    def batches(self, group: int, columns: Sequence[str], most: int) -> Iterator[pa.RecordBatch]:
        """Yield columns of a row group, at most so many rows at a time.

        Texts and bytes come as dictionaries. Raises Bomb.
        """
        leaves = [number for number, leaf in enumerate(self._leaves) if _is_in(leaf.path, columns)]
        chunks = [self._metadata.row_group(group).column(number) for number in leaves]
        with self._at_hand(chunks) as raw:
            rows = [
                self._rows_at_once(
                    raw, chunk, lists=bool(self._leaves[number].max_repetition_level)
                )
                for number, chunk in zip(leaves, chunks, strict=True)
            ]
            file = pq.ParquetFile(
                raw,
                metadata=self._metadata,
                buffer_size=BUFFER,
                pre_buffer=False,
                read_dictionary=[c.path_in_schema for c in chunks if _stays_shared(c)],
            )
            yield from file.iter_batches(
                batch_size=min([most, *rows]),
                row_groups=[group],
                columns=list(columns),
                use_threads=len(columns) > 1,
            )

    def _size(self) -> int:
        """Return the file's size. Raises InputError where its footer is too long."""
        size = int(self._raw.seek(0, io.SEEK_END))
        self._raw.seek(max(0, size - 8))
        footer = int.from_bytes(self._raw.read(4), "little")
        self._raw.seek(0)
        if FOOTER_LIMIT < footer <= size:
            raise InputError(
                f"{self._path} has a footer of {footer:,} bytes, more than {FOOTER_LIMIT:,}",
                hint="write it again with fewer columns or row groups",
            )
        return size

    @contextmanager
    def _at_hand(self, chunks: Sequence[Any]) -> Iterator[Any]:
        """Yield a file that has the column chunks at their places; remote ones are fetched.

        They are read twice, and would else come twice.
        """
        if self._local:
            yield self._raw
            return
        with tempfile.TemporaryFile() as copy:
            for chunk in chunks:
                start, left = _begin(chunk), chunk.total_compressed_size
                self._raw.seek(start)
                copy.seek(start)
                while left > 0 and (data := self._raw.read(min(left, BUFFER))):
                    copy.write(data)
                    left -= len(data)
            copy.flush()
            yield copy

    def _rows_at_once(self, raw: Any, chunk: Any, *, lists: bool) -> int:
        """Return how many rows of a column to read together, by its pages. Raises Bomb."""
        at, widest, seen = _begin(chunk), 1.0, 0
        end = at + chunk.total_compressed_size
        while at < end and seen < chunk.num_values:
            page = read_page(raw, at, end)
            if page.unpacked > max(PAGE_ROOM, PAGE_INFLATION * page.packed):
                raise Bomb(f"{self._path} unpacks to more than {PAGE_INFLATION} times its size")
            at += page.header + page.packed
            if not page.is_dictionary:
                seen += page.values
            if not page.is_dictionary or not _stays_shared(chunk):
                widest = max(widest, page.unpacked / max(page.values, 1))
        if lists and seen > LISTED:
            raise Bomb(f"{self._path} has lists of more than {LISTED:,} values")
        return max(1, int(PAGE_ROOM / widest))


def _is_in(leaf: str, columns: Sequence[str]) -> bool:
    return any(leaf == name or leaf.startswith(f"{name}.") for name in columns)


def _stays_shared(chunk: Any) -> bool:
    """Return whether PyArrow can leave a column's values in the dictionary that it has."""
    return bool(chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page)


def _begin(chunk: Any) -> int:
    """Return where a column chunk's first page lies."""
    offsets = chunk.dictionary_page_offset, chunk.data_page_offset
    return min((int(offset) for offset in offsets if offset), default=0)


@dataclass(frozen=True, slots=True)
class Page:
    """What a page's header says: its own bytes, and those of the page as it is and unpacked."""

    header: int
    packed: int
    unpacked: int
    values: int
    is_dictionary: bool


# Which fields of a page's header, a struct of thrift's, say what.
KIND, UNPACKED, PACKED = (1,), (2,), (3,)
VALUES = ((5, 1), (7, 1), (8, 1))
DICTIONARY = 2

# Types of fields in thrift's compact protocol.
STOP, BOOLEANS, INTEGERS, BINARY, STRUCT = 0, (1, 2), (4, 5, 6), 8, 12
NOT_RIGHT = "the header of a page cannot be right"


def read_page(raw: Any, at: int, end: int) -> Page:
    """Return what the header of the page at an offset says. Raises ArrowInvalid."""
    for size in (256, PAGE_HEADER):
        raw.seek(at)
        try:
            fields, header = compact_integers(raw.read(min(size, end - at)))
        except IndexError:
            continue
        packed, unpacked = fields.get(PACKED, -1), fields.get(UNPACKED, -1)
        values = next((fields[place] for place in VALUES if place in fields), 0)
        if min(packed, unpacked, values) >= 0 and at + header + packed <= end:
            return Page(header, packed, unpacked, values, fields.get(KIND) == DICTIONARY)
        break
    raise pa.ArrowInvalid(NOT_RIGHT)


def compact_integers(data: bytes) -> tuple[dict[tuple[int, ...], int], int]:
    """Return the integers of a struct in thrift's compact protocol, by their fields' numbers.

    The struct's length in bytes comes with them. Raises IndexError where it does not end, and
    ArrowInvalid where it has what no header of a page has.
    """
    found: dict[tuple[int, ...], int] = {}
    at, place = 0, [0]
    while True:
        kind, step, at = data[at] & 15, data[at] >> 4, at + 1
        if kind == STOP:
            place.pop()
            if not place:
                return found, at
            continue
        number = place[-1] + step
        if not step:
            number, at = _varint(data, at)
            number = _signed(number)
        place[-1] = number
        if kind in INTEGERS:
            value, at = _varint(data, at)
            found[tuple(place)] = _signed(value)
        elif kind == BINARY:
            length, at = _varint(data, at)
            at += length
        elif kind == STRUCT and len(place) < 4:
            place.append(0)
        elif kind not in BOOLEANS:
            raise pa.ArrowInvalid(NOT_RIGHT)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise pa.ArrowInvalid(NOT_RIGHT)


def _signed(number: int) -> int:
    """Return a number whose last bit is its sign."""
    return (number >> 1) ^ -(number & 1)


@contextmanager
def open_parquet(path: str) -> Iterator[Parquet]:
    """Yield a parquet file of any file system. Raises MissingError and InputError."""
    fs, inner = fsspec.core.url_to_fs(path)
    try:
        # A local file is read without coming back to Python for every block of it.
        local = isinstance(fs, LocalFileSystem)
        with pa.OSFile(inner) if local else fs.open(inner, "rb") as raw:
            yield Parquet(path, raw, local=local)
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path}") from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, SlsguError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} cannot be read as parquet: {reason}",
            hint="the file is damaged or incomplete; fetch it again",
        ) from error


def _detect(names: list[str], usual: Sequence[str]) -> str | None:
    """Return the first column with one of the usual names, whatever its case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), None)


def _origin(path: str, index: int, url: Any) -> Origin | None:
    return Origin(path, index, as_text(url)) if url else None


# Stands for a value that is larger than it may be.
OVERSIZED = object()


def _records(
    file: Parquet, columns: Sequence[str], trouble: Counter[str]
) -> Iterator[tuple[int, dict[Any, Any]]]:
    """Yield each row's number and fields; rows that cost too much are counted and left out."""
    start = 0
    for group, rows in enumerate(file.rows):
        index, start = start, start + rows
        if not columns:
            yield from ((number, {}) for number in range(index, start))
            continue
        try:
            for batch in file.batches(group, columns, TEXT_BATCH):
                values = [cells(column, TEXT_LIMIT) for column in batch.columns]
                for number, row in enumerate(zip(*values, strict=True), index):
                    if OVERSIZED in row:
                        trouble[TOO_LARGE] += 1
                    else:
                        yield number, dict(zip(batch.schema.names, row, strict=True))
                index += batch.num_rows
        except Bomb:
            trouble[BOMB] += start - index


def _images(
    file: Parquet, group: int, column: str, start: int, wanted: Sequence[int]
) -> Iterator[tuple[int, bytes | None]]:
    """Yield the wanted images of a row group, whose first row is number `start`."""
    if not wanted:
        return
    for batch in file.batches(group, [column], IMAGE_BATCH):
        values = batch.column(0)
        if pa.types.is_struct(values.type):
            # `field` would drop the struct's own nulls, `flatten` carries them over.
            values = values.flatten()[0]
        chosen = [index for index in wanted if start <= index < start + len(values)]
        taken = values.take(pa.array([index - start for index in chosen], pa.int64()))
        for index, image in zip(chosen, cells(taken, IMAGE_LIMIT), strict=True):
            yield index, Unread(TOO_LARGE) if image is OVERSIZED else image
        start += len(values)


def cells(values: Any, limit: int) -> list[Any]:
    """Return a column's values; OVERSIZED for those of more bytes, and of lists the first ones."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        filled = pc.greater(pc.list_value_length(values), 0)
        return cells(values.values.take(pc.if_else(filled, values.offsets[:-1], None)), limit)
    if pa.types.is_dictionary(kind):
        shared = cells(values.dictionary, limit)
        return [None if place is None else shared[place] for place in values.indices.to_pylist()]
    if _has_lengths(kind):
        too_long = pc.greater(pc.binary_length(values), limit)
        if pc.any(too_long).as_py():
            short = pc.if_else(too_long, None, values).to_pylist()
            flags = too_long.to_pylist()
            return [OVERSIZED if flag else v for flag, v in zip(flags, short, strict=True)]
    listed: list[Any] = values.to_pylist()
    return listed


def _has_lengths(kind: Any) -> bool:
    """Return whether values are texts or bytes of any length."""
    types = pa.types
    small = types.is_string(kind) or types.is_binary(kind)
    return bool(small or types.is_large_string(kind) or types.is_large_binary(kind))
