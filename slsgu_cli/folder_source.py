"""Read samples from a folder of images, with same-named `.txt` captions where there are any.

The name of the folder that an image lies in, right below the source folder, is its label.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec

from slsgu_cli.errors import InputError
from slsgu_cli.samples import (
    IMAGE_SUFFIXES,
    Filters,
    Row,
    Wanted,
    as_text,
    no_column,
    passes,
    stamp,
)

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
    entries = sorted(fs.ls(folder, detail=True), key=lambda entry: str(entry["name"]))
    visible = [entry for entry in entries if not _base(entry).startswith(".")]
    captions = {
        str(entry["name"])[: -len(".txt")]: entry
        for entry in visible
        if str(entry["name"]).lower().endswith(".txt")
    }
    for entry in visible:
        stem, _, suffix = str(entry["name"]).rpartition(".")
        if entry["type"] != "directory" and suffix.lower() in IMAGE_SUFFIXES:
            yield entry, captions.get(stem)
    for entry in visible:
        if entry["type"] == "directory":
            yield from _walk(fs, str(entry["name"]))


def _base(entry: Entry) -> str:
    return str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
