"""From the words a user names a source by to readers of its rows; folders of images."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from slsgu_cli.errors import InputError, MissingError, first_lines
from slsgu_cli.sources.rows import (
    IMAGE_LIMIT,
    IMAGE_SUFFIXES,
    TEXT_LIMIT,
    TOO_LARGE,
    Columns,
    Extent,
    Filters,
    Reader,
    Row,
    Wanted,
    as_text,
    no_column,
    passes,
    stamp,
)

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
                matches = [inner]
            else:
                matches = sorted(fs.glob(inner)) if any(mark in inner for mark in "*?[") else []
        except Exception as error:  # file systems of networks raise kinds of their own
            raise InputError(
                f"cannot open source {source.text}: {first_lines(error)}",
                hint="check the name, the connection and the leave to read it",
            ) from error
        if not matches:
            _require_access(source, fs, inner)
            raise MissingError(
                f"no file matches source {pattern}", hint="check the path; quote wild cards"
            )
        local = "file" in fs.protocol
        paths.extend(str(path) if local else str(fs.unstrip_protocol(path)) for path in matches)
    return paths


def _require_access(source: Source, fs: Any, inner: str) -> None:
    """Refuse a local path that this user may not look at: it would pass for one not there."""
    if "file" in fs.protocol:
        try:
            Path(inner).stat()
        except PermissionError as error:
            raise InputError(
                f"cannot open source {source.text}: {error.strerror}",
                hint="have this user be allowed to read it and the folders that it lies in",
            ) from error
        except (OSError, ValueError):
            return


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
        from slsgu_cli.sources.tar import TarSource

        return [TarSource(path, columns, source.filters)]
    if lower.endswith(PARQUET):
        from slsgu_cli.sources.parquet import ParquetSource

        return [ParquetSource(path, columns, source.filters)]
    fs, inner = fsspec.core.url_to_fs(path)
    if fs.isdir(inner):
        return _folder_readers(path, source, columns)
    suffix = lower.rsplit(".", 1)[-1]
    hint = "name the folder the images lie in" if suffix in IMAGE_SUFFIXES else ACCEPTED
    raise InputError(f"{path} is not a source of images and captions", hint=hint)


def _folder_readers(path: str, source: Source, columns: Columns) -> list[Reader]:
    """Read a folder of shards as its shards, any other folder as images."""

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


FIELDS = ("key", "caption", "label")
Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class FolderSource:
    """Images of one folder and the folders below it, in the order of their names."""

    path: str
    filters: Filters
    # An image without a caption of its own is described by the name of its class folder.
    labels_are_captions: bool = True

    def identity(self) -> Any:
        """Return the path and a digest over every image's and caption's size and time."""
        files = hashlib.sha256()
        count = 0
        for _, image, caption in self._entries():
            count += 1
            stamps = [image["name"], stamp(image), stamp(caption) if caption else None]
            files.update(json.dumps(stamps).encode())
        return [self.path, count, files.hexdigest()]

    def rows(self, trouble: Counter[str]) -> Iterator[Row]:
        """Yield the rows that pass the filters. Raises InputError for an unknown filter."""
        for name in self.filters:
            if name not in FIELDS:
                raise no_column(
                    self.path, f"column {name}", list(FIELDS), "filter a folder by its label"
                )
        for index, image, caption in self._entries():
            if _size(image) > IMAGE_LIMIT or _size(caption) > TEXT_LIMIT:
                trouble[TOO_LARGE] += 1
                continue
            relative = self._relative(image)
            label = relative.split("/")[0] if "/" in relative else None
            text = as_text(self._read(caption)) if caption else None
            key = relative.rsplit(".", 1)[0]
            if passes(self.filters, {"key": key, "caption": text, "label": label}):
                yield Row(index, key, text, label)

    def images(self, wanted: Wanted) -> Iterator[tuple[int, bytes | None]]:
        """Yield the encoded images of the wanted rows."""
        for index, image, _ in self._entries():
            if index in wanted:
                yield index, self._read(image)

    def _relative(self, entry: Entry) -> str:
        _, inner = fsspec.core.url_to_fs(self.path)
        return str(entry["name"]).removeprefix(str(inner).rstrip("/")).lstrip("/")

    def _read(self, entry: Entry) -> bytes | None:
        fs, _ = fsspec.core.url_to_fs(self.path)
        try:
            return bytes(fs.cat_file(entry["name"]))
        except (FileNotFoundError, PermissionError):
            # One file that may not be read is one row less, not the end of the run.
            return None
        except OSError as error:
            raise InputError(f"cannot read {entry['name']}: {error}") from error

    def _entries(self) -> Iterator[tuple[int, Entry, Entry | None]]:
        """Yield (index, image, caption file) for every image."""
        fs, inner = fsspec.core.url_to_fs(self.path)
        try:
            for index, (image, caption) in enumerate(_walk(fs, str(inner))):
                yield index, image, caption
        except OSError as error:
            raise InputError(f"cannot list {self.path}: {error}") from error


def _walk(fs: Any, folder: str) -> Iterator[tuple[Entry, Entry | None]]:
    """Yield the images of `folder`, then those of each folder in it, sorted by name."""
    folders = [folder]
    while folders:
        entries = sorted(fs.ls(folders.pop(), detail=True), key=lambda entry: str(entry["name"]))
        visible = [entry for entry in entries if not _base(entry).startswith(".")]
        files = [entry for entry in visible if _is_file(fs, entry)]
        captions = {
            str(entry["name"])[: -len(".txt")]: entry
            for entry in files
            if str(entry["name"]).lower().endswith(".txt")
        }
        for entry in files:
            stem, _, suffix = str(entry["name"]).rpartition(".")
            if suffix.lower() in IMAGE_SUFFIXES:
                yield entry, captions.get(stem)
        inside = [str(entry["name"]) for entry in visible if entry["type"] == "directory"]
        folders.extend(reversed(inside))


def _is_file(fs: Any, entry: Entry) -> bool:
    """Return whether an entry is a file, or a link to one or to nothing.

    A pipe would be waited for without end.
    """
    kind, name = entry["type"], str(entry["name"])
    return bool(
        kind == "file" or (kind != "directory" and (fs.isfile(name) or not fs.exists(name)))
    )


def _size(entry: Entry | None) -> int:
    """Return a file's size in bytes, 0 where it is not told."""
    return int((entry or {}).get("size") or 0)


def _base(entry: Entry) -> str:
    return str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
