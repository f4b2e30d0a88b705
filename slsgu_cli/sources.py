"""From the words a user names a source by to its rows and images.

    PATH[?COLUMN=VALUE[&COLUMN=VALUE...]]

PATH is a local path or fsspec URL, with `*`, `?`, `[..]` wild cards or a `{000..012}`
range. It leads to tar shards, parquet files or folders. Rows are kept where each named
column has one of the values given for it; `%26` stands for `&` in a value.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

import fsspec

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.samples import IMAGE_SUFFIXES, Columns, Extent, Filters, Reader, Row

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PARQUET = (".parquet", ".pq")
ACCEPTED = "tar shards, parquet files, folders of images with .txt captions, or of class folders"
FILTER = re.compile(r"[^=&?/*]+=[^&]*(?:&[^=&?/*]+=[^&]*)*")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
RowId = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Source:
    """A source as it was named: where it lies and which rows of it are meant."""

    text: str
    path: str
    filters: Filters = field(default_factory=dict)


def parse_source(text: str) -> Source:
    """Split `path?column=value&...` into path and filters; several values of a column add up."""
    # A question mark without `column=value` behind it is a wild card.
    splits = ((text[:at], text[at + 1 :]) for at, char in enumerate(text) if char == "?")
    path, query = next((split for split in splits if FILTER.fullmatch(split[1])), (text, ""))
    if not query:
        return Source(text, text)
    filters: dict[str, set[str]] = {}
    for part in query.split("&"):
        name, _, value = part.partition("=")
        filters.setdefault(unquote(name), set()).add(unquote(value).strip())
    return Source(text, path, {name: frozenset(values) for name, values in filters.items()})


def open_source(source: Source, columns: Columns) -> list[Reader]:
    """Return the readers of every file that `source` names, sorted by path.

    Raises MissingError where nothing is there, InputError where it is no known source.
    """
    readers: list[Reader] = []
    for path in expand(source):
        readers.extend(_readers(path, source, columns))
    return readers


def open_sources(texts: Sequence[str], columns: Columns) -> list[Reader]:
    """Return the readers of all sources, in the order they were named."""
    return [reader for text in texts for reader in open_source(parse_source(text), columns)]


def scan(
    readers: Sequence[Reader], trouble: Counter[str], *, tick: Callable[[int], None] | None = None
) -> Iterator[tuple[int, Row]]:
    """Yield (file number, row) of every row, without images: the first pass."""
    for number, reader in enumerate(readers):
        for row in reader.rows(trouble):
            if tick:
                tick(1)
            yield number, row


def fetch(
    readers: Sequence[Reader], wanted: Mapping[RowId, Extent | None]
) -> Iterator[tuple[RowId, bytes | None]]:
    """Yield ((file number, row index), encoded image) of the wanted rows: the second pass.

    Files come in order, each with its rows; `wanted` has their extents as far as known.
    """
    files: list[dict[int, Extent | None]] = [{} for _ in readers]
    for (number, index), extent in wanted.items():
        files[number][index] = extent
    for number, rows in enumerate(files):
        for index, data in readers[number].images(rows) if rows else ():
            yield (number, index), data


def expand(source: Source) -> list[str]:
    """Return the files and folders that a source names. Raises MissingError or InputError."""
    paths: list[str] = []
    for pattern in _ranges(source.path):
        try:
            fs, inner = fsspec.core.url_to_fs(pattern)
            if fs.exists(inner):
                found = [inner]
            else:
                found = sorted(fs.glob(inner)) if any(mark in inner for mark in "*?[") else []
        except (ImportError, ValueError, OSError) as error:
            raise InputError(f"cannot open source {source.text}: {error}") from error
        if not found:
            raise MissingError(
                f"no file matches source {pattern}", hint="check the path; quote wild cards"
            )
        local = "file" in fs.protocol
        paths.extend(str(path) if local else str(fs.unstrip_protocol(path)) for path in found)
    return paths


def _ranges(path: str) -> list[str]:
    """Spell out a `{000..012}` range, as webdataset users write shards."""
    match = RANGE.search(path)
    if match is None:
        return [path]
    first, last = match[1], match[2]
    return [
        spelled
        for number in range(int(first), int(last) + 1)
        for spelled in _ranges(
            f"{path[: match.start()]}{number:0{len(first)}}{path[match.end() :]}"
        )
    ]


def _readers(path: str, source: Source, columns: Columns) -> list[Reader]:
    lower = path.lower()
    if lower.endswith(TAR):
        from slsgu_cli.tar_source import TarSource

        return [TarSource(path, columns, source.filters)]
    if lower.endswith(PARQUET):
        from slsgu_cli.parquet_source import ParquetSource

        return [ParquetSource(path, columns, source.filters)]
    fs, inner = fsspec.core.url_to_fs(path)
    if fs.isdir(inner):
        return _folder_readers(path, source, columns)
    suffix = lower.rsplit(".", 1)[-1]
    hint = "name the folder the images lie in" if suffix in IMAGE_SUFFIXES else ACCEPTED
    raise InputError(f"{path} is not a source of images and captions", hint=hint)


def _folder_readers(path: str, source: Source, columns: Columns) -> list[Reader]:
    """Read a folder of shards as its shards, any other folder as images."""
    from slsgu_cli.folder_source import FolderSource

    fs, inner = fsspec.core.url_to_fs(path)
    names = sorted(str(entry["name"]).rsplit("/", 1)[-1] for entry in fs.ls(inner, detail=True))
    # Tar shards come first: img2dataset lays a parquet of metadata beside each of them.
    for suffixes in (TAR, PARQUET):
        shards = [name for name in names if name.lower().endswith(suffixes)]
        if shards:
            return [
                reader
                for name in shards
                for reader in _readers(f"{path.rstrip('/')}/{name}", source, columns)
            ]
    return [FolderSource(path, source.filters)]
