"""Folders of images, with captions in text files or class folders."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec

from slsgu_cli.errors import InputError
from slsgu_cli.sources.files import base_name, file_bytes, stamp
from slsgu_cli.sources.formats import ACCEPTED, SUFFIXES
from slsgu_cli.sources.reader import (
    IMAGE_LIMIT,
    IMAGE_SUFFIXES,
    TEXT_LIMIT,
    TOO_LARGE,
    Reader,
    Row,
    Wanted,
    matches,
    no_column,
)
from slsgu_cli.sources.texts import as_text

FIELDS = ("key", "caption", "label")
Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class FolderSource(Reader):
    """Images of one folder and its subfolders, in the order of their names."""

    by_folder: bool = True

    def identity(self) -> Any:
        """Return the path and a digest over every image's and caption's size and time."""
        files, count = hashlib.sha256(), 0
        for _, (image, caption) in self._entries():
            count += 1
            stamps = [image["name"], stamp(image), stamp(caption) if caption else None]
            files.update(json.dumps(stamps).encode())
        return [self.path, count, files.hexdigest()]

    def rows(self, skipped: Counter[str]) -> Iterator[Row]:
        """Yield the rows that match the filters.

        Raises InputError for an unknown filter, and if the folder contains no images.
        """
        for name in self.filters:
            if name not in FIELDS:
                raise no_column(self.path, f"column {name}", FIELDS, "filter a folder by its label")
        index = None
        for index, (image, caption) in self._entries():
            if _size(image) > IMAGE_LIMIT or _size(caption) > TEXT_LIMIT:
                skipped[TOO_LARGE] += 1
                continue
            relative = self._relative(image)
            label = relative.split("/")[0] if "/" in relative else None
            text = as_text(self._read(caption)) if caption else None
            key = relative.rsplit(".", 1)[0]
            if matches(self.filters, {"key": key, "caption": text, "label": label}):
                yield Row(index, key, text, label)
        if index is None:
            raise self._no_images()

    def images(self, wanted: Wanted) -> Iterator[tuple[int, bytes | None]]:
        """Yield the encoded images of the requested rows."""
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
        """Yield the number of every image, and its entry with that of its caption file."""
        fs, inner = fsspec.core.url_to_fs(self.path)
        try:
            yield from enumerate(_walk(fs, str(inner)))
        except OSError as error:
            raise InputError(f"cannot list {self.path}: {error}") from error

    def _no_images(self) -> InputError:
        fs, inner = fsspec.core.url_to_fs(self.path)
        names = fs.find(inner, maxdepth=3)
        below = sorted(name for name in names if name.lower().endswith(SUFFIXES))
        hint = f"name a file in it, such as {below[0]}" if below else ACCEPTED
        return InputError(f"there are no images in {self.path}", hint=hint)


def _walk(fs: Any, folder: str) -> Iterator[tuple[Entry, Entry | None]]:
    """Yield the images of `folder`, then those of each folder in it, sorted by name."""
    folders = [folder]
    while folders:
        entries = sorted(fs.ls(folders.pop(), detail=True), key=lambda entry: str(entry["name"]))
        visible = [e for e in entries if not base_name(str(e["name"]).rstrip("/")).startswith(".")]
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
    """Return whether an entry is a file or a link to one. Opening a pipe would block forever."""
    return bool(entry["type"] == "file" or (entry["type"] == "other" and fs.isfile(entry["name"])))


def _size(entry: Entry | None) -> int:
    return int((entry or {}).get("size") or 0)
