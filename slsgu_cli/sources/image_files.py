"""Images that a table names: files in a folder, by absolute paths, or in a tar."""

import errno
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import fsspec

from slsgu_cli.errors import InputError
from slsgu_cli.sources.files import base_name, file_bytes, file_identity, folder_of, stamp
from slsgu_cli.sources.reader import (
    IMAGE_LIMIT,
    IMAGE_SUFFIXES,
    TOO_LARGE,
    Columns,
    SkippedImage,
)
from slsgu_cli.sources.tar import TarSource

MISSING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError)
INVALID_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
# An image as a table stores it: its bytes, or the name of its file.
ImageValue = bytes | str | None


@dataclass(frozen=True, slots=True)
class FolderImages:
    """Images in a folder and its subfolders, or anywhere if their paths are absolute."""

    root: str

    def where(self, name: str) -> str:
        """Return the path of an image."""
        return name if name.startswith("/") else f"{self.root.rstrip('/')}/{name}"

    def has(self, name: str) -> bool:
        """Return whether an image exists."""
        return self._info(name) is not None

    def names(self) -> list[str]:
        """Return the names of the images directly in the folder. Raises InputError."""
        fs, inner = fsspec.core.url_to_fs(self.root)
        try:
            names = [base_name(entry["name"]) for entry in fs.ls(inner, detail=True)]
        except OSError as error:
            raise InputError(f"cannot list {self.root}: {error}") from error
        return sorted(n for n in names if n.rsplit(".", 1)[-1].lower() in IMAGE_SUFFIXES)

    def identity(self, names: Iterable[str]) -> Any:
        """Return a digest over size and modification time of the named files."""
        files, listed = hashlib.sha256(), set[str]()
        for name in names:
            fs, path = self._locate(name)
            folder = folder_of(path)
            if "file" not in fs.protocol and folder not in listed:
                # Remote file systems cache a folder's listing: one request instead of one a file.
                listed.add(folder)
                with suppress(OSError):
                    fs.ls(folder)
            info = self._info(name)
            files.update(f"{name}\0{stamp(info) if info else None}\n".encode(errors="replace"))
        return [self.root, files.hexdigest()]

    def read(self, images: Iterable[tuple[int, ImageValue]]) -> Iterator[tuple[int, bytes | None]]:
        """Yield images in the requested order. Raises InputError."""
        for number, value in images:
            yield number, self._bytes(value) if isinstance(value, str) else value

    def _bytes(self, name: str) -> bytes | None:
        info = self._info(name)
        if info is None:
            return None
        if int(info.get("size") or 0) > IMAGE_LIMIT:
            return SkippedImage(TOO_LARGE)
        fs, path = self._locate(name)
        return file_bytes(fs, path, self.where(name))

    def _info(self, name: str) -> dict[str, Any] | None:
        """Return a file's entry; None if it does not exist or is not a file."""
        fs, path = self._locate(name)
        try:
            info: dict[str, Any] = fs.info(path)
        except MISSING:
            return None
        except OSError as error:
            if error.errno in INVALID_NAME:
                return None
            raise InputError(f"cannot look up {self.where(name)}: {error}") from error
        return info if info["type"] == "file" else None

    def _locate(self, name: str) -> tuple[Any, str]:
        """Return a file system and a path in it; a name is a path even if it looks like a URL."""
        fs, inner = _file_system("/" if name.startswith("/") else self.root)
        return fs, name if name.startswith("/") else f"{inner}/{name}"


@cache
def _file_system(folder: str) -> tuple[Any, str]:
    fs, inner = fsspec.core.url_to_fs(folder)
    return fs, str(inner).rstrip("/")


@dataclass(frozen=True, slots=True)
class TarImages:
    """Images in a tar by their names, with or without suffix."""

    path: str

    def where(self, name: str) -> str:
        """Return the name and the tar."""
        return f"{name} in {self.path}"

    def has(self, name: str) -> bool:
        """Return True: the whole tar would have to be read to know."""
        return True

    def names(self) -> list[str]:
        """Return the names of all images without suffixes, sorted."""
        rows = TarSource(self.path, Columns(), {}).rows(Counter())
        return sorted(_key(row.key) for row in rows if row.has_image)

    def identity(self, names: Iterable[str]) -> Any:
        """Return the tar's path, size and modification time."""
        return file_identity(self.path)

    def read(self, images: Iterable[tuple[int, ImageValue]]) -> Iterator[tuple[int, bytes | None]]:
        """Yield images in the requested order; from a streamed tar, in its own order."""
        values = dict(images)
        requests: dict[str, list[int]] = {}
        for number, name in values.items():
            if isinstance(name, str):
                requests.setdefault(_key(name), []).append(number)
        shard = TarSource(self.path, Columns(), {})
        rows = {
            row.index: row
            for row in shard.rows(Counter())
            if row.has_image and _key(row.key) in requests
        }
        numbers = {index: requests.pop(_key(row.key), []) for index, row in rows.items()}
        seekable = all(row.extent is not None for row in rows.values())
        order = sorted(rows, key=lambda index: numbers[index]) if seekable else [*rows]
        for part in [[index] for index in order] if seekable else [order]:
            for index, data in shard.images({i: rows[i].extent for i in part}) if part else ():
                for number in numbers[index]:
                    yield number, data
        for number, value in values.items():
            if not isinstance(value, str):
                yield number, value
            elif number in requests.get(_key(value), ()):
                yield number, None


def _key(name: str) -> str:
    """Return an image's key in a tar: its name up to the first dot."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    return f"{folder}{slash}{base.split('.', 1)[0]}"


ImageFiles = FolderImages | TarImages
