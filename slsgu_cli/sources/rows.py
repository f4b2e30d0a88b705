"""What every kind of source yields: rows first, image bytes later and only when asked.

A source is read twice. The first pass yields a `Row` for each sample and touches no
image; the second yields the encoded images of the rows that were chosen, in the order
they lie in. So a source of any size is read in constant memory.

What has columns is a `TableSource`: a layout says how its rows are listed, and all else is
the same for each. Its images are in the file, or are files that it names.
"""

import errno
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import fsspec

from slsgu_cli import progress
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.sets import Origin

IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "img")
)
# The most bytes that a caption or a label may have, and an encoded image.
TEXT_LIMIT, IMAGE_LIMIT = 1 << 16, 1 << 26
TOO_LARGE = "oversized file"
BOMB = "decompression bomb"
CAPTION_FIELDS = ("caption", "text")
LABEL_FIELDS = ("label", "concept", "class", "cls")
IMAGE_FIELDS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes", "image_bytes")
PATH_FIELDS = (
    "filepath",
    "file_path",
    "image_path",
    "path",
    "file_name",
    "filename",
    "image_name",
    "file",
)
# The first is open_clip's name in its tables.
TABLE_CAPTIONS = (*CAPTION_FIELDS, "title", "comment")
Filters = dict[str, frozenset[str]]
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns to read, where they are not to be found by their usual names.

    `needs` names what cannot be done without: `caption`, `label`.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    needs: frozenset[str] = frozenset()


# The first byte of an encoded image in a file, and how many there are.
Extent = tuple[int, int]

# The rows whose images are wanted, with their extents where the first pass told them.
Wanted = Mapping[int, Extent | None]

# Each row's number and columns.
Records = Iterator[tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Row:
    """One sample without its image; `index` is its place in the file, filters aside.

    `origin` is set where the file is not where the sample was first met, or has URLs;
    `extent` where the image lies in the file as it is. `number` is what stands in the file
    where `label` is the name that the file gives to a number.
    """

    index: int
    key: str
    caption: str | None
    label: str | None
    has_image: bool = True
    origin: Origin | None = None
    extent: Extent | None = field(default=None, compare=False)
    number: str | None = None


class Unread(bytes):
    """No bytes, for an image that costs too much; `reason` is what it is counted under."""

    reason: str

    def __new__(cls, reason: str) -> "Unread":
        """Return what stands for an image that is left out for a reason."""
        made = super().__new__(cls)
        made.reason = reason
        return made


# Rows with their encoded images.
Selected = Iterator[tuple[Row, bytes | None]]

# The rows that pass any of several filters, each with the places of those it passes.
Passing = Iterator[tuple[Row, Sequence[int]]]


class Reader:
    """One file or folder of samples, of which those are meant that pass the filters."""

    __slots__ = ()
    path: str
    filters: Filters

    @property
    def labels_are_captions(self) -> bool:
        """Whether a label stands in where a row has no caption."""
        return False

    def identity(self) -> Any:
        """Return JSON that changes when the images read may be others."""
        raise NotImplementedError

    def rows(self, trouble: Counter[str]) -> Iterator[Row]:
        """Yield the rows that pass the filters; count what cannot be read in `trouble`.

        Raises InputError where the source does not have what they filter by.
        """
        for row, _ in self.rows_passing([self.filters], trouble):
            yield row

    def rows_passing(self, filters: Sequence[Filters], trouble: Counter[str]) -> Passing:
        """Yield what `rows` would with any of several filters, and the places of those it passes.

        All filter by the same columns. The file is read once. Raises what `rows` would with one
        of them.
        """
        raise NotImplementedError

    def images(self, wanted: Wanted) -> Iterator[tuple[int, bytes | None]]:
        """Yield (index, encoded image) of the wanted rows in order; None where there is none."""
        raise NotImplementedError

    def select(self, wants: Callable[[Row], bool], trouble: Counter[str]) -> Selected:
        """Yield the wanted rows with their encoded images."""
        rows = {row.index: row for row in self.rows(trouble) if wants(row)}
        for index, data in self.images(dict.fromkeys(rows)) if rows else ():
            yield rows[index], data


@contextmanager
def opened(path: str, mode: str = "rb", **options: Any) -> Iterator[Any]:
    """Yield an open file of any file system. Raises MissingError and InputError."""
    try:
        with fsspec.open(path, mode, **options) as file:
            yield file
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from error


def file_bytes(fs: Any, path: str, where: str) -> bytes | None:
    """Return what a small file holds, None where there is none or it may not be read.

    That is one row less, not the end of the run. Raises InputError for all else.
    """
    try:
        return bytes(fs.cat_file(path))
    except (FileNotFoundError, PermissionError):
        return None
    except OSError as error:
        raise InputError(f"cannot read {where}: {error}") from error


def file_identity(path: str) -> list[Any]:
    """Return a file's path, size and time of change, as far as its file system tells them."""
    fs, inner = fsspec.core.url_to_fs(path)
    return [path, *stamp(fs.info(inner))]


def stamp(info: dict[str, Any]) -> list[Any]:
    """Return size and time of change from a file system's entry."""
    times = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "created")
    return [info.get("size"), str(next((info[name] for name in times if info.get(name)), ""))]


def as_text(value: Any) -> str | None:
    """Return a field as stripped text; None where it is missing or blank.

    Of several captions the first one counts.
    """
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return (str(value).strip() or None) if value is not None else None


def label_words(label: str) -> str:
    """Return a label as words: names of folders often have underscores for spaces."""
    return " ".join(label.replace("_", " ").split())


def caption_of(reader: Reader, row: Row) -> str | None:
    """Return a row's caption, its label as words where that stands in for one."""
    if row.caption is None and reader.labels_are_captions and row.label:
        return label_words(row.label)
    return row.caption


def tokenizable(text: str) -> str:
    """Return `text` with NULs, other controls and halves of characters as spaces.

    Tokenizers would take them for letters, or fail. Line breaks stay: they are white space.
    """
    return _UNPRINTABLE.sub(" ", text).strip()


def passes(filters: Filters, fields: Mapping[str, Any]) -> bool:
    """Return whether a sample's fields have one of the wanted values for every filter."""
    return all(as_text(fields.get(name)) in values for name, values in filters.items())


class Sieve:
    """Tells which of several filters a sample passes; all filter by the same columns."""

    def __init__(self, filters: Sequence[Filters]) -> None:
        self._filters = filters
        self.columns = sorted(filters[0])
        self._by_value: dict[str, list[int]] = {}
        for place, each in enumerate(filters):
            for value in each[self.columns[0]] if self.columns else ():
                self._by_value.setdefault(value, []).append(place)

    def passed(self, fields: Mapping[str, Any]) -> Sequence[int]:
        """Return the places of the filters that a sample's fields pass, in order."""
        if not self.columns:
            return range(len(self._filters))
        value = as_text(fields.get(self.columns[0]))
        places = self._by_value.get(value, ()) if value is not None else ()
        if len(self.columns) == 1:
            return places
        return [place for place in places if passes(self._filters[place], fields)]


def no_column(path: str, name: str, columns: Sequence[str], hint: str) -> InputError:
    """Return the error for a column that a source does not have."""
    listed = ", ".join(columns) or "none"
    return InputError(f"{path} has no {name}; its columns are: {listed}", hint=hint)


# The folders of an imagefolder that stand for splits, and not for classes.
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")
# So many rows of a table are looked at for whether what they name is there.
LOOKED_AT = 16
NOT_THERE = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError)
NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
# An image as a row has it: its bytes, or the name of its file.
Held = bytes | str | None


class Files(Protocol):
    """Where the image files lie that a table names."""

    def where(self, name: str) -> str:
        """Return where an image would lie, to tell a person."""

    def has(self, name: str) -> bool | None:
        """Return whether an image is there; None where that takes reading the whole."""

    def names(self) -> list[str]:
        """Return the names of all images, sorted."""

    def identity(self, names: Iterable[str]) -> Any:
        """Return JSON that changes when these images may be others."""

    def read(self, images: Iterable[tuple[int, Held]]) -> Iterator[tuple[int, bytes | None]]:
        """Yield the bytes of images that have numbers, None for what is not there."""


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """Images in a folder and below it, or anywhere where they are named by whole paths."""

    root: str

    def where(self, name: str) -> str:
        """Return the path of an image."""
        return name if name.startswith("/") else f"{self.root.rstrip('/')}/{name}"

    def has(self, name: str) -> bool:
        """Return whether an image is there."""
        return self._info(name) is not None

    def names(self) -> list[str]:
        """Return the names of the images right in the folder. Raises InputError."""
        fs, inner = fsspec.core.url_to_fs(self.root)
        try:
            names = [base_name(entry["name"]) for entry in fs.ls(inner, detail=True)]
        except OSError as error:
            raise InputError(f"cannot list {self.root}: {error}") from error
        return sorted(n for n in names if n.rsplit(".", 1)[-1].lower() in IMAGE_SUFFIXES)

    def identity(self, names: Iterable[str]) -> Any:
        """Return a digest over size and time of the files that have these names."""
        files, listed = hashlib.sha256(), set[str]()
        for name in names:
            fs, path = self._at(name)
            folder = folder_of(path)
            if "file" not in fs.protocol and folder not in listed:
                # Once listed, a folder's files are known without asking for each of them.
                listed.add(folder)
                with suppress(OSError):
                    fs.ls(folder)
            info = self._info(name)
            files.update(f"{name}\0{stamp(info) if info else None}\n".encode(errors="replace"))
        return [self.root, files.hexdigest()]

    def read(self, images: Iterable[tuple[int, Held]]) -> Iterator[tuple[int, bytes | None]]:
        """Yield images in the order in which they are asked for. Raises InputError."""
        for number, held in images:
            yield number, self._bytes(held) if isinstance(held, str) else held

    def _bytes(self, name: str) -> bytes | None:
        info = self._info(name)
        if info is None:
            return None
        if int(info.get("size") or 0) > IMAGE_LIMIT:
            return Unread(TOO_LARGE)
        fs, path = self._at(name)
        return file_bytes(fs, path, self.where(name))

    def _info(self, name: str) -> dict[str, Any] | None:
        """Return a file's entry; None where there is none, or another thing than a file."""
        fs, path = self._at(name)
        try:
            info: dict[str, Any] = fs.info(path)
        except NOT_THERE:
            return None
        except OSError as error:
            if error.errno in NO_NAME:
                return None
            raise InputError(f"cannot look at {self.where(name)}: {error}") from error
        return info if info["type"] == "file" else None

    def _at(self, name: str) -> tuple[Any, str]:
        """Return a file system and a path in it: names are paths there, whatever they look like."""
        fs, inner = _opened("/" if name.startswith("/") else self.root)
        return fs, name if name.startswith("/") else f"{inner}/{name}"


@cache
def _opened(folder: str) -> tuple[Any, str]:
    fs, inner = fsspec.core.url_to_fs(folder)
    return fs, str(inner).rstrip("/")


# What a column holds that images can be had of.
BYTES, PATH = "bytes", "path"


@dataclass(frozen=True, slots=True)
class Header:
    """What a table says of its columns: their names, and of some the names of their numbers.

    `kinds` says what is in them: BYTES, PATH or another type. Without any, all may be paths.
    """

    names: Sequence[str]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TableSource(Reader):
    """Samples of a file of rows with named columns; layouts derive from this.

    A layout has `header` and `records`, and `held` where images are in the file. With
    `by_folder`, a row without a label has that of the folder which its image lies in.
    """

    path: str
    columns: Columns
    filters: Filters
    files: Files | None = None
    by_folder: bool = False

    @property
    def labels_are_captions(self) -> bool:
        """Whether a label stands in where a row has no caption."""
        return self.by_folder

    def header(self) -> Header:
        """Return what the table says of its columns. Raises MissingError or InputError."""
        raise NotImplementedError

    def records(self, columns: Sequence[str], trouble: Counter[str]) -> Records:
        """Yield each row's number and columns; count rows that cannot be read in `trouble`."""
        raise NotImplementedError

    def held(self, column: str, wanted: Wanted) -> Iterator[tuple[int, Held]]:
        """Yield the wanted rows' images as the column has them."""
        last = max(wanted)
        for index, record in self.records([column], Counter()):
            if index in wanted:
                yield index, as_text(record.get(column))
            if index >= last:
                return

    def identity(self) -> Any:
        """Return the file's path, size and time, the image column; names of classes and files."""
        header = self.header()
        identity = [*file_identity(self.path), self.columns.image]
        if header.classes:
            identity.append({name: list(names) for name, names in sorted(header.classes.items())})
        image, names_files = self._image(header)
        if names_files:
            records = self.records([image], Counter())
            named = (as_text(record.get(image)) for _, record in records)
            identity.append(self._files().identity(filter(None, named)))
        return identity

    def rows_passing(self, filters: Sequence[Filters], trouble: Counter[str]) -> Passing:
        """Yield the rows that pass any of the filters, and which they pass.

        Raises InputError for a missing column, or where the first rows' images are not there.
        """
        header = self.header()
        read = self._roles(header)
        for name in filters[0]:
            self._require(header, name)
        classes = header.classes
        wanted = [{n: _or_numbers(v, classes.get(n)) for n, v in f.items()} for f in filters]
        sieve = Sieve(wanted)
        first = [_FirstImages(self.path, self._files()) for _ in filters]
        for index, record in self.records(sorted({*sieve.columns, *read.columns()}), trouble):
            if places := sieve.passed(record):
                if read.file is not None and (file := as_text(record.get(read.file))):
                    for place in places:
                        first[place].look(index, file)
                yield self._row(index, record, read), places
        for each in first:
            each.end()

    def _row(self, index: int, record: Mapping[str, Any], read: "_Roles") -> Row:
        file = _text_of(record, read.file)
        label, number = _text_of(record, read.label), None
        if label is not None and read.classes is not None:
            label, number = _class_of(label, read.classes), label
        if label is None and self.by_folder and file:
            folders = file.split("/")[:-1]
            label = next((name for name in folders if name not in SPLITS), None)
        key = _text_of(record, read.key) or (file or "").rsplit(".", 1)[0]
        url = _text_of(record, read.url)
        return Row(
            index,
            key or f"{base_name(self.path).rsplit('.', 1)[0]}:{index}",
            _text_of(record, read.caption),
            label,
            has_image=read.file is None or file is not None,
            origin=Origin(self.path, index, url) if url else None,
            number=number if label is not None else None,
        )

    def _roles(self, header: Header) -> "_Roles":
        """Return which columns are read for what. Raises InputError."""
        image, names_files = self._image(header)
        label = self._column(header, "label", LABEL_FIELDS)
        return _Roles(
            file=image if names_files else None,
            caption=self._column(header, "caption", TABLE_CAPTIONS),
            label=label,
            key=usual_column(header.names, ("key", "__key__", "id")),
            url=usual_column(header.names, ("url",)),
            classes=header.classes.get(label) if label else None,
        )

    def images(self, wanted: Wanted) -> Iterator[tuple[int, bytes | None]]:
        """Yield the encoded images of the wanted rows; warn of files that are not there."""
        names: dict[int, str] = {}

        def held() -> Iterator[tuple[int, Held]]:
            for index, image in self.held(self._image(self.header())[0], wanted):
                if isinstance(image, str):
                    names[index] = image
                yield index, image

        files, missing = self._files(), list[int]()
        for index, data in files.read(held()):
            if data is None and index in names:
                missing.append(index)
            else:
                names.pop(index, None)
            yield index, data
        if missing:
            first = min(missing)
            more = f", nor are {len(missing) - 1} more" if missing[1:] else ""
            progress.warn(
                f"{self.path}, row {first + 1}: its image {files.where(names[first])} "
                f"is not there{more}"
            )

    def _files(self) -> Files:
        return self.files or FolderFiles(folder_of(self.path))

    def _image(self, header: Header) -> tuple[str, bool]:
        """Return which column has the images, and whether it names their files."""
        name = self._column(header, "image", (*IMAGE_FIELDS, *PATH_FIELDS))
        if name is None:
            hint = "name it with --image-column; parquet of URLs is named with --metadata"
            raise no_column(self.path, "image column", header.names, hint)
        kind = header.kinds.get(name, PATH)
        if kind not in (BYTES, PATH):
            raise InputError(
                f"column {name} of {self.path} holds {kind}, not image bytes or paths",
                hint="name the column of encoded images, or of their paths, with --image-column",
            )
        return name, kind == PATH

    def _column(self, header: Header, what: str, usual: Sequence[str]) -> str | None:
        chosen: str | None = getattr(self.columns, what)
        if chosen is not None:
            self._require(header, chosen)
            return chosen
        name = usual_column(header.names, usual)
        if name is None and what in self.columns.needs and not self.by_folder:
            hint = f"name it with --{what}-column"
            raise no_column(self.path, f"{what} column", header.names, hint)
        return name

    def _require(self, header: Header, name: str) -> None:
        if name not in header.names:
            raise no_column(self.path, f"column {name}", header.names, "correct the column's name")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Roles:
    """Which columns of a table are read for what; `file` where images are files it names."""

    file: str | None
    caption: str | None
    label: str | None
    key: str | None
    url: str | None
    classes: Sequence[str] | None

    def columns(self) -> Iterator[str]:
        """Yield the columns that are read."""
        yield from filter(None, (self.file, self.caption, self.label, self.key, self.url))


@dataclass(slots=True)
class _FirstImages:
    """Whether any of the images that the first rows of a table name is there."""

    path: str
    files: Files | None
    _absent: list[tuple[int, str]] = field(default_factory=list)

    def look(self, index: int, name: str) -> None:
        """Look whether a row's image is there, if none was yet. Raises InputError."""
        if self.files is None:
            return
        if self.files.has(name) is not False:
            self.files = None
            return
        self._absent.append((index, name))
        if len(self._absent) >= LOOKED_AT:
            self.end()

    def end(self) -> None:
        """Raise InputError if there were images and none was there."""
        if self.files is None or not self._absent:
            return
        index, name = self._absent[0]
        where = f"{self.path}, row {index + 1}"
        if "://" in name:
            raise InputError(
                f"{where}: its image is {name}, which is no path",
                hint="images are downloaded from URLs in parquet that is named with --metadata",
            )
        others = f", nor are {len(self._absent) - 1} more" if self._absent[1:] else ""
        raise InputError(
            f"{where}: its image {self.files.where(name)} is not there{others}",
            hint="paths are taken from the table's folder on; say where images lie by "
            "?images=FOLDER (or TAR) behind the table's path, or name another column "
            "with --image-column",
        )


def base_name(path: str) -> str:
    """Return a file's name without its folder."""
    return path.rsplit("/", 1)[-1]


def folder_of(path: str) -> str:
    """Return the folder that a file lies in."""
    return path.rsplit("/", 1)[0] if "/" in path else "."


def usual_column(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """Return the first column with one of the usual names, whatever its case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), None)


def _text_of(record: Mapping[str, Any], column: str | None) -> str | None:
    return None if column is None else as_text(record.get(column))


def _class_of(label: str, classes: Sequence[str]) -> str | None:
    """Return the class that a number is of; None for one that is none of theirs, such as -1."""
    if label.isdecimal() and int(label) < len(classes):
        return classes[int(label)]
    return None


def _or_numbers(values: frozenset[str], classes: Sequence[str] | None) -> frozenset[str]:
    """Return the values of a filter, with the numbers of those that are names of classes."""
    numbers = [str(at) for at, name in enumerate(classes or ()) if name.strip() in values]
    return values.union(numbers)


def priority(seed: int, identity: str) -> int:
    """Return a row's place: a 64-bit number that looks random and is fixed by the seed."""
    salt = str(seed).encode()[:64]
    data = identity.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=salt).digest(), "big")


def first_met(file: str, row: int) -> str:
    """Return what decides the place in the draw of a row that was first met there."""
    return f"{tail(file)}\0{row}"


def line_for(wanted: int) -> int:
    """Return how many rows to have in line, so that every other one may be unusable."""
    return 2 * wanted + 1000


def tail(path: str) -> str:
    """Return a file's name and its folder's: what is left of a path when a source moves."""
    return "/".join(path.rsplit("/", 2)[-2:])
