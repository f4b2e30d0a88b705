"""Read samples from a parquet or an Arrow file that holds the image bytes, or their paths.

Images are binary, the {bytes, path} structs that Hugging Face data sets write, or paths as
text. The first pass reads text columns only; the second skips row groups without a chosen
row. Numbers of classes have the names that Hugging Face's metadata gives them.

Files come from strangers. What a footer, a page or a cell may cost is bounded, as for a tar:
beyond that rows are counted and left out, or the file is refused.
"""

import io
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.codec import parse_json
from slsgu_cli.sources.rows import (
    BOMB,
    BYTES,
    IMAGE_LIMIT,
    PATH,
    TEXT_LIMIT,
    TOO_LARGE,
    Header,
    Held,
    Records,
    TableSource,
    Unread,
    Wanted,
)
from slsgu_cli.text import first_lines

# Rows that are read together: of fields, of images, of one column of text.
TEXT_BATCH, IMAGE_BATCH, COLUMN_BATCH = 4096, 64, 1 << 16
BUFFER = 1 << 20
TEXTS, BINARIES = (pa.string(), pa.large_string()), (pa.binary(), pa.large_binary())

# What a page may unpack to, and the pages of rows that are read together: so much, or so many
# times what a page is packed to.
PAGE_ROOM, PAGE_INFLATION = 1 << 28, 32
# The most bytes of a footer, rows that a file may tell of if it has fewer bytes than these, and
# values that a row group's lists may have.
FOOTER_LIMIT, ROWS, LISTED = 1 << 25, 1 << 20, 1 << 24
# Bytes in which a page's header ends, statistics and all.
PAGE_HEADER = 1 << 16
ARROW_START = b"ARROW1"


class Bomb(InputError):
    """A row group that unpacks to far more than it is."""


@dataclass(frozen=True, slots=True)
class ParquetSource(TableSource):
    """Samples of one parquet file."""

    def header(self) -> Header:
        """Return what the schema says."""
        with open_parquet(self.path) as file:
            return _header(file.schema)

    def records(self, columns: Sequence[str], trouble: Counter[str]) -> Records:
        """Yield each row's number and columns; count rows that cost too much in `trouble`."""
        with open_parquet(self.path) as file:
            yield from _records(file, columns, trouble)

    def held(self, column: str, wanted: Wanted) -> Iterator[tuple[int, Held]]:
        """Yield the wanted images; row groups without any are skipped."""
        with open_parquet(self.path) as file:
            start = 0
            for group, rows in enumerate(file.rows):
                chosen = sorted(index for index in wanted if start <= index < start + rows)
                try:
                    yield from _images(file, group, column, start, chosen) if chosen else ()
                except Bomb:
                    yield from ((index, Unread(BOMB)) for index in chosen)
                start += rows


@dataclass(frozen=True, slots=True)
class ArrowSource(TableSource):
    """Samples of one .arrow file, as `save_to_disk` of Hugging Face's datasets writes them."""

    def header(self) -> Header:
        """Return what the schema says."""
        with open_arrow(self.path) as (schema, _):
            return _header(schema)

    def records(self, columns: Sequence[str], trouble: Counter[str]) -> Records:
        """Yield each row's number and columns; count rows with cells too large in `trouble`."""
        index = 0
        # A choice of no columns would be one of all.
        with open_arrow(self.path, columns or None) as (_, batches):
            for batch in batches:
                for start in range(0, batch.num_rows, TEXT_BATCH):
                    part = batch.select(columns).slice(start, TEXT_BATCH)
                    yield from _rows_of(part, index + start, trouble)
                index += batch.num_rows

    def held(self, column: str, wanted: Wanted) -> Iterator[tuple[int, Held]]:
        """Yield the wanted images; no other is touched."""
        start, last = 0, max(wanted)
        with open_arrow(self.path, [column]) as (_, batches):
            for batch in batches:
                values = batch.column(0)
                places = range(start, start + batch.num_rows)
                chosen = sorted(index for index in wanted if index in places)
                for at in range(0, len(chosen), IMAGE_BATCH):
                    yield from _images_at(values, start, chosen[at : at + IMAGE_BATCH])
                start += batch.num_rows
                if start > last:
                    return


def _header(schema: pa.Schema) -> Header:
    """Return columns, what is in them, and names of classes in Hugging Face's metadata."""
    return Header(schema.names, _class_names(schema), {f.name: _kind(f.type) for f in schema})


def _kind(kind: Any) -> str:
    """Return BYTES or PATH for what an image may be or its path, and else the type."""
    if kind in BINARIES or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
        return BYTES
    return PATH if _is_text(kind) else str(kind)


def _class_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
    """Return the names that Hugging Face's metadata gives to the numbers of a column."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        info = parse_json(text)["info"]["features"] if text else {}
        features = {column.name: info.get(column.name) for column in schema}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
    names: dict[str, Sequence[str]] = {}
    for column in schema:
        feature = features[column.name]
        if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]  # of lists the first value counts
        listed = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(listed, list) and not _is_text(column.type):
            names[column.name] = [str(name) for name in listed]
    return names


def _is_text(kind: Any) -> bool:
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in TEXTS


@contextmanager
def open_arrow(
    path: str, columns: Sequence[str] | None = None
) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Yield schema and batches of an Arrow file, a stream or not, of some columns.

    A local file is mapped, so that only what is looked at is read. Raises MissingError and
    InputError.
    """
    fs, inner = fsspec.core.url_to_fs(path)
    try:
        local = isinstance(fs, LocalFileSystem)
        with pa.memory_map(inner) if local else fs.open(inner, "rb") as raw:
            opened = _arrow_reader(raw, None)
            schema = opened.schema
            if columns is not None:
                places = sorted(schema.get_field_index(name) for name in columns)
                raw.seek(0)
                opened = _arrow_reader(raw, pa.ipc.IpcReadOptions(included_fields=places))
            yield schema, _arrow_batches(opened)
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path}") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as an Arrow file: {first_lines(error)}",
            hint="the file is damaged or incomplete; save it again",
        ) from error


def _arrow_reader(raw: Any, options: Any) -> Any:
    whole = raw.read(len(ARROW_START)) == ARROW_START
    raw.seek(0)
    return (pa.ipc.open_file if whole else pa.ipc.open_stream)(raw, options=options)


def _arrow_batches(opened: Any) -> Iterator[pa.RecordBatch]:
    """Yield the batches that are left, each once it is known to hold what it says."""
    if isinstance(opened, pa.ipc.RecordBatchFileReader):
        batches = map(opened.get_batch, range(opened.num_record_batches))
    else:
        batches = iter(opened)
    for batch in batches:
        # What a hostile file says of where its values lie is believed by all that reads them.
        batch.validate(full=True)
        yield batch


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
        inside = tuple(f"{name}." for name in columns)
        leaves = [n for n, leaf in enumerate(self._leaves) if f"{leaf.path}.".startswith(inside)]
        chunks = [self._metadata.row_group(group).column(number) for number in leaves]
        with self._at_hand(chunks) as raw:
            rows = [self._rows_at_once(raw, group, number) for number in leaves]
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

    def _rows_at_once(self, raw: Any, group: int, leaf: int) -> int:
        """Return how many rows of a column to read together, by its pages. Raises Bomb."""
        chunk = self._metadata.row_group(group).column(leaf)
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
        if self._leaves[leaf].max_repetition_level and seen > LISTED:
            raise Bomb(f"{self._path} has lists of more than {LISTED:,} values")
        return max(1, int(PAGE_ROOM / widest))


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
        place[-1] += step
        if not step:
            place[-1], at = _integer(data, at)
        if kind in INTEGERS:
            found[tuple(place)], at = _integer(data, at)
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


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """Return a number whose last bit is its sign, and where it ends."""
    number, at = _varint(data, at)
    return (number >> 1) ^ -(number & 1), at


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
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} cannot be read as parquet: {reason}",
            hint="the file is no parquet, damaged or incomplete; fetch it again",
        ) from error


def text_batches(path: str, group: int, column: str) -> Iterator[pa.Array]:
    """Yield a column of a row group as arrays of text. Raises MissingError and InputError."""
    with open_parquet(path) as file:
        for batch in file.batches(group, [column], COLUMN_BATCH):
            values, size = batch.column(0), COLUMN_BATCH
            if pa.types.is_dictionary(values.type):
                shared = _without_long(values.dictionary)
                values = pa.DictionaryArray.from_arrays(values.indices, shared)
                longest = pc.max(pc.binary_length(shared)).as_py() or 1
                size = max(1, PAGE_ROOM // longest)
            for start in range(0, len(values), size):
                yield _text(values.slice(start, size), f"{path}: column {column}")


def _without_long(values: pa.Array) -> pa.Array:
    """Return texts, with none in the place of one that is longer than it may be."""
    listed = cells(values, TEXT_LIMIT)
    if OVERSIZED not in listed:
        return values
    return pa.array([None if value is OVERSIZED else value for value in listed], values.type)


def _text(values: pa.Array, what: str) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if values.type in TEXTS:
        return values
    if values.type in BINARIES or pa.types.is_null(values.type):
        texts = [v if v is None else v.decode(errors="replace") for v in values.to_pylist()]
        return pa.array(texts, pa.string())
    raise InputError(f"{what} holds {values.type}, not text")


# Stands for a value that is larger than it may be.
OVERSIZED = object()


def _records(file: Parquet, columns: Sequence[str], trouble: Counter[str]) -> Records:
    """Yield each row's number and fields; rows that cost too much are counted and left out."""
    start = 0
    for group, rows in enumerate(file.rows):
        index, start = start, start + rows
        if not columns:
            yield from ((number, {}) for number in range(index, start))
            continue
        try:
            for batch in file.batches(group, columns, TEXT_BATCH):
                yield from _rows_of(batch, index, trouble)
                index += batch.num_rows
        except Bomb:
            trouble[BOMB] += start - index


def _rows_of(batch: pa.RecordBatch, start: int, trouble: Counter[str]) -> Records:
    """Yield the rows of a batch whose first one has this number."""
    values = [cells(column, TEXT_LIMIT) for column in batch.columns]
    rows = zip(*values, strict=True) if values else repeat((), batch.num_rows)
    for number, row in enumerate(rows, start):
        if OVERSIZED in row:
            trouble[TOO_LARGE] += 1
        else:
            yield number, dict(zip(batch.schema.names, row, strict=True))


def _images(
    file: Parquet, group: int, column: str, start: int, wanted: Sequence[int]
) -> Iterator[tuple[int, Held]]:
    """Yield the wanted images of a row group, whose first row is number `start`."""
    for batch in file.batches(group, [column], IMAGE_BATCH):
        values = batch.column(0)
        chosen = [index for index in wanted if start <= index < start + len(values)]
        yield from _images_at(values, start, chosen)
        start += len(values)


def _images_at(values: Any, start: int, wanted: Sequence[int]) -> Iterator[tuple[int, Held]]:
    """Yield images of a column whose first row is number `start`: bytes, else their path."""
    images = values.take(pa.array([index - start for index in wanted], pa.int64()))
    columns = [images]
    if pa.types.is_struct(images.type):
        # `field` would drop the struct's own nulls, `flatten` carries them over.
        parts = dict(zip((field.name for field in images.type), images.flatten(), strict=True))
        columns = [parts[name] for name in ("bytes", "path") if name in parts]
    held = [cells(column, IMAGE_LIMIT) for column in columns]
    for index, *choices in zip(wanted, *held, strict=True):
        image = next((choice for choice in choices if choice is not None), None)
        yield index, Unread(TOO_LARGE) if image is OVERSIZED else image


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
    if kind in (*TEXTS, *BINARIES):
        too_long = pc.greater(pc.binary_length(values), limit)
        if pc.any(too_long).as_py():
            short = pc.if_else(too_long, None, values).to_pylist()
            flags = too_long.to_pylist()
            return [OVERSIZED if flag else v for flag, v in zip(flags, short, strict=True)]
    listed: list[Any] = values.to_pylist()
    return listed
