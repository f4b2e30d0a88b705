"""Samples in a parquet file that contains image bytes, or paths of images.

The first pass reads text columns only; the second one skips row groups without a requested
row.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.sources import arrow_columns
from slsgu_cli.sources.arrow_columns import BINARIES, IMAGE_BATCH, TEXT_BATCH, TEXTS
from slsgu_cli.sources.image_files import ImageValue
from slsgu_cli.sources.reader import Wanted
from slsgu_cli.sources.table import Header, Records, TableSource
from slsgu_cli.text import first_lines

# Rows of one text column to read at once.
COLUMN_BATCH = 1 << 16
BUFFER = 1 << 20
# The most bytes of a batch, if its values are of average size.
BATCH_LIMIT = 1 << 28


@dataclass(frozen=True, slots=True)
class ParquetSource(TableSource):
    """Samples of one parquet file."""

    description: ClassVar[str] = "parquet files"
    suffixes: ClassVar[tuple[str, ...]] = (".parquet", ".pq")
    in_folders: ClassVar[bool] = True

    def header(self) -> Header:
        """Return the columns in the schema."""
        with open_parquet(self.path) as file:
            return arrow_columns.header(file.schema_arrow)

    def records(self, columns: Sequence[str], skipped: Counter[str]) -> Records:
        """Yield each row's number and columns; count rows with oversized cells in `skipped`."""
        with open_parquet(self.path) as file:
            start = 0
            if not columns:
                yield from ((number, {}) for number in range(file.metadata.num_rows))
                return
            for group in range(file.num_row_groups):
                for batch in batches(file, group, columns, TEXT_BATCH):
                    yield from arrow_columns.records(batch, start, skipped)
                    start += batch.num_rows

    def image_values(self, column: str, wanted: Wanted) -> Iterator[tuple[int, ImageValue]]:
        """Yield the requested images; row groups without any are skipped."""
        with open_parquet(self.path) as file:
            end = 0
            for group, rows in enumerate(group_sizes(file)):
                start, end = end, end + rows
                chosen = sorted(index for index in wanted if start <= index < end)
                if chosen:
                    yield from _images(file, group, column, start, chosen)


def batches(
    file: pq.ParquetFile, group: int, columns: Sequence[str], most: int
) -> Iterator[pa.RecordBatch]:
    """Yield columns of a row group: at most `most` rows at a time, and about BATCH_LIMIT bytes."""
    row_group = file.metadata.row_group(group)
    chunks = map(row_group.column, range(row_group.num_columns))
    inside = tuple(f"{name}." for name in columns)
    sizes = [
        chunk.total_uncompressed_size / max(chunk.num_values, 1)
        for chunk in chunks
        if f"{chunk.path_in_schema}.".startswith(inside)
    ]
    yield from file.iter_batches(
        batch_size=max(1, min(most, int(BATCH_LIMIT / max([1, *sizes])))),
        row_groups=[group],
        columns=list(columns),
        use_threads=len(columns) > 1,
    )


def group_sizes(file: pq.ParquetFile) -> list[int]:
    """Return the number of rows of each row group."""
    return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Yield a parquet file of any file system. Raises MissingError and InputError."""
    fs, inner = fsspec.core.url_to_fs(path)
    try:
        # PyArrow reads a local file itself, without a call to Python for every block.
        local = isinstance(fs, LocalFileSystem)
        with pa.OSFile(inner) if local else fs.open(inner, "rb") as raw:
            yield pq.ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False)
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
        for batch in batches(file, group, [column], COLUMN_BATCH):
            yield _text(batch.column(0), f"{path}: column {column}")


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
    file: pq.ParquetFile, group: int, column: str, start: int, wanted: Sequence[int]
) -> Iterator[tuple[int, ImageValue]]:
    """Yield the requested images of a row group whose first row is number `start`."""
    for batch in batches(file, group, [column], IMAGE_BATCH):
        values = batch.column(0)
        chosen = [index for index in wanted if start <= index < start + len(values)]
        yield from arrow_columns.images(values, start, chosen)
        start += len(values)
