"""The store: artifacts in a folder or at a URL, written whole or not at all.

A store is a folder or any fsspec URL. Every write goes to a partial name first and is
moved into place when complete, so a killed process leaves nothing that looks finished
and two processes may share a store: the last complete write of a name stands.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from slsgu_cli import progress
from slsgu_cli.errors import (
    ForeignError,
    FormatError,
    InputError,
    MissingError,
    SlsguError,
    StaleError,
)
from slsgu_cli.records.codec import canonical_json, decode, encode, parse_json, require_seal, sealed
from slsgu_cli.store.atomic import (
    UNFINISHED,
    discard,
    move,
    move_if_absent,
    partial_name,
    remedy,
    remove,
)
from slsgu_cli.store.copying import BUFFER
from slsgu_cli.store.remote import Remote
from slsgu_cli.store.tensor_format import content_digest, safetensors_header

T = TypeVar("T")
HEADER, TENSORS = "slsgu", "tensors"

# Parts of a path that would lead out of the store, or to another file system.
OUTSIDE = re.compile(r"(?:^|/)\.\.(?:/|$)|::|\0")

# Hints for a store that cannot be written, and for a damaged artifact.
ELSEWHERE = "choose another store with --store"
REMEDY = (
    "`slsgu check` says how to fix it; `slsgu check --repair` removes what a command can make again"
)

SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")

# Bytes written to find out whether the disk is full.
ROOM = 1 << 16
Arrays = dict[str, npt.NDArray[Any]]


class Store:
    """Artifacts under one folder or fsspec URL, addressed by paths relative to it."""

    def __init__(self, url: str, *, waits: bool = True) -> None:
        """Open a store; nothing has to be there, but a bucket. Raises InputError, MissingError.

        `waits` says whether this process lets another one finish what both would compute.
        """
        self.url = url
        self.waits = waits
        self._remote = Remote.open(url)
        self._fs, self.root = self._remote.fs, self._remote.root
        self.is_local = "file" in self._remote.protocols
        # A store in memory ends with the process.
        self.is_lasting = "memory" not in self._remote.protocols
        if self.is_local and Path(self.root).exists():
            self._require_folder()

    def _require_folder(self) -> None:
        """Refuse a file, and a folder without read permission, which would look empty."""
        if not Path(self.root).is_dir():
            raise InputError(f"{self.url} is a file, not a folder", hint="name a folder")
        if not os.access(self.root, os.R_OK | os.X_OK):
            raise InputError(
                f"this user may not read the store {self.url}",
                hint=f"give the user permission, or {ELSEWHERE}",
            )

    @property
    def options(self) -> dict[str, Any]:
        """The options with which fsspec opens the store."""
        return self._remote.options

    def where(self, path: str) -> str:
        """Return the full path or URL of `path`, for messages and for opening."""
        full = self._full(path)
        return full if self.is_local else str(self._fs.unstrip_protocol(full))

    def exists(self, path: str) -> bool:
        """Return whether a complete artifact is at `path`."""
        with self._explained("read", path):
            return bool(self._fs.exists(self._full(path)))

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Return the names in `folder`, sorted, without `suffix`; partial writes are left out."""
        return [
            name.removesuffix(suffix)
            for name in self._listed(folder)
            if name.endswith(suffix) and not name.startswith(UNFINISHED)
        ]

    def unfinished(self, folder: str) -> list[str]:
        """Return the partial names in `folder`: writes in progress, or abandoned."""
        return [name for name in self._listed(folder) if name.startswith(UNFINISHED)]

    def size(self, path: str) -> int:
        """Return the bytes that `path` takes, folders included."""
        return int(self._fs.du(self._full(path)))

    def changed(self, path: str) -> float:
        """Return when `path`, or any file below it, was last written, in seconds since 1970."""
        full = self._full(path)
        with self._reading(path):
            files = self._fs.find(full) or [full]
            return max(float(self._fs.modified(file).timestamp()) for file in files)

    def remove(self, path: str) -> None:
        """Remove the artifact at `path` if it is there."""
        if self.is_local:
            remove(Path(self._full(path)))
        elif self.exists(path):
            with self._explained("remove", path):
                self._fs.rm(self._full(path), recursive=True)

    @property
    def has_locks(self) -> bool:
        """Whether this process waits for others that compute what it would compute."""
        return self.waits and self.is_local

    @contextmanager
    def writing(
        self,
        path: str,
        into: Callable[[], str] | None = None,
        *,
        whole: Callable[[str], bool] | None = None,
    ) -> Iterator[str]:
        """Yield where on this machine to write `path`; put it into place if the block succeeds.

        The place is next to `path` under a partial name, or in a temporary folder if the store is
        remote. `into` is called at the end and returns another path in the same folder to use
        instead. If `whole` returns True for an artifact that is at the path by then, that artifact
        stays and the new one is dropped, so its readers lose no file. On an exception the partial
        file or folder is removed.
        """
        folder, _, name = path.rpartition("/")
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="slsgu-") as temporary:
                built = Path(temporary, name)
                with self._explained("write", path):
                    yield str(built)
                    place = into() if into else path
                    if whole is None or not whole(place):
                        self._remote.put(built, self._full(place))
            return
        partial = Path(self._full(folder), partial_name(name))
        with self._explained("write", path):
            try:
                partial.parent.mkdir(parents=True, exist_ok=True)
                yield str(partial)
                target = into() if into else path
                moved = whole is not None and move_if_absent(partial, Path(self._full(target)))
                if not moved and not (whole is not None and whole(target)):
                    move(partial, Path(self._full(target)))
            finally:
                discard(partial)

    def require_writable(self, path: str) -> None:
        """Raise InputError unless `path` can be written and the disk has space."""
        folder, _, name = path.rpartition("/")
        probe = f"{folder}/{partial_name(name)}"
        try:
            self.write_bytes(probe, bytes(ROOM))
        finally:
            with suppress(SlsguError, OSError):
                self.remove(probe)

    def write_picture(self, path: str, data: bytes) -> str | None:
        """Write a picture and return its location, or warn and return None if that fails."""
        try:
            self.write_bytes(path, data)
        except InputError as error:
            progress.warn(f"{error.message}; the picture is not saved")
            return None
        return self.where(path)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write `data` at `path`."""
        with self.writing(path) as partial:
            Path(partial).write_bytes(data)

    def read_bytes(self, path: str) -> bytes:
        """Return the content of `path`. Raises MissingError or InputError."""
        with self._reading(path):
            return bytes(self._fs.cat_file(self._full(path)))

    def file_digest(self, path: str) -> str:
        """Return the SHA-256 of a file of any size. Raises MissingError or InputError."""
        whole = hashlib.sha256()
        with self._reading(path), self._fs.open(self._full(path), "rb") as file:
            while data := file.read(BUFFER):
                whole.update(data)
        return whole.hexdigest()

    def require_digest(self, path: str, digest: str) -> None:
        """Raise InputError unless a file matches its digest."""
        if self.file_digest(path) != digest:
            raise self._damaged(path, ValueError("it does not match its digest"))

    def write_record(self, path: str, record: Any) -> None:
        """Write a record with a digest as indented JSON. Raises InputError for NaN and the like."""
        with self._finite(path):
            text = json.dumps(sealed(encode(record)), indent=1, allow_nan=False)
        self.write_bytes(path, f"{text}\n".encode())

    def read_record(self, path: str, kind: type[T]) -> T:
        """Return the record at `path`. Raises MissingError, StaleError or InputError."""
        return self._decode(path, kind, self._json(path))

    def _json(self, path: str) -> Any:
        """Return the content of the JSON file at `path`, compared with its digest."""
        data = self.read_bytes(path)
        try:
            value = parse_json(data)
        except ValueError as error:
            raise InputError(f"{self.where(path)} is not JSON: {error}", hint=REMEDY) from error
        try:
            require_seal(value)
        except FormatError:
            raise
        except ValueError as error:
            raise self._damaged(path, error) from error
        return value

    def write_tensors(
        self, path: str, arrays: Arrays, header: Any, *, keep_first: bool = False
    ) -> None:
        """Write arrays, a record as their header and digests of both to a safetensors file.

        With `keep_first`, for names derived from the inputs, a readable file that another process
        wrote in the meantime stays, and nothing is written.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        # safetensors writes the raw buffer: a transposed view would come back as other values.
        arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        with self._finite(path):
            digests = {name: content_digest(*_content(array)) for name, array in arrays.items()}
            metadata = {HEADER: canonical_json(sealed(encode(header) | {TENSORS: digests}))}

        def whole(place: str) -> bool:
            return self.stands(place, type(header))

        with self.writing(path, whole=whole if keep_first else None) as partial:
            Path(partial).touch()
            mode = Path(partial).stat().st_mode
            try:
                save_file(arrays, partial, metadata)
            except SafetensorError as error:
                # The error number of the system is only in its text.
                number = SYSTEM_ERROR.search(str(error))
                raise OSError(int(number[1]) if number else 0, str(error)) from error
            # safetensors leaves its file readable by its owner alone; a store may be shared.
            Path(partial).chmod(mode)

    def stands(self, path: str, kind: type[Any]) -> bool:
        """Return whether a whole safetensors file with such a header is at `path`."""
        with suppress(InputError, StaleError, MissingError):
            self.read_header(path, kind)
            return True
        return False

    def read_header(self, path: str, kind: type[T]) -> T:
        """Return the header of the safetensors file at `path`; no tensor is read.

        Raises MissingError, InputError where the file is damaged or foreign, StaleError.
        """
        with self._reading(path):
            size = int(self._fs.size(self._full(path)))
            try:
                content, base = safetensors_header(
                    lambda start, end: self._fs.cat_file(self._full(path), start=start, end=end),
                    size,
                )
                metadata = content.pop("__metadata__", {})
                ends = [entry["data_offsets"][1] for entry in content.values()]
                if max(ends, default=0) != size - base:
                    raise ValueError("it is not as long as its header says")
                header = parse_json(metadata.get(HEADER, "null"))
                if header is not None:
                    _digests_in(header, content)
            except FormatError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise self._damaged(path, error) from error
        if header is None:
            raise ForeignError(f"{self.where(path)} was not written by slsgu: it has no header")
        return self._decode(path, kind, header)

    def read_tensors(self, path: str, names: list[str] | None = None) -> Arrays:
        """Return the named arrays (default: all) of the safetensors file at `path`.

        Raises MissingError, and InputError where one does not match its digest.
        """
        try:
            return dict(self._tensors(path, names))
        except InputError:
            if self.is_local:
                raise
            # Perhaps only the copy in the cache was damaged; it has been removed.
            return dict(self._tensors(path, names))

    def verify(self, path: str) -> None:
        """Read all of a record or safetensors file, bypassing the cache.

        Raises MissingError, and InputError where it is damaged.
        """
        if not path.endswith(".safetensors"):
            self._json(path)
            return
        for _ in self._tensors(path, fresh=True):
            pass

    def _tensors(
        self, path: str, names: list[str] | None = None, *, fresh: bool = False
    ) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield tensors, compared with their digests. Remove a damaged copy from the cache."""
        from safetensors import SafetensorError, safe_open

        full = self._full(path)
        local = nullcontext(Path(full)) if self.is_local else self._remote.copied(full, fresh=fresh)
        with self._reading(path), local as place:
            try:
                with safe_open(str(place), "np") as file:
                    header = parse_json((file.metadata() or {}).get(HEADER, "null"))
                    digests = _digests_in(header, file.keys())
                    for name in sorted(digests) if names is None else names:
                        array = file.get_tensor(name)
                        if content_digest(*_content(array)) != digests[name]:
                            raise ValueError(f"{name} does not match its digest")
                        yield name, array
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, SlsguError):
                    raise
                if not self.is_local:
                    place.unlink(missing_ok=True)
                raise self._damaged(path, error) from error

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        with self._explained("read", path):
            try:
                yield
            except FileNotFoundError as error:
                if isinstance(error, SlsguError):
                    raise
                raise MissingError(f"there is no {self.where(path)}") from error

    @contextmanager
    def _explained(self, verb: str, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, SlsguError):
                raise
            raise InputError(
                f"cannot {verb} {self.where(path)}: {error.strerror or error}",
                hint=remedy(error, ELSEWHERE) if verb == "write" else None,
            ) from error

    @contextmanager
    def _finite(self, path: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise InputError(
                f"nothing was written to {self.where(path)}: a figure in it is not finite"
            ) from error

    def _decode(self, path: str, kind: type[T], value: Any) -> T:
        try:
            return decode(kind, value)
        except StaleError as error:
            raise StaleError(f"{self.where(path)}: {error.message}", hint=error.hint) from error

    def _damaged(self, path: str, reason: Exception) -> InputError:
        return InputError(f"{self.where(path)} is damaged: {reason}", hint=REMEDY)

    def _listed(self, folder: str) -> list[str]:
        full = self._full(folder)
        with self._explained("read", folder):
            if not self._fs.isdir(full):
                return []
            entries = [str(entry).rstrip("/") for entry in self._fs.ls(full, False)]
        # An object store may list the folder as one of its own.
        return sorted(entry.rsplit("/", 1)[-1] for entry in entries if entry != full)

    def _full(self, path: str) -> str:
        if OUTSIDE.search(path):
            raise InputError(
                f"{path!r} leads out of the store {self.url}",
                hint="the record that names this path is damaged or foreign; make it again",
            )
        return f"{self.root}/{path}" if path else self.root


def _content(array: npt.NDArray[Any]) -> tuple[str, memoryview]:
    """Return what the digest of an array covers: its number format and shape, and its bytes."""
    return f"{array.dtype.str} {list(array.shape)} ", array.reshape(-1).view(np.uint8).data


def _digests_in(header: Any, names: Collection[str]) -> dict[str, str]:
    """Return the digests of tensors in a file's header.

    Raises ValueError or KeyError where the header is damaged, or its digests are not of `names`.
    """
    require_seal(header)
    digests: dict[str, str] = header[TENSORS]
    if set(digests) != set(names):
        raise ValueError("it holds other tensors than its digests are of")
    return digests


def require(store: Store, path: str, *, what: str, run: str, near: str | None = None) -> None:
    """Raise MissingError naming `what` and the command to `run` unless `path` is in the store.

    `near` is a hint about similar names.
    """
    if store.exists(path):
        return
    if store.exists(""):
        hint = f"{near}; or run `{run}`" if near else f"run `{run}`"
        raise MissingError(f"{store.url} has no {what}", hint=hint)
    raise MissingError(
        f"there is no {what}, because there is no store {store.where('').rstrip('/')}",
        hint=f"run `{run}`, or name the store with --store or SLSGU_STORE",
    )
