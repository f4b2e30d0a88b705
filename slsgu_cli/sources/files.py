"""Files on any file system of fsspec: opened, identified, with errors that name the path."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from slsgu_cli.errors import InputError, MissingError


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
    """Return the content of a small file, None if it does not exist or may not be read.

    A missing file costs one row and does not end the run. Raises InputError for other errors.
    """
    try:
        return bytes(fs.cat_file(path))
    except (FileNotFoundError, PermissionError):
        return None
    except OSError as error:
        raise InputError(f"cannot read {where}: {error}") from error


def file_identity(path: str) -> list[Any]:
    """Return a file's path, size and modification time; empty where its file system has none."""
    fs, inner = fsspec.core.url_to_fs(path)
    return [path, *stamp(fs.info(inner))]


def stamp(info: dict[str, Any]) -> list[Any]:
    """Return size and modification time from a file system's entry."""
    times = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "created")
    return [info.get("size"), str(next((info[name] for name in times if info.get(name)), ""))]


def base_name(path: str) -> str:
    """Return a file's name without its folder."""
    return path.rsplit("/", 1)[-1]


def folder_of(path: str) -> str:
    """Return the folder that contains a file."""
    return path.rsplit("/", 1)[0] if "/" in path else "."
