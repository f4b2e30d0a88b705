"""Read blocks of rows: decoded images with tokens, labels, captions and keys.

A block is a zarr group, written by `set_writer`. Nothing of it is taken on trust: parts
that are missing, cut short or altered are told as damage.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from slsgu_cli.errors import InputError, MissingError, StaleError
from slsgu_cli.records import DataRef
from slsgu_cli.samples import Origin
from slsgu_cli.store import Store

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]
Digests = npt.NDArray[np.uint8]

ARRAYS = ("images", "tokens", "labels", "keys", "captions", "source_digests", "origins")
# What zarr and its codecs raise on a group that is cut short, altered or no group.
DAMAGE = (ValueError, KeyError, TypeError, RuntimeError, OSError)


@dataclass(frozen=True)
class DataBlock:
    """A block of rows, opened for reading; safe to read from several threads."""

    where: str
    group: zarr.Group = field(repr=False)
    attributes: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, store: Store, ref: DataRef) -> "DataBlock":
        """Open the block that `ref` names.

        Raises MissingError, InputError where it is damaged, and StaleError where it holds
        other rows than when `ref` was written.
        """
        block = cls.at(store, ref.path)
        if block.attributes["fingerprint"] != ref.fingerprint:
            raise StaleError(
                f"{block.where} was built anew since and holds other rows",
                hint="run `slsgu build-sets` again for this set",
            )
        return block

    @classmethod
    def at(cls, store: Store, path: str) -> "DataBlock":
        """Open whatever complete block stands at `path`. Raises MissingError or InputError."""
        where = store.where(path)
        if not store.exists(path):
            raise MissingError(
                f"there is no {where}", hint="run `slsgu build-sets` again for this set"
            )
        with _undamaged(where):
            location: Any = LocalStore(where, read_only=True) if store.is_local else where
            group = zarr.open_group(location, mode="r", zarr_format=3)
            block = cls(where, group, dict(group.attrs))
            block._check()
        return block

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return int(self.attributes["rows"])

    @property
    def chunk_rows(self) -> int:
        """How many images lie together; ranges that begin at multiples of it read fastest."""
        return int(self._array("images").chunks[0])

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes that `labels` index; empty for forget and retain sets."""
        return tuple(self.attributes.get("class_names", ()))

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompt templates, with `{}` for the class name."""
        return tuple(self.attributes.get("templates", ()))

    def images(self, start: int, stop: int) -> Pixels:
        """Return rows `start` to `stop` as uint8 (rows, height, width, 3)."""
        with _undamaged(self.where):
            return np.asarray(self._array("images")[start:stop])

    def take(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Pixels:
        """Return the rows at `indices`, in that order, as uint8 (rows, height, width, 3)."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.rows):
            raise IndexError(f"rows go from 0 to {self.rows - 1}")
        images, size = self._array("images"), self.chunk_rows
        taken = np.empty((len(wanted), *images.shape[1:]), dtype=np.uint8)
        for chunk in np.unique(wanted // size):
            there = wanted // size == chunk
            start = int(chunk) * size
            taken[there] = self.images(start, start + size)[wanted[there] - start]
        return taken

    @cached_property
    def tokens(self) -> Ints:
        """Token ids, int32 (rows, length); length 0 for evaluation sets."""
        values: Ints = self._read("tokens")
        return values

    @cached_property
    def labels(self) -> Ints:
        """Class index of each row, int32 (rows,); -1 where it has none."""
        values: Ints = self._read("labels")
        return values

    @cached_property
    def keys(self) -> list[str]:
        """What each row is called in its source."""
        return [str(key) for key in _unpack(self._read("keys"))]

    @cached_property
    def captions(self) -> list[str]:
        """The caption of each row; empty where it has none."""
        return [str(caption) for caption in _unpack(self._read("captions"))]

    @cached_property
    def origins(self) -> list[Origin | None]:
        """Where each row was first met; None where nothing but the key is known of it."""
        found = _unpack(self._read("origins"))
        return [None if origin is None else Origin(*origin) for origin in found]

    @cached_property
    def source_digests(self) -> Digests:
        """A digest of each row's encoded image, uint8 (rows, 16)."""
        values: Digests = self._read("source_digests")
        return values

    def _read(self, name: str) -> Any:
        with _undamaged(self.where):
            return np.asarray(self._array(name)[...])

    def _array(self, name: str) -> Any:
        return self.group[name]

    def _check(self) -> None:
        """Raise ValueError unless every part is there: zarr reads absent chunks as zeros."""
        if self.attributes.get("complete") is not True:
            raise ValueError("it is not complete")
        for name in ARRAYS:
            array = self._array(name)
            if array.size and array.nchunks_initialized != array.nchunks:
                raise ValueError(f"{name} lacks {array.nchunks - array.nchunks_initialized} chunks")
        if self._array("images").shape[0] != self.rows:
            raise ValueError("it has not as many images as rows")


@contextmanager
def _undamaged(where: str) -> Iterator[None]:
    try:
        yield
    except (InputError, MissingError):
        raise
    except DAMAGE as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{where} is damaged: {reason}",
            hint="remove it and run `slsgu build-sets` again for this set",
        ) from error


def _unpack(data: npt.NDArray[np.uint8]) -> list[Any]:
    return list(json.loads(data.tobytes()))
