"""From the words a user names a source by to readers of its rows; folders, tables of text."""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.codec import parse_json
from slsgu_cli.sources.rows import (
    IMAGE_FIELDS,
    IMAGE_LIMIT,
    IMAGE_SUFFIXES,
    PATH_FIELDS,
    SPLITS,
    TEXT_LIMIT,
    TOO_LARGE,
    Columns,
    Extent,
    Files,
    Filters,
    FolderFiles,
    Header,
    Passing,
    Reader,
    Records,
    Row,
    Sieve,
    TableSource,
    Wanted,
    as_text,
    base_name,
    file_bytes,
    file_identity,
    folder_of,
    no_column,
    opened,
    stamp,
    usual_column,
)
from slsgu_cli.text import first_lines

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PARQUET = (".parquet", ".pq")
ARROW = (".arrow",)
TEXT = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")
# The table in a folder of images, as Hugging Face's `imagefolder` has it.
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# What `save_to_disk` says of a data set and of several splits of one.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
IMAGES = "images"
ACCEPTED = (
    "tar shards, parquet or .arrow files, tables of paths (.csv, .tsv, .jsonl, .json, .txt), "
    "folders of images with .txt captions or a metadata.csv, or of class folders"
)
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


def open_sources(texts: Sequence[str], columns: Columns) -> list[Reader]:
    """Return the readers of all sources in the order they were named, of each sorted by path.

    Raises MissingError where nothing is there, InputError where it is no known source.
    """
    readers: list[Reader] = []
    for source in map(parse_source, texts):
        for path in expand(source):
            readers.extend(_readers(path, source, columns))
    return readers


def scan(readers: Sequence[Reader], trouble: Counter[str]) -> Iterator[tuple[int, Row]]:
    """Yield (file number, row) of every row, without images: the first pass."""
    for number, reader in enumerate(readers):
        for row in reader.rows(trouble):
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
            hint = "check the name, the connection and the leave to read it"
            if pattern.startswith("hf://") and not pattern.startswith("hf://datasets/"):
                hint = "data sets of the hub are named hf://datasets/OWNER/NAME/..."
            raise InputError(
                f"cannot open source {source.text}: {first_lines(error)}", hint=hint
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
    if lower.endswith((*PARQUET, *ARROW, *TEXT)):
        return [_table(path, source, columns)]
    fs, inner = fsspec.core.url_to_fs(path)
    if fs.isdir(inner):
        return _folder_readers(path, source, columns)
    suffix = lower.rsplit(".", 1)[-1]
    hint = "name the folder the images lie in" if suffix in IMAGE_SUFFIXES else ACCEPTED
    raise InputError(f"{path} is not a source of images and captions", hint=hint)


def _table(path: str, source: Source, columns: Columns, *, by_folder: bool = False) -> Reader:
    """Return the reader of a file of rows with columns; `?images=` says where images lie."""
    filters = {name: values for name, values in source.filters.items() if name != IMAGES}
    named = source.filters.get(IMAGES)
    files = _files(named) if named else FolderFiles(_usual_folder(path))
    lower = path.lower()
    kind: type[TableSource] = TextTable
    if lower.endswith((*PARQUET, *ARROW)):
        from slsgu_cli.sources import parquet

        kind = parquet.ParquetSource if lower.endswith(PARQUET) else parquet.ArrowSource
    return kind(path, columns, filters, files, by_folder)


def _files(named: frozenset[str]) -> Files:
    """Return the images in the folder or tar that `?images=` names. Raises MissingError."""
    (place, *more) = sorted(named)
    fs, inner = fsspec.core.url_to_fs(place)
    if more or not fs.exists(inner):
        raise MissingError(
            f"?{IMAGES}= names {'several places' if more else f'{place}, which is not there'}",
            hint="name one folder, or one tar, that the images of the table lie in",
        )
    if not place.lower().endswith(TAR):
        return FolderFiles(place)
    from slsgu_cli.sources.tar import TarFiles

    return TarFiles(place)


# Where images lie of tables that are published apart from them.
USUAL_FOLDERS = (
    (re.compile(r"captions_(\w+)\.json"), ("../{}", "../images/{}", "{}", "images/{}")),
    (re.compile(r"(identity_celeba)\w*\.txt"), ("img_align_celeba", "../Img/img_align_celeba")),
)


def _usual_folder(path: str) -> str:
    """Return the folder that a table's images lie in: by its name, else its own."""
    folder = folder_of(path)
    for name, places in USUAL_FOLDERS:
        match = name.fullmatch(base_name(path).lower())
        for place in places if match else ():
            at = f"{folder}/{place.format(match[1])}" if match else ""
            fs, inner = fsspec.core.url_to_fs(at)
            if fs.isdir(inner):
                return at
    return folder


def _folder_readers(path: str, source: Source, columns: Columns) -> list[Reader]:
    """Read a folder of shards as its shards, one with a table by that, any other as images."""
    fs, inner = fsspec.core.url_to_fs(path)
    names = sorted(base_name(entry["name"]) for entry in fs.ls(inner, detail=True))
    path = path.rstrip("/")
    if SAVED_SPLITS in names:
        splits = _object_in(f"{path}/{SAVED_SPLITS}").get("splits")
        inside = [name for name in splits if name in names] if isinstance(splits, list) else []
        return [r for name in inside for r in _folder_readers(f"{path}/{name}", source, columns)]
    if SAVED in names:
        return [_table(f"{path}/{name}", source, columns) for name in _saved(path, names)]
    if tables := [name for name in METADATA if name in names and not _has(names, TAR)]:
        if tables[1:]:
            raise InputError(
                f"{path} has {' and '.join(tables)}", hint="leave one of them, or name one"
            )
        return [_table(f"{path}/{tables[0]}", source, columns, by_folder=True)]
    # Tar shards come first: img2dataset lays a parquet of metadata beside each of them.
    for suffixes in (TAR, PARQUET):
        shards = [name for name in names if name.lower().endswith(suffixes)]
        if shards:
            return [r for name in shards for r in _readers(f"{path}/{name}", source, columns)]
    splits = [name for name in names if name in SPLITS and _has_table(f"{path}/{name}")]
    if splits:
        return [r for name in splits for r in _folder_readers(f"{path}/{name}", source, columns)]
    return [FolderSource(path, source.filters)]


def _has(names: Sequence[str], suffixes: tuple[str, ...]) -> bool:
    return any(name.lower().endswith(suffixes) for name in names)


def _has_table(folder: str) -> bool:
    fs, inner = fsspec.core.url_to_fs(folder)
    return any(fs.exists(f"{inner}/{name}") for name in METADATA)


def _saved(folder: str, names: Sequence[str]) -> list[str]:
    """Return the files of a data set saved to disk, which may have caches beside them."""
    state = _object_in(f"{folder}/{SAVED}")
    if state.get("_indices_data_files"):
        raise InputError(
            f"{folder} was saved with its rows chosen by an index",
            hint="save it again: load_from_disk(...).flatten_indices().save_to_disk(...)",
        )
    listed = state.get("_data_files")
    files = [str(file.get("filename")) for file in listed or () if isinstance(file, dict)]
    missing = [name for name in files if name not in names]
    if missing or not files:
        what = f"no {missing[0]}" if missing else "no files of rows"
        raise InputError(f"{folder} has {what}, as {SAVED} tells", hint="save it again")
    return files


def _object_in(path: str) -> dict[str, Any]:
    """Return what a small JSON file says. Raises InputError."""
    try:
        with fsspec.open(path, "rb") as file:
            value = parse_json(file.read(JSON_FILE))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    return value if isinstance(value, dict) else {}


FIELDS = ("key", "caption", "label")
Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class FolderSource(Reader):
    """Images of one folder and the folders below it, in the order of their names."""

    path: str
    filters: Filters

    @property
    def labels_are_captions(self) -> bool:
        """Whether the name of its class folder describes an image without a caption: it does."""
        return True

    def identity(self) -> Any:
        """Return the path and a digest over every image's and caption's size and time."""
        files, count = hashlib.sha256(), 0
        for _, (image, caption) in self._entries():
            count += 1
            stamps = [image["name"], stamp(image), stamp(caption) if caption else None]
            files.update(json.dumps(stamps).encode())
        return [self.path, count, files.hexdigest()]

    def rows_passing(self, filters: Sequence[Filters], trouble: Counter[str]) -> Passing:
        """Yield the rows that pass any of the filters, and which they pass.

        Raises InputError for an unknown filter, and where the folder has no images at all.
        """
        sieve = Sieve(filters)
        for name in filters[0]:
            if name not in FIELDS:
                raise no_column(
                    self.path, f"column {name}", list(FIELDS), "filter a folder by its label"
                )
        index = None
        for index, (image, caption) in self._entries():
            if _size(image) > IMAGE_LIMIT or _size(caption) > TEXT_LIMIT:
                trouble[TOO_LARGE] += 1
                continue
            relative = self._relative(image)
            label = relative.split("/")[0] if "/" in relative else None
            text = as_text(self._read(caption)) if caption else None
            key = relative.rsplit(".", 1)[0]
            if places := sieve.passed({"key": key, "caption": text, "label": label}):
                yield Row(index, key, text, label), places
        if index is None:
            raise _no_images(self.path)

    def images(self, wanted: Wanted) -> Iterator[tuple[int, bytes | None]]:
        """Yield the encoded images of the wanted rows."""
        for index, (image, _) in self._entries():
            if index in wanted:
                yield index, self._read(image)

    def _relative(self, entry: Entry) -> str:
        _, inner = fsspec.core.url_to_fs(self.path)
        return str(entry["name"]).removeprefix(str(inner).rstrip("/")).lstrip("/")

    def _read(self, entry: Entry) -> bytes | None:
        fs, _ = fsspec.core.url_to_fs(self.path)
        return file_bytes(fs, entry["name"], entry["name"])

    def _entries(self) -> Iterator[tuple[int, tuple[Entry, Entry | None]]]:
        """Yield the number of every image, and it with its caption file."""
        fs, inner = fsspec.core.url_to_fs(self.path)
        try:
            yield from enumerate(_walk(fs, str(inner)))
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


def _no_images(folder: str) -> InputError:
    """Return the error for a folder without images, which tells of sources below it."""
    fs, inner = fsspec.core.url_to_fs(folder)
    known = (*TAR, *PARQUET, *ARROW, *TEXT)
    below = sorted(name for name in fs.find(inner, maxdepth=3) if name.lower().endswith(known))
    hint = f"name what is in it, such as {below[0]}" if below else ACCEPTED
    return InputError(f"there are no images in {folder}", hint=hint)


def _is_file(fs: Any, entry: Entry) -> bool:
    """Return whether an entry is a file, or a link to one or to nothing.

    A pipe would be waited for without end.
    """
    kind, name = entry["type"], str(entry["name"])
    return bool(
        kind == "file" or (kind != "directory" and (fs.isfile(name) or not fs.exists(name)))
    )


def _base(entry: Entry) -> str:
    return base_name(str(entry["name"]).rstrip("/"))


def _size(entry: Entry | None) -> int:
    """Return a file's size in bytes, 0 where it is not told."""
    return int((entry or {}).get("size") or 0)


# The most bytes that a line of a table may have, and a JSON file that is read whole.
LINE, JSON_FILE = 1 << 20, 1 << 28
# Rows of JSON lines that columns are read from.
TELLING = 100
RAGGED, NO_OBJECT = "not a value for each column", "not a JSON object"
# A line of a list: an image, and behind it what it is.
LISTED = re.compile(rf"(.+?\.(?:{'|'.join(sorted(IMAGE_SUFFIXES))}))(?:[\s,]+(.*))?", re.IGNORECASE)
PARTITION = ("list_eval_partition.txt", "../Eval/list_eval_partition.txt")
CELEBA_SPLITS = {"0": "train", "1": "valid", "2": "test"}
# A row by its columns, or why it is none.
Record = Mapping[str, Any] | str
Listing = tuple[Sequence[str], Iterable[Record]]


@dataclass(frozen=True, slots=True)
class TextTable(TableSource):
    """A table of paths with captions or labels, as text: what its suffix and first line say."""

    def header(self) -> Header:
        """Return the columns; all may be paths."""
        with self._listed() as (names, _):
            return Header(names)

    def records(self, columns: Sequence[str], trouble: Counter[str]) -> Records:
        """Yield each row's number and columns; count what is no row in `trouble`."""
        with self._listed() as (_, rows):
            for index, row in enumerate(rows):
                if isinstance(row, str):
                    trouble[row] += 1
                elif any(len(as_text(row.get(name)) or "") > TEXT_LIMIT for name in columns):
                    trouble[TOO_LARGE] += 1
                else:
                    yield index, row

    def identity(self) -> Any:
        """Return the identity of the table, its images, and a file of splits beside it."""
        beside = _partition(self.path)
        identity = TableSource.identity(self)
        return [*identity, file_identity(beside)] if beside else identity

    @contextmanager
    def _listed(self) -> Iterator[Listing]:
        """Yield the columns and the rows. Raises MissingError and InputError."""
        with opened(self.path, "r", encoding="utf-8-sig", errors="replace", newline="") as file:
            yield self._listing(file)

    def _listing(self, file: Any) -> Listing:
        suffix = self.path.lower().rsplit(".", 1)[-1]
        if suffix == "json":
            return _json_listing(file, self.path)
        if suffix in ("jsonl", "ndjson"):
            return _named_by_rows(map(_object, filter(str.strip, _lines(file))))
        lines = _lines(file)
        first = next(lines, "")
        lines = chain([first], lines)
        if suffix == "txt" and usual_column(_split(first), (*IMAGE_FIELDS, *PATH_FIELDS)) is None:
            return self._list(first, lines)
        return _csv_listing(first, lines)

    def _list(self, first: str, lines: Iterable[str]) -> Listing:
        """Return rows of lines with an image and its label, or of labels of images in order."""
        words = filter(None, map(str.strip, lines))
        if not LISTED.fullmatch(first.strip()):
            return ("image", "label"), self._in_order(words)
        pairs = (LISTED.fullmatch(line) for line in words)
        rows = ({"image": pair[1], "label": pair[2]} if pair else RAGGED for pair in pairs)
        beside = _partition(self.path)
        if beside is None:
            return ("image", "label"), rows
        return ("image", "label", "split"), _with_splits(rows, beside)

    def _in_order(self, labels: Iterable[str]) -> Iterator[Record]:
        """Yield a row for each label of the images, which are sorted by their names."""
        listed = list(labels)
        if all(label.isdecimal() for label in listed):
            raise InputError(
                f"{self.path} has numbers alone, and no images that they are of",
                hint="the development kit's numbers are in an order of their own: give a file of "
                "an ImageNet folder's name a line (n01440764), or of lines with image and label",
            )
        names = self._files().names()
        if len(names) != len(listed):
            raise InputError(
                f"{self.path} has {len(listed)} labels for {len(names)} images",
                hint="give a line for each image, or lines with image and label",
            )
        yield from ({"image": n, "label": la} for n, la in zip(names, listed, strict=True))


def _lines(file: Any) -> Iterator[str]:
    """Yield the lines of a file, those that are too long in pieces."""
    while line := file.readline(LINE):
        yield line


def _split(line: str) -> list[str]:
    return [name.strip().strip('"') for name in line.split(_delimiter(line))]


def _delimiter(header: str) -> str:
    """Return what stands between columns: open_clip's tables have tabs, whatever their suffix."""
    return next((mark for mark in "\t,;|" if mark in header), ",")


def _csv_listing(first: str, lines: Iterable[str]) -> Listing:
    reader = csv.reader(iter(lines), delimiter=_delimiter(first))
    names = [name.strip() for name in next(reader, [])]

    def rows() -> Iterator[Record]:
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield TOO_LARGE if "limit" in str(error) else RAGGED
                continue
            if len(values) == len(names):
                yield dict(zip(names, values, strict=True))
            elif values:
                yield RAGGED

    return names, rows()


def _object(line: str) -> Record:
    try:
        value = parse_json(line)
    except ValueError:
        return NO_OBJECT
    return value if isinstance(value, dict) else NO_OBJECT


def _named_by_rows(rows: Iterator[Record]) -> Listing:
    """Return rows, and the columns that the first of them have."""
    first = list(islice(rows, TELLING))
    names = dict.fromkeys(name for row in first if not isinstance(row, str) for name in row)
    return list(names), chain(first, rows)


def _json_listing(file: Any, path: str) -> Listing:
    """Return the rows of a list of records, or of COCO's captions. Raises InputError."""
    text = file.read(JSON_FILE + 1)
    if len(text) > JSON_FILE:
        raise InputError(f"{path} has more than {JSON_FILE:,} letters", hint="write JSON lines")
    try:
        value = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if isinstance(value, list):
        return _named_by_rows(row if isinstance(row, dict) else NO_OBJECT for row in value)
    content = value if isinstance(value, dict) else {}
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        fields = ", ".join(content) or "no fields"
        raise InputError(
            f"{path} is no list of records, nor COCO's captions: it has {fields}",
            hint="COCO's captions are in annotations/captions_*.json",
        )
    return ("image", "caption", "key"), _coco(images, annotations)


def _coco(images: Sequence[Any], annotations: Sequence[Any]) -> Iterator[Record]:
    """Yield a row for each caption of COCO's, of which an image has several."""
    try:
        files = {image["id"]: str(image["file_name"]) for image in images}
        for note in annotations:
            file = files.get(note["image_id"])
            key = f"{(file or '').rsplit('.', 1)[0]}:{note['id']}"
            yield {"image": file, "caption": note.get("caption"), "key": key}
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"an image or annotation is not as COCO has it: {error!r}",
            hint="images have id and file_name, annotations id, image_id and caption",
        ) from error


def _partition(path: str) -> str | None:
    """Return the file of splits beside a table of CelebA's; None for another, or without one."""
    celeba = base_name(path).lower().startswith("identity_celeba")
    for name in PARTITION if celeba else ():
        place = f"{folder_of(path)}/{name}"
        fs, inner = fsspec.core.url_to_fs(place)
        if fs.exists(inner):
            return place
    return None


def _with_splits(rows: Iterable[Record], partition: str) -> Iterator[Record]:
    """Yield rows with the split that CelebA's partition has their image in."""
    splits: dict[str, str | None] = {}
    with fsspec.open(partition, "r", encoding="utf-8-sig", errors="replace") as file:
        for line in _lines(file):
            image, _, number = line.strip().rpartition(" ")
            splits[image.strip()] = CELEBA_SPLITS.get(number)
    for row in rows:
        yield row if isinstance(row, str) else {**row, "split": splits.get(row["image"])}
