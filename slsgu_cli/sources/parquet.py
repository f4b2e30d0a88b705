"""Read samples from a parquet file that holds the image bytes.

Images are binary, or the {bytes, path} structs that Hugging Face data sets write. The
first pass reads text columns only; the second skips row groups without a chosen row.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from slsgu_cli.errors import InputError, MissingError, SlsguError
from slsgu_cli.records.sets import Origin
from slsgu_cli.sources.rows import (
    CAPTION_FIELDS,
    LABEL_FIELDS,
    Columns,
    Filters,
    Row,
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
        """Yield the rows that pass the filters. Raises InputError for a missing column."""
        with open_parquet(self.path, buffer_size=BUFFER) as file:
            names = file.schema_arrow.names
            self._image(file.schema_arrow)
            caption = self._find(names, "caption", self.columns.caption, CAPTION_FIELDS)
            label = self._find(names, "label", self.columns.label, LABEL_FIELDS)
            key = _detect(names, ("key", "__key__", "id"))
            url = _detect(names, ("url",))
            for name in self.filters:
                self._require(names, name)
            wanted = {*self.filters, *filter(None, (caption, label, key, url))}
            stem = self.path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
            for index, fields in enumerate(_records(file, sorted(wanted))):
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
        with open_parquet(self.path, buffer_size=BUFFER) as file:
            column = self._image(file.schema_arrow)
            start = 0
            for group in range(file.metadata.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                if any(start <= index < stop for index in wanted):
                    yield from _group_images(file, group, column, start, wanted)
                start = stop

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


@contextmanager
def open_parquet(path: str, *, buffer_size: int = 0) -> Iterator[pq.ParquetFile]:
    """Yield a parquet file of any file system. Raises MissingError and InputError."""
    fs, inner = fsspec.core.url_to_fs(path)
    try:
        # A local file is read without coming back to Python for every block of it.
        local = isinstance(fs, LocalFileSystem)
        with (
            pa.OSFile(inner) if local else fs.open(inner, "rb") as raw,
            pq.ParquetFile(raw, buffer_size=buffer_size, pre_buffer=False) as file,
        ):
            yield file
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


def _records(file: pq.ParquetFile, columns: list[str]) -> Iterator[dict[Any, Any]]:
    if not columns:
        yield from ({} for _ in range(file.metadata.num_rows))
        return
    for batch in file.iter_batches(batch_size=TEXT_BATCH, columns=columns):
        yield from batch.to_pylist()


def _group_images(
    file: pq.ParquetFile, group: int, column: str, start: int, wanted: Wanted
) -> Iterator[tuple[int, bytes | None]]:
    for batch in file.iter_batches(batch_size=IMAGE_BATCH, row_groups=[group], columns=[column]):
        values = batch.column(0)
        if pa.types.is_struct(values.type):
            # `field` would drop the struct's own nulls, `flatten` carries them over.
            values = values.flatten()[0]
        for offset in range(len(values)):
            if start + offset in wanted:
                yield start + offset, values[offset].as_py()
        start += len(values)
