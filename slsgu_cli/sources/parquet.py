"""Samples in a parquet file that contains image bytes, or paths of images.

The first pass reads text columns only; the second one skips row groups without a requested
row.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from slsgu_cli.errors import InputError
from slsgu_cli.sources.arrow_columns import BINARIES, TEXTS, ArrowTable, RowGroup, open_file

# Rows of one text column to read at once.
COLUMN_BATCH = 1 << 16
BUFFER = 1 << 20
# The most bytes of a batch, if its values are of average size.
BATCH_LIMIT = 1 << 28


@dataclass(frozen=True, slots=True)
class ParquetSource(ArrowTable):
    """Samples of one parquet file."""

    description: ClassVar[str] = "parquet files"
    suffixes: ClassVar[tuple[str, ...]] = (".parquet", ".pq")
    in_folders: ClassVar[bool] = True

    @contextmanager
    def open_groups(self) -> Iterator[tuple[pa.Schema, Iterable[RowGroup]]]:
        """Open the file for its schema and row groups."""
        with open_parquet(self.path) as file:
            groups = enumerate(group_sizes(file))
            yield (
                file.schema_arrow,
                [(rows, partial(_batches, file, group)) for group, rows in groups],
            )


def _batches(
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
    advice = "the file is not parquet, damaged or incomplete; download it again"
    with open_file(path, pa.OSFile, form="parquet", advice=advice) as raw:
        yield pq.ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False)


def text_batches(path: str, group: int, column: str) -> Iterator[pa.Array]:
    """Yield a column of a row group as arrays of text. Raises MissingError and InputError."""
    with open_parquet(path) as file:
        for batch in _batches(file, group, [column], COLUMN_BATCH):
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
