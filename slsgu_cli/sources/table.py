"""Samples in a file of rows with named columns; formats derive from `TableSource`.

A format lists its columns and rows. Images are in the file, or are files that it names.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, ClassVar, Self

import fsspec

from slsgu_cli import progress
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.sets import Origin
from slsgu_cli.sources.files import base_name, file_identity, folder_of
from slsgu_cli.sources.image_files import FolderImages, ImageFiles, ImageValue, TarImages
from slsgu_cli.sources.reader import (
    CAPTION_FIELDS,
    LABEL_FIELDS,
    SPLITS,
    Columns,
    Filters,
    Reader,
    Row,
    Wanted,
    matches,
    no_column,
)
from slsgu_cli.sources.tar import TarSource
from slsgu_cli.sources.texts import as_text

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
# open_clip's tables name their captions `title`.
TABLE_CAPTIONS = (*CAPTION_FIELDS, "title", "comment")
# `?images=` after a table names the place of its images.
IMAGES = "images"
# The number of first rows to check for existing images.
CHECKED_ROWS = 16

# Each row's number and columns.
Records = Iterator[tuple[int, Mapping[str, Any]]]

# The kinds of columns that images can be read from.
BYTES, PATH = "bytes", "path"


@dataclass(frozen=True, slots=True)
class Header:
    """The columns of a table; `classes` are the names that the file gives to class numbers.

    `kinds` are the columns' types: BYTES, PATH or another one. Without them, any may hold paths.
    """

    names: Sequence[str]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TableSource(Reader):
    """Samples in a file of rows with named columns.

    A format implements `header` and `records`, and `image_values` if it contains images. With
    `by_folder`, a row without a label has the name of its image's folder as label.
    `image_folders` are the usual image folders, relative to the table, by patterns of its name.
    """

    files: ImageFiles | None = None
    image_folders: ClassVar[Mapping[str, Sequence[str]]] = {}

    @classmethod
    def open(cls, path: str, columns: Columns, filters: Filters, by_folder: bool = False) -> Self:
        """Return the reader of a table, with its images where `?images=` says. Raises MissingError.

        Without `?images=`, they are in the usual folder for the table's name, else in its own.
        """
        places = filters.get(IMAGES)
        files = _image_files(places) if places else FolderImages(cls._usual_folder(path))
        others = {name: values for name, values in filters.items() if name != IMAGES}
        return cls(path, columns, others, by_folder, files)

    @classmethod
    def _usual_folder(cls, path: str) -> str:
        folder = folder_of(path)
        for pattern, places in cls.image_folders.items():
            match = re.fullmatch(pattern, base_name(path).lower())
            for place in places if match else ():
                candidate = f"{folder}/{place.format(*match.groups())}" if match else ""
                fs, inner = fsspec.core.url_to_fs(candidate)
                if fs.isdir(inner):
                    return candidate
        return folder

    def header(self) -> Header:
        """Return the table's columns. Raises MissingError or InputError."""
        raise NotImplementedError

    def records(self, columns: Sequence[str], skipped: Counter[str]) -> Records:
        """Yield each row's number and columns; count unreadable rows in `skipped`."""
        raise NotImplementedError

    def image_values(self, column: str, wanted: Wanted) -> Iterator[tuple[int, ImageValue]]:
        """Yield the requested rows' images as the column stores them."""
        last = max(wanted)
        for index, record in self.records([column], Counter()):
            if index in wanted:
                yield index, as_text(record.get(column))
            if index >= last:
                return

    def identity(self) -> Any:
        """Return the identities of the file and its images, the image column and class names."""
        header = self.header()
        identity = [*file_identity(self.path), self.columns.image]
        if header.classes:
            identity.append({name: list(names) for name, names in sorted(header.classes.items())})
        image, names_files = self._image_column(header)
        if names_files:
            records = self.records([image], Counter())
            paths = (as_text(record.get(image)) for _, record in records)
            identity.append(self._files().identity(filter(None, paths)))
        return identity

    def rows(self, skipped: Counter[str]) -> Iterator[Row]:
        """Yield the rows that match the filters; count unreadable ones in `skipped`.

        Raises InputError for a missing column, or if no image of the first rows exists.
        """
        header = self.header()
        roles = self._roles(header)
        filters = {}
        for name, values in self.filters.items():
            self._require(header, name)
            filters[name] = _with_numbers(values, header.classes.get(name))
        records = self.records(sorted({*filters, *roles.values()}), skipped)
        matching = (record for record in records if matches(filters, record[1]))
        first = list(islice(matching, CHECKED_ROWS))
        if "file" in roles:
            self._require_images(first, roles["file"])
        classes = header.classes.get(roles.get("label", ""))
        for index, record in chain(first, matching):
            yield self._row(index, record, roles, classes)

    def _row(
        self,
        index: int,
        record: Mapping[str, Any],
        roles: Mapping[str, str],
        classes: Sequence[str] | None,
    ) -> Row:
        texts = {role: as_text(record.get(column)) for role, column in roles.items()}
        file, label, url = texts.get("file"), texts.get("label"), texts.get("url")
        number = None
        if label is not None and classes is not None:
            label, number = _class_name(label, classes), label
        if label is None and self.by_folder and file:
            folders = file.split("/")[:-1]
            label = next((name for name in folders if name not in SPLITS), None)
        key = texts.get("key") or (file or "").rsplit(".", 1)[0]
        return Row(
            index,
            key or f"{base_name(self.path).rsplit('.', 1)[0]}:{index}",
            texts.get("caption"),
            label,
            has_image="file" not in roles or file is not None,
            origin=Origin(self.path, index, url) if url else None,
            number=number if label is not None else None,
        )

    def _roles(self, header: Header) -> dict[str, str]:
        """Return the columns to read by their roles; `file` if images are files."""
        image, names_files = self._image_column(header) if self.columns.images else (None, False)
        columns = {
            "file": image if names_files else None,
            "caption": self._column(header, "caption", TABLE_CAPTIONS),
            "label": self._column(header, "label", LABEL_FIELDS),
            "key": usual_column(header.names, ("key", "__key__", "id")),
            "url": usual_column(header.names, ("url",)),
        }
        return {role: column for role, column in columns.items() if column is not None}

    def _require_images(
        self, records: Sequence[tuple[int, Mapping[str, Any]]], column: str
    ) -> None:
        """Raise InputError if the records name images and none of them exists."""
        files = self._files()
        named = [
            (index, file) for index, record in records if (file := as_text(record.get(column)))
        ]
        if not named or any(files.has(file) for _, file in named):
            return
        index, file = named[0]
        where = f"{self.path}, row {index + 1}"
        if "://" in file:
            raise InputError(
                f"{where}: its image {file} is a URL, not a path",
                hint="name parquet files of URLs with --metadata to download their images",
            )
        raise InputError(
            f"{where}: its image {files.where(file)} does not exist",
            hint="paths are relative to the table's folder; name another folder (or a tar) with "
            "?images=FOLDER after the table's path, or another column with --image-column",
        )

    def images(self, wanted: Wanted) -> Iterator[tuple[int, bytes | None]]:
        """Yield the encoded images of the requested rows; warn about the first missing file."""
        names: dict[int, str] = {}

        def values() -> Iterator[tuple[int, ImageValue]]:
            column, _ = self._image_column(self.header())
            for index, image in self.image_values(column, wanted):
                if isinstance(image, str):
                    names[index] = image
                yield index, image

        files, warned = self._files(), False
        for index, data in files.read(values()):
            if data is None and index in names and not warned:
                warned = True
                progress.warn(
                    f"{self.path}, row {index + 1}: "
                    f"its image {files.where(names[index])} does not exist"
                )
            yield index, data

    def _files(self) -> ImageFiles:
        return self.files or FolderImages(folder_of(self.path))

    def _image_column(self, header: Header) -> tuple[str, bool]:
        """Return the column of images, and whether it contains paths."""
        name = self._column(header, "image", (*IMAGE_FIELDS, *PATH_FIELDS))
        if name is None:
            hint = "name it with --image-column; name parquet files of URLs with --metadata"
            raise no_column(self.path, "image column", header.names, hint)
        kind = header.kinds.get(name, PATH)
        if kind not in (BYTES, PATH):
            raise InputError(
                f"column {name} of {self.path} holds {kind}, not image bytes or paths",
                hint="name the column of encoded images, or of their paths, with --image-column",
            )
        return name, kind == PATH

    def _column(self, header: Header, role: str, usual: Sequence[str]) -> str | None:
        chosen: str | None = getattr(self.columns, role)
        if chosen is not None:
            self._require(header, chosen)
            return chosen
        name = usual_column(header.names, usual)
        if name is None and role in self.columns.needs and not self.by_folder:
            hint = f"name it with --{role}-column"
            raise no_column(self.path, f"{role} column", header.names, hint)
        return name

    def _require(self, header: Header, name: str) -> None:
        if name not in header.names:
            raise no_column(self.path, f"column {name}", header.names, "correct the column's name")


def _image_files(places: frozenset[str]) -> ImageFiles:
    """Return the images in the folder or tar that `?images=` names. Raises MissingError."""
    (place, *more) = sorted(places)
    fs, inner = fsspec.core.url_to_fs(place)
    if more or not fs.exists(inner):
        raise MissingError(
            f"?{IMAGES}= names {'several places' if more else f'{place}, which does not exist'}",
            hint="name one folder, or one tar, that contains the images of the table",
        )
    return TarImages(place) if TarSource.recognises(place) else FolderImages(place)


def usual_column(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """Return the first column with one of the usual names, in upper or lower case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in usual if name in lower), None)


def _class_name(label: str, classes: Sequence[str]) -> str | None:
    """Return the class with a number; None for a number without a class, such as -1."""
    if label.isdecimal() and int(label) < len(classes):
        return classes[int(label)]
    return None


def _with_numbers(values: frozenset[str], classes: Sequence[str] | None) -> frozenset[str]:
    """Return the values of a filter, and the numbers of those that are class names."""
    numbers = [str(number) for number, name in enumerate(classes or ()) if name.strip() in values]
    return values.union(numbers)
