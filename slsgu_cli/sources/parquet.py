"""Samples in a parquet file that contains image bytes, or paths of images.

The first pass reads text columns only; the second one skips row groups without a requested
row. A row group that unpacks to far more than its size is counted and left out.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.sources import arrow_columns
from slsgu_cli.sources.arrow_columns import (
    BINARIES,
    IMAGE_BATCH,
    OVERSIZED,
    TEXT_BATCH,
    TEXTS,
    cells,
)
from slsgu_cli.sources.image_files import ImageValue
from slsgu_cli.sources.reader import TEXT_LIMIT, SkippedImage, Wanted
from slsgu_cli.sources.table import Header, Records, TableSource
from slsgu_cli.text import first_lines

# Rows of one text column to read at once.
COLUMN_BATCH = 1 << 16
BUFFER = 1 << 20
# The most bytes of a batch, and the size and ratio beyond which a column chunk is not unpacked.
UNPACKED_LIMIT, INFLATION = 1 << 28, 32
BOMB = "decompression bomb"


@dataclass(frozen=True, slots=True)
class ParquetSource(TableSource):
    """Samples of one parquet file."""

    description: ClassVar[str] = "parquet files"
    suffixes: ClassVar[tuple[str, ...]] = (".parquet", ".pq")
    in_folders: ClassVar[bool] = True

    def header(self) -> Header:
        """Return the columns in the schema."""
        with open_parquet(self.path) as file:
            return arrow_columns.header(file.schema)

    def records(self, columns: Sequence[str], skipped: Counter[str]) -> Records:
        """Yield each row's number and columns; count rows that cost too much in `skipped`."""
        with open_parquet(self.path) as file:
            start = 0
            for group, rows in enumerate(file.rows):
                index, start = start, start + rows
                if not columns:
                    yield from ((number, {}) for number in range(index, start))
                elif file.inflates(group, columns):
                    skipped[BOMB] += rows
                else:
                    for batch in file.batches(group, columns, TEXT_BATCH):
                        yield from arrow_columns.records(batch, index, skipped)
                        index += batch.num_rows

    def image_values(self, column: str, wanted: Wanted) -> Iterator[tuple[int, ImageValue]]:
        """Yield the requested images; row groups without any are skipped."""
        with open_parquet(self.path) as file:
            end = 0
            for group, rows in enumerate(file.rows):
                start, end = end, end + rows
                chosen = sorted(index for index in wanted if start <= index < end)
                if chosen and file.inflates(group, [column]):
                    yield from ((index, SkippedImage(BOMB)) for index in chosen)
                elif chosen:
                    yield from _images(file, group, column, start, chosen)


class ParquetFile:
    """An open parquet file, read a row group at a time; `rows` are the numbers of rows in each.

    Values that many rows share stay in a dictionary, so that a row costs only its index there.
    """

    def __init__(self, raw: Any) -> None:
        """Read the footer."""
        self._raw = raw
        file = pq.ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False)
        self.schema: pa.Schema = file.schema_arrow
        self._metadata = file.metadata
        self.rows = [self._metadata.row_group(n).num_rows for n in range(file.num_row_groups)]

    def inflates(self, group: int, columns: Sequence[str]) -> bool:
        """Return whether a column of a row group unpacks to far more than its size."""
        return any(
            chunk.total_uncompressed_size
            > max(UNPACKED_LIMIT, INFLATION * chunk.total_compressed_size)
            for chunk in self._chunks(group, columns)
        )

    def batches(self, group: int, columns: Sequence[str], most: int) -> Iterator[pa.RecordBatch]:
        """Yield columns of a row group, at most `most` rows at a time.

        Texts and bytes come as dictionaries.
        """
        chunks = self._chunks(group, columns)
        sizes = [chunk.total_uncompressed_size / max(chunk.num_values, 1) for chunk in chunks]
        file = pq.ParquetFile(
            self._raw,
            metadata=self._metadata,
            buffer_size=BUFFER,
            pre_buffer=False,
            read_dictionary=[
                chunk.path_in_schema
                for chunk in chunks
                if chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page
            ],
        )
        yield from file.iter_batches(
            batch_size=max(1, min(most, int(UNPACKED_LIMIT / max(sizes, default=1)))),
            row_groups=[group],
            columns=list(columns),
            use_threads=len(columns) > 1,
        )

    def _chunks(self, group: int, columns: Sequence[str]) -> list[Any]:
        row_group = self._metadata.row_group(group)
        chunks = map(row_group.column, range(row_group.num_columns))
        inside = tuple(f"{name}." for name in columns)
        return [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(inside)]


@contextmanager
def open_parquet(path: str) -> Iterator[ParquetFile]:
    """Yield a parquet file of any file system. Raises MissingError and InputError."""
    fs, inner = fsspec.core.url_to_fs(path)
    try:
        # PyArrow reads a local file itself, without a call to Python for every block.
        local = isinstance(fs, LocalFileSystem)
        with pa.OSFile(inner) if local else fs.open(inner, "rb") as raw:
            yield ParquetFile(raw)
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path}") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as parquet: {first_lines(error)}",
            hint="the file is not parquet, damaged or incomplete; download it again",
        ) from error


def text_batches(path: str, group: int, column: str) -> Iterator[pa.Array]:
    """Yield a column of a row group as arrays of text. Raises MissingError and InputError."""
    with open_parquet(path) as file:
        if file.inflates(group, [column]):
            raise InputError(
                f"column {column} of {path} unpacks to more than {INFLATION} times its size",
                hint="write it again with smaller row groups, or leave the file out",
            )
        for batch in file.batches(group, [column], COLUMN_BATCH):
            values, size = batch.column(0), COLUMN_BATCH
            if pa.types.is_dictionary(values.type):
                shared = _without_long(values.dictionary)
                values = pa.DictionaryArray.from_arrays(values.indices, shared)
                longest = pc.max(pc.binary_length(shared)).as_py() or 1
                size = max(1, UNPACKED_LIMIT // longest)
            for start in range(0, len(values), size):
                yield _text(values.slice(start, size), f"{path}: column {column}")


def _without_long(values: pa.Array) -> pa.Array:
    """Return texts with null in place of those longer than TEXT_LIMIT."""
    short = cells(values, TEXT_LIMIT)
    if OVERSIZED not in short:
        return values
    return pa.array([None if value is OVERSIZED else value for value in short], values.type)


def _text(values: pa.Array, what: str) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if values.type in TEXTS:
        return values
    if values.type in BINARIES or pa.types.is_null(values.type):
        texts = [v if v is None else v.decode(errors="replace") for v in values.to_pylist()]
        return pa.array(texts, pa.string())
    raise InputError(f"{what} holds {values.type}, not text")


def _images(
    file: ParquetFile, group: int, column: str, start: int, wanted: Sequence[int]
) -> Iterator[tuple[int, ImageValue]]:
    """Yield the requested images of a row group whose first row is number `start`."""
    for batch in file.batches(group, [column], IMAGE_BATCH):
        values = batch.column(0)
        chosen = [index for index in wanted if start <= index < start + len(values)]
        yield from arrow_columns.images(values, start, chosen)
        start += len(values)
