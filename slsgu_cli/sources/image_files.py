"""Image files that a table names: in a folder, or anywhere by absolute paths."""

import errno
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import fsspec

from slsgu_cli.errors import InputError
from slsgu_cli.sources.files import base_name, file_bytes, folder_of, stamp
from slsgu_cli.sources.reader import IMAGE_LIMIT, IMAGE_SUFFIXES, TOO_LARGE, SkippedImage

MISSING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError)
INVALID_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
# An image as a table stores it: its bytes, or the name of its file.
ImageValue = bytes | str | None


class ImageFiles(Protocol):
    """The place where a table's image files lie."""

    def where(self, name: str) -> str:
        """Return an image's place, for messages."""

    def has(self, name: str) -> bool | None:
        """Return whether an image exists; None if only reading everything would show it."""

    def names(self) -> list[str]:
        """Return the names of all images, sorted."""

    def identity(self, names: Iterable[str]) -> Any:
        """Return JSON that changes when these images may have changed."""

    def read(self, images: Iterable[tuple[int, ImageValue]]) -> Iterator[tuple[int, bytes | None]]:
        """Yield the bytes of numbered images, None for missing ones."""


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
