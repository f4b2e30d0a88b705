"""The store: where artifacts lie, written whole or not at all.

A store is a folder or any fsspec URL. Every write goes to a partial name first and is
moved into place when complete, so a killed process leaves nothing that looks finished
and two processes may share a store: the last complete write of a name stands.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy.typing as npt

from slsgu_cli.errors import InputError, MissingError, SlsguError
from slsgu_cli.records import canonical_json, decode, encode

T = TypeVar("T")
HEADER = "slsgu"
PARTIAL = ".partial-"
Arrays = dict[str, npt.NDArray[Any]]


class Store:
    """Artifacts under one folder or fsspec URL, addressed by paths relative to it."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"cannot open the store {url}: {error}") from error
        self.root = str(root).rstrip("/")
        self.is_local = "file" in (
            self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        )

    def where(self, path: str) -> str:
        """Return the full path or URL of `path`, for messages and for opening."""
        return (
            f"{self.root}/{path}" if self.is_local else self._fs.unstrip_protocol(self._full(path))
        )

    def exists(self, path: str) -> bool:
        """Return whether a complete artifact stands at `path`."""
        return bool(self._fs.exists(self._full(path)))

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Return the names in `folder`, sorted, without `suffix`; partial writes are left out."""
        if not self._fs.isdir(self._full(folder)):
            return []
        found = (str(entry).rsplit("/", 1)[-1] for entry in self._fs.ls(self._full(folder), False))
        return sorted(
            name.removesuffix(suffix)
            for name in found
            if name.endswith(suffix) and not name.startswith(PARTIAL)
        )

    def size(self, path: str) -> int:
        """Return the bytes that `path` takes, folders included."""
        return int(self._fs.du(self._full(path)))

    def remove(self, path: str) -> None:
        """Remove the artifact at `path` if it is there."""
        if self.exists(path):
            self._fs.rm(self._full(path), recursive=True)

    @contextmanager
    def writing(self, path: str) -> Iterator[str]:
        """Yield a partial location for `path`; move it into place if the block succeeds.

        The location is what `where` would return for the partial name. On an exception
        the partial file or folder is removed.
        """
        folder, _, name = path.rpartition("/")
        partial = f"{folder}/{PARTIAL}{secrets.token_hex(4)}-{name}"
        try:
            self._fs.makedirs(self._full(folder), exist_ok=True)
            yield self.where(partial)
            self._replace(partial, path)
        except OSError as error:
            if isinstance(error, SlsguError):
                raise
            raise InputError(
                f"cannot write {self.where(path)}: {error.strerror or error}",
                hint="free some space or choose another store with --store",
            ) from error
        finally:
            if self._fs.exists(self._full(partial)):
                self._fs.rm(self._full(partial), recursive=True)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write `data` at `path`."""
        with self.writing(path) as partial, fsspec.open(partial, "wb") as file:
            file.write(data)

    def read_bytes(self, path: str) -> bytes:
        """Return the content of `path`. Raises MissingError."""
        try:
            return bytes(self._fs.cat_file(self._full(path)))
        except FileNotFoundError as error:
            raise MissingError(f"there is no {self.where(path)}") from error

    def write_record(self, path: str, record: Any) -> None:
        """Write a record as indented JSON at `path`."""
        self.write_bytes(path, (json.dumps(encode(record), indent=1) + "\n").encode())

    def read_record(self, path: str, kind: type[T]) -> T:
        """Return the record at `path`. Raises MissingError, StaleError or InputError."""
        try:
            value = json.loads(self.read_bytes(path))
        except ValueError as error:
            raise InputError(f"{self.where(path)} is not JSON: {error}") from error
        return decode(kind, value)

    def write_tensors(self, path: str, arrays: Arrays, header: Any) -> None:
        """Write arrays with a record as their header to a safetensors file at `path`."""
        from safetensors.numpy import save, save_file

        metadata = {HEADER: canonical_json(header)}
        with self.writing(path) as partial:
            if self.is_local:
                save_file(arrays, partial, metadata)
            else:
                with fsspec.open(partial, "wb") as file:
                    file.write(save(arrays, metadata))

    def read_header(self, path: str, kind: type[T]) -> T:
        """Return the header of the safetensors file at `path`."""
        with self._tensor_file(path) as file:
            metadata: Mapping[str, str] = file.metadata() or {}
        if HEADER not in metadata:
            raise InputError(f"{self.where(path)} was not written by slsgu: it has no header")
        return decode(kind, json.loads(metadata[HEADER]))

    def read_tensors(self, path: str, names: list[str] | None = None) -> Arrays:
        """Return the named arrays (default: all) of the safetensors file at `path`."""
        with self._tensor_file(path) as file:
            return {name: file.get_tensor(name) for name in names or sorted(file.keys())}

    @contextmanager
    def _tensor_file(self, path: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        if not self.exists(path):
            raise MissingError(f"there is no {self.where(path)}")
        local = self.where(path) if self.is_local else self._download(path)
        try:
            with safe_open(local, "np") as file:
                yield file
        except SafetensorError as error:
            raise InputError(
                f"{self.where(path)} is damaged: {error}",
                hint="remove it and run the command that wrote it again",
            ) from error

    def _download(self, path: str) -> str:
        return str(fsspec.open_local(f"simplecache::{self.where(path)}"))

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _replace(self, partial: str, path: str) -> None:
        source, target = self._full(partial), self._full(path)
        if self.is_local and Path(source).is_file():
            Path(source).replace(target)
            return
        if self._fs.exists(target):
            self._fs.rm(target, recursive=True)
        self._fs.mv(source, target, recursive=self._fs.isdir(source))


def require(store: Store, path: str, *, what: str, run: str) -> None:
    """Raise MissingError naming `what` and the command to `run` unless `path` is in the store."""
    if not store.exists(path):
        raise MissingError(f"{store.url} has no {what}", hint=f"run `{run}`")
