"""Samples in an .arrow file, as `save_to_disk` of Hugging Face's datasets writes it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pyarrow as pa

from slsgu_cli.sources.arrow_columns import ArrowTable, RowGroup, open_file

FILE_START = b"ARROW1"


@dataclass(frozen=True, slots=True)
class ArrowSource(ArrowTable):
    """Samples of one .arrow file; a local one is mapped, so that only the used parts are read."""

    description: ClassVar[str] = "Arrow files"
    suffixes: ClassVar[tuple[str, ...]] = (".arrow",)

    @contextmanager
    def open_groups(self) -> Iterator[tuple[pa.Schema, Iterable[RowGroup]]]:
        """Open the file or stream; its record batches are the row groups."""
        advice = "the file is damaged or incomplete; save it again"
        with open_file(self.path, pa.memory_map, form="an Arrow file", advice=advice) as raw:
            is_file = raw.read(len(FILE_START)) == FILE_START
            raw.seek(0)
            reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(raw)
            yield reader.schema, ((b.num_rows, partial(_parts, b)) for b in _batches(reader))


def _batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return map(reader.get_batch, range(reader.num_record_batches))
    return iter(reader)


def _parts(batch: pa.RecordBatch, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Yield columns of a batch, at most `rows` rows at a time."""
    selected = batch.select(list(columns))
    # PyArrow reads out of bounds where the offsets of a damaged file point there.
    selected.validate(full=True)
    for start in range(0, batch.num_rows, rows):
        yield selected.slice(start, rows)
