"""Samples in an .arrow file, as `save_to_disk` of Hugging Face's datasets writes it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.sources import arrow_columns
from slsgu_cli.sources.arrow_columns import IMAGE_BATCH, TEXT_BATCH
from slsgu_cli.sources.image_files import ImageValue
from slsgu_cli.sources.reader import Wanted
from slsgu_cli.sources.table import Header, Records, TableSource
from slsgu_cli.text import first_lines

FILE_START = b"ARROW1"


@dataclass(frozen=True, slots=True)
class ArrowSource(TableSource):
    """Samples of one .arrow file."""

    description: ClassVar[str] = "Arrow files"
    suffixes: ClassVar[tuple[str, ...]] = (".arrow",)

    def header(self) -> Header:
        """Return the columns in the schema."""
        with open_arrow(self.path) as (schema, _):
            return arrow_columns.header(schema)

    def records(self, columns: Sequence[str], skipped: Counter[str]) -> Records:
        """Yield each row's number and columns; count rows with oversized cells in `skipped`."""
        index = 0
        # An empty selection would select all columns.
        with open_arrow(self.path, columns or None) as (_, batches):
            for batch in batches:
                for start in range(0, batch.num_rows, TEXT_BATCH):
                    part = batch.select(columns).slice(start, TEXT_BATCH)
                    yield from arrow_columns.records(part, index + start, skipped)
                index += batch.num_rows

    def image_values(self, column: str, wanted: Wanted) -> Iterator[tuple[int, ImageValue]]:
        """Yield the requested images; no other is read."""
        start, last = 0, max(wanted)
        with open_arrow(self.path, [column]) as (_, batches):
            for batch in batches:
                values = batch.column(0)
                rows = range(start, start + batch.num_rows)
                chosen = sorted(index for index in wanted if index in rows)
                for at in range(0, len(chosen), IMAGE_BATCH):
                    yield from arrow_columns.images(values, start, chosen[at : at + IMAGE_BATCH])
                start += batch.num_rows
                if start > last:
                    return


@contextmanager
def open_arrow(
    path: str, columns: Sequence[str] | None = None
) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Yield schema and batches of an Arrow file or stream, restricted to some columns.

    A local file is memory-mapped, so that only the used parts are read. Raises MissingError
    and InputError.
    """
    fs, inner = fsspec.core.url_to_fs(path)
    try:
        local = isinstance(fs, LocalFileSystem)
        with pa.memory_map(inner) if local else fs.open(inner, "rb") as raw:
            reader = _reader(raw, None)
            schema = reader.schema
            if columns is not None:
                places = sorted(schema.get_field_index(name) for name in columns)
                raw.seek(0)
                reader = _reader(raw, pa.ipc.IpcReadOptions(included_fields=places))
            yield schema, _batches(reader)
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path}") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as an Arrow file: {first_lines(error)}",
            hint="the file is damaged or incomplete; save it again",
        ) from error


def _reader(raw: Any, options: Any) -> Any:
    is_file = raw.read(len(FILE_START)) == FILE_START
    raw.seek(0)
    return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(raw, options=options)


def _batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
        batches = iter(reader)
    for batch in batches:
        # PyArrow reads out of bounds where the offsets of a damaged file point there.
        batch.validate(full=True)
        yield batch
