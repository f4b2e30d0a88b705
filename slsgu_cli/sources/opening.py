"""Readers of the sources that a user names, and the two passes over them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import fsspec

from slsgu_cli.errors import InputError
from slsgu_cli.sources import saved_dataset
from slsgu_cli.sources.files import base_name
from slsgu_cli.sources.folder import FolderSource
from slsgu_cli.sources.formats import ACCEPTED, READERS, reader_class
from slsgu_cli.sources.grammar import expand, parse_source
from slsgu_cli.sources.reader import IMAGE_SUFFIXES, SPLITS, Columns, Extent, Filters, Reader, Row
from slsgu_cli.sources.tar import TarSource

# The table in a folder of images, as Hugging Face's `imagefolder` defines it.
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
RowId = tuple[int, int]


def open_sources(texts: Sequence[str], columns: Columns) -> list[Reader]:
    """Return the readers of all sources in their order, those of one source sorted by path.

    Raises MissingError if nothing matches, InputError for an unknown format.
    """
    readers: list[Reader] = []
    for source in map(parse_source, texts):
        for path in expand(source):
            readers.extend(_open(path, columns, source.filters))
    return readers


def scan(readers: Sequence[Reader], skipped: Counter[str]) -> Iterator[tuple[int, Row]]:
    """Yield (file number, row) of every row, without images: the first pass."""
    for number, reader in enumerate(readers):
        for row in reader.rows(skipped):
            yield number, row


def fetch(
    readers: Sequence[Reader], wanted: Mapping[RowId, Extent | None]
) -> Iterator[tuple[RowId, bytes | None]]:
    """Yield ((file number, row index), encoded image) of every requested row: the second pass.

    Files come in order, each with its rows; `wanted` maps them to their extents, if known. The
    image is None if the row has none, or if the file is truncated before it.
    """
    files: list[dict[int, Extent | None]] = [{} for _ in readers]
    for (number, index), extent in wanted.items():
        files[number][index] = extent
    for number, rows in enumerate(files):
        missing = dict.fromkeys(rows)
        for index, data in readers[number].images(rows) if rows else ():
            missing.pop(index, None)
            yield (number, index), data
        for index in missing:
            yield (number, index), None


def _open(path: str, columns: Columns, filters: Filters) -> list[Reader]:
    if reader := reader_class(path):
        return [reader.open(path, columns, filters)]
    fs, inner = fsspec.core.url_to_fs(path)
    if fs.isdir(inner):
        return _open_folder(path.rstrip("/"), columns, filters)
    is_image = path.lower().rsplit(".", 1)[-1] in IMAGE_SUFFIXES
    raise InputError(
        f"{path} is not a source of images and captions",
        hint="name the folder that contains the images" if is_image else ACCEPTED,
    )


def _open_folder(path: str, columns: Columns, filters: Filters) -> list[Reader]:
    """Open a folder as a saved data set, a table with images, shards, splits, or plain images."""
    fs, inner = fsspec.core.url_to_fs(path)
    names = sorted(base_name(entry["name"]) for entry in fs.ls(inner, detail=True))

    def open_all(inside: Sequence[str]) -> list[Reader]:
        return [each for name in inside for each in _open(f"{path}/{name}", columns, filters)]

    if (parts := saved_dataset.parts(path, names)) is not None:
        return open_all(parts)
    # A table next to tar shards lists their content.
    has_shards = any(TarSource.recognises(name) for name in names)
    tables = [name for name in METADATA if name in names and not has_shards]
    if tables[1:]:
        raise InputError(
            f"{path} has {' and '.join(tables)}", hint="delete all but one, or name one as source"
        )
    if tables and (reader := reader_class(tables[0])):
        return [reader.open(f"{path}/{tables[0]}", columns, filters, by_folder=True)]
    for kind in READERS:
        if kind.in_folders and (files := [name for name in names if kind.recognises(name)]):
            return open_all(files)
    splits = [
        name
        for name in names
        if name in SPLITS and any(fs.exists(f"{inner}/{name}/{table}") for table in METADATA)
    ]
    return open_all(splits) if splits else [FolderSource(path, columns, filters)]
