"""Tables of Arrow columns: texts, labels and images, with oversized values left out.

Images are binary, the {bytes, path} structs that Hugging Face data sets write, or paths as
text. Class numbers have the names that Hugging Face's metadata gives them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.codec import parse_json
from slsgu_cli.sources.image_files import ImageValue
from slsgu_cli.sources.reader import IMAGE_LIMIT, TEXT_LIMIT, TOO_LARGE, SkippedImage, Wanted
from slsgu_cli.sources.table import BYTES, PATH, Header, Records, TableSource
from slsgu_cli.text import first_lines

TEXTS, BINARIES = (pa.string(), pa.large_string()), (pa.binary(), pa.large_binary())

# Rows to read at once: of texts, and of images.
TEXT_BATCH, IMAGE_BATCH = 4096, 64

# Replaces a value that is larger than its limit.
OVERSIZED = object()


# The rows of a part of a file, and a function from columns and a batch size to its batches.
RowGroup = tuple[int, Callable[[Sequence[str], int], Iterable[pa.RecordBatch]]]


class ArrowTable(TableSource):
    """Samples in a file of Arrow columns; a format implements `open_groups`."""

    __slots__ = ()

    def open_groups(self) -> AbstractContextManager[tuple[pa.Schema, Iterable[RowGroup]]]:
        """Open the file for its schema and row groups. Raises MissingError or InputError."""
        raise NotImplementedError

    def header(self) -> Header:
        """Return columns, their kinds, and the class names in Hugging Face's metadata."""
        with self.open_groups() as (schema, _):
            return Header(
                schema.names, _class_names(schema), {f.name: _kind(f.type) for f in schema}
            )

    def records(self, columns: Sequence[str], skipped: Counter[str]) -> Records:
        """Yield each row's number and columns; count rows with oversized cells in `skipped`."""
        start = 0
        with self.open_groups() as (_, groups):
            for rows, batches in groups:
                if not columns:
                    yield from ((start + number, {}) for number in range(rows))
                first = start
                for batch in batches(columns, TEXT_BATCH) if columns else ():
                    yield from _records(batch, first, skipped)
                    first += batch.num_rows
                start += rows

    def image_values(self, column: str, wanted: Wanted) -> Iterator[tuple[int, ImageValue]]:
        """Yield the requested images; row groups without any are skipped."""
        start, last = 0, max(wanted)
        with self.open_groups() as (_, groups):
            for rows, batches in groups:
                chosen = sorted(index for index in wanted if start <= index < start + rows)
                first = start
                for batch in batches([column], IMAGE_BATCH) if chosen else ():
                    here = [i for i in chosen if first <= i < first + batch.num_rows]
                    yield from _images(batch.column(0), first, here)
                    first += batch.num_rows
                start += rows
                if start > last:
                    return


@contextmanager
def open_file(
    path: str, open_local: Callable[[str], Any], *, form: str, advice: str
) -> Iterator[Any]:
    """Yield a file that PyArrow reads; a local one without a call to Python for every block.

    Raises MissingError and InputError.
    """
    fs, inner = fsspec.core.url_to_fs(path)
    try:
        local = isinstance(fs, LocalFileSystem)
        with open_local(inner) if local else fs.open(inner, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path}") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as {form}: {first_lines(error)}", hint=advice
        ) from error


def _kind(kind: Any) -> str:
    if kind in BINARIES or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
        return BYTES
    return PATH if _is_text(kind) else str(kind)


def _class_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
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
            feature = feature["feature"]  # only the first value of a list is used
        classes = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(classes, list) and not _is_text(column.type):
            names[column.name] = [str(name) for name in classes]
    return names


def _is_text(kind: Any) -> bool:
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in TEXTS


def _records(batch: pa.RecordBatch, start: int, skipped: Counter[str]) -> Records:
    values = [_cells(column, TEXT_LIMIT) for column in batch.columns]
    for number, row in enumerate(zip(*values, strict=True), start):
        if OVERSIZED in row:
            skipped[TOO_LARGE] += 1
        else:
            yield number, dict(zip(batch.schema.names, row, strict=True))


def _images(values: Any, start: int, wanted: Sequence[int]) -> Iterator[tuple[int, ImageValue]]:
    """Yield the requested images of a column that begins with row `start`: bytes or paths."""
    column = values.take(pa.array([index - start for index in wanted], pa.int64()))
    columns = [column]
    if pa.types.is_struct(column.type):
        # `field` would drop the struct's own nulls, `flatten` carries them over.
        parts = dict(zip((field.name for field in column.type), column.flatten(), strict=True))
        columns = [parts[name] for name in ("bytes", "path") if name in parts]
    choices = [_cells(each, IMAGE_LIMIT) for each in columns]
    for index, *options in zip(wanted, *choices, strict=True):
        image = next((option for option in options if option is not None), None)
        yield index, SkippedImage(TOO_LARGE) if image is OVERSIZED else image


def _cells(values: Any, limit: int) -> list[Any]:
    """Return a column's values; OVERSIZED for those of more bytes, the first one of a list."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        filled = pc.greater(pc.list_value_length(values), 0)
        return _cells(values.values.take(pc.if_else(filled, values.offsets[:-1], None)), limit)
    if pa.types.is_dictionary(kind):
        shared = _cells(values.dictionary, limit)
        return [None if place is None else shared[place] for place in values.indices.to_pylist()]
    if kind in (*TEXTS, *BINARIES):
        too_long = pc.greater(pc.binary_length(values), limit)
        if pc.any(too_long).as_py():
            short = pc.if_else(too_long, None, values).to_pylist()
            flags = too_long.to_pylist()
            return [OVERSIZED if flag else v for flag, v in zip(flags, short, strict=True)]
    result: list[Any] = values.to_pylist()
    return result
