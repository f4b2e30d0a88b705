"""Columns of Arrow tables as texts, labels and images, with oversized values left out.

Images are binary, the {bytes, path} structs that Hugging Face data sets write, or paths as
text. Class numbers have the names that Hugging Face's metadata gives them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from slsgu_cli.records.codec import parse_json
from slsgu_cli.sources.image_files import ImageValue
from slsgu_cli.sources.reader import IMAGE_LIMIT, TEXT_LIMIT, TOO_LARGE, SkippedImage
from slsgu_cli.sources.table import BYTES, PATH, Header, Records

TEXTS, BINARIES = (pa.string(), pa.large_string()), (pa.binary(), pa.large_binary())

# Rows to read at once: of texts, and of images.
TEXT_BATCH, IMAGE_BATCH = 4096, 64

# Replaces a value that is larger than its limit.
OVERSIZED = object()


def header(schema: pa.Schema) -> Header:
    """Return columns, their kinds, and the class names in Hugging Face's metadata."""
    return Header(schema.names, _class_names(schema), {f.name: _kind(f.type) for f in schema})


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


def records(batch: pa.RecordBatch, start: int, skipped: Counter[str]) -> Records:
    """Yield the rows of a batch, numbered from `start`; count oversized ones in `skipped`."""
    values = [cells(column, TEXT_LIMIT) for column in batch.columns]
    rows = zip(*values, strict=True) if values else repeat((), batch.num_rows)
    for number, row in enumerate(rows, start):
        if OVERSIZED in row:
            skipped[TOO_LARGE] += 1
        else:
            yield number, dict(zip(batch.schema.names, row, strict=True))


def images(values: Any, start: int, wanted: Sequence[int]) -> Iterator[tuple[int, ImageValue]]:
    """Yield the requested images of a column that begins with row `start`: bytes or paths."""
    column = values.take(pa.array([index - start for index in wanted], pa.int64()))
    columns = [column]
    if pa.types.is_struct(column.type):
        # `field` would drop the struct's own nulls, `flatten` carries them over.
        parts = dict(zip((field.name for field in column.type), column.flatten(), strict=True))
        columns = [parts[name] for name in ("bytes", "path") if name in parts]
    choices = [cells(each, IMAGE_LIMIT) for each in columns]
    for index, *options in zip(wanted, *choices, strict=True):
        image = next((option for option in options if option is not None), None)
        yield index, SkippedImage(TOO_LARGE) if image is OVERSIZED else image


def cells(values: Any, limit: int) -> list[Any]:
    """Return a column's values; OVERSIZED for those of more bytes, the first one of a list."""
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
    result: list[Any] = values.to_pylist()
    return result
