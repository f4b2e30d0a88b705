"""Blocks of rows: images, tokens, captions and labels as zarr arrays, written and read.

Rows made from words have no image. Their block holds a feature of each instead, which stands in
for that of an image.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import astuple, dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import FsspecStore, LocalStore

from slsgu_cli.errors import FormatError, InputError, MissingError, NoImagesError, StaleError
from slsgu_cli.records.codec import parse_json, require_seal, sealed
from slsgu_cli.records.sets import DataRef, Origin
from slsgu_cli.store.store import Store
from slsgu_cli.text import reason_of

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]
BY_ROW = ("tokens", "labels", "keys", "captions", "source_digests", "origins")
IMAGES, FEATURES = "images", "features"
LAYOUT = "layout"

# Errors of zarr and its codecs for a group that is truncated, altered or not a group.
DAMAGE = (ValueError, KeyError, TypeError, RuntimeError, OSError)
BUILD_AGAIN = "run `slsgu build-sets` again for this set"


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
            rebuilt = f"{block.where} has been rebuilt since and holds other rows"
            raise StaleError(rebuilt, hint=BUILD_AGAIN)
        return block

    @classmethod
    def at(cls, store: Store, path: str) -> "DataBlock":
        """Open the complete block at `path`. Raises MissingError or InputError."""
        where = store.where(path)
        # A remote block arrives file by file, and the file with its attributes comes last.
        if not store.exists(path if store.is_local else f"{path}/zarr.json"):
            raise MissingError(f"there is no {where}", hint=BUILD_AGAIN)
        with _undamaged(where):
            location = _location(store, path)
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
        """How many rows are stored together; ranges that begin at its multiples read fastest."""
        return int(self._arrays[self.content].chunks[0])

    @property
    def content(self) -> str:
        """Whether the rows have images or features."""
        return IMAGES if IMAGES in self.attributes[LAYOUT] else FEATURES

    @property
    def has_images(self) -> bool:
        """Whether the rows have images."""
        return self.content == IMAGES

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes that `labels` index; empty for forget and retain sets."""
        return tuple(self.attributes.get("class_names", ()))

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompt templates, with `{}` for the class name."""
        return tuple(self.attributes.get("templates", ()))

    def images(self, start: int, stop: int) -> Pixels:
        """Return rows `start` to `stop` as uint8 (rows, height, width, 3).

        Raises NoImagesError.
        """
        self.require_images()
        return self.content_of(start, stop)

    def take(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Pixels:
        """Return the rows at `indices`, in that order, as uint8 (rows, height, width, 3).

        Raises NoImagesError.
        """
        self.require_images()
        return self.content_at(indices)

    def require_images(self) -> None:
        """Raise NoImagesError where the rows have no images."""
        if not self.has_images:
            raise NoImagesError(
                f"{self.where} was made from words and has no images",
                hint="name images for this: `slsgu build-sets` with --source, or --eval",
            )

    def content_of(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows `start` to `stop` of the images or of the features, fp32 (rows, width)."""
        with _undamaged(self.where):
            return np.asarray(self._arrays[self.content][start:stop])

    def content_at(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
        """Return the rows at `indices`, in that order, of the images or of the features."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.rows):
            raise IndexError(f"rows go from 0 to {self.rows - 1}")
        array, size = self._arrays[self.content], self.chunk_rows
        rows = np.empty((len(wanted), *array.shape[1:]), dtype=array.dtype)
        for chunk in np.unique(wanted // size):
            there = wanted // size == chunk
            start = int(chunk) * size
            rows[there] = self.content_of(start, start + size)[wanted[there] - start]
        return rows

    @property
    def anchors(self) -> Ints | None:
        """Token ids of what the captions are to become, int32 (rows, length), if known."""
        return None

    @cached_property
    def tokens(self) -> Ints:
        """Token ids, int32 (rows, length); length 0 for evaluation sets."""
        return self._read("tokens")

    @cached_property
    def labels(self) -> Ints:
        """Class index of each row, int32 (rows,); -1 where it has none."""
        return self._read("labels")

    @cached_property
    def keys(self) -> list[str]:
        """The key of each row in its source."""
        return [str(key) for key in self._read_list("keys")]

    @cached_property
    def captions(self) -> list[str]:
        """The caption of each row; empty where it has none."""
        return [str(caption) for caption in self._read_list("captions")]

    @cached_property
    def origins(self) -> list[Origin | None]:
        """Where each row was first found; None if only its key is known."""
        origins = self._read_list("origins")
        return [None if origin is None else Origin(*origin) for origin in origins]

    @cached_property
    def source_digests(self) -> npt.NDArray[np.uint8]:
        """A digest of each row's encoded image, uint8 (rows, 16)."""
        return self._read("source_digests")

    def verify(self) -> None:
        """Read every row.

        Raises InputError where one is damaged, or the rows are not those of the fingerprint.
        """
        with _undamaged(self.where):
            pixels: list[bytes] = []
            for start in range(0, self.rows, self.chunk_rows):
                pixels += _row_digests(self.content_of(start, start + self.chunk_rows))
            counted = {name: len(getattr(self, name)) for name in BY_ROW}
            if others := [name for name, count in counted.items() if count != self.rows]:
                raise ValueError(f"it has fewer or more {others[0]} than rows")
            size = self._arrays[self.content].shape[1:3]
            fingerprint = _fingerprint(size, pixels, self.tokens, self.labels, self.attributes)
            if fingerprint != self.attributes["fingerprint"]:
                raise ValueError("its rows do not match its fingerprint")

    def _read(self, name: str) -> npt.NDArray[Any]:
        with _undamaged(self.where):
            return np.asarray(self._arrays[name][...])

    def _read_list(self, name: str) -> list[Any]:
        return list(parse_json(self._read(name).tobytes()))

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        return {name: self.group[name] for name in (self.content, *BY_ROW)}

    def _check(self) -> None:
        """Raise ValueError unless every chunk exists, because zarr reads absent chunks as zeros.

        zarr compares the checksum of each chunk when it reads it.
        """
        if self.attributes.get("complete") is not True:
            raise ValueError("it is not complete")
        require_seal(self.attributes)
        if self.attributes[LAYOUT] != _layout(self._arrays):
            raise ValueError("the layout of its arrays differs from its attributes")
        for name, array in self._arrays.items():
            if array.size and array.nchunks_initialized != array.nchunks:
                raise ValueError(f"{name} lacks {array.nchunks - array.nchunks_initialized} chunks")
        if self._arrays[self.content].shape[0] != self.rows:
            raise ValueError(f"it has fewer or more {self.content} than rows")


@dataclass(frozen=True)
class RepeatedBlock(DataBlock):
    """The rows of a block, repeated with other tokens.

    `other_tokens` are int32 (times * rows, length), and `becoming` (rows, length) of all rows.
    """

    other_tokens: Ints = field(repr=False)
    becoming: Ints | None = field(repr=False)

    @classmethod
    def of(
        cls, block: DataBlock, other_tokens: Ints, becoming: Ints | None = None
    ) -> "RepeatedBlock":
        """Return the rows of a block, then again with each of these tokens."""
        return cls(block.where, block.group, block.attributes, other_tokens, becoming)

    @property
    def anchors(self) -> Ints | None:
        """Token ids of what the captions are to become, int32 (rows, length), if known."""
        return self.becoming

    @property
    def rows(self) -> int:
        """How many rows there are, including repetitions."""
        return super().rows + len(self.other_tokens)

    def content_of(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows `start` to `stop` of the images or of the features."""
        once, parts = super().rows, [super().content_of(0, 0)]
        while start < stop:
            first = start % once
            last = min(once, first + stop - start)
            parts.append(super().content_of(first, last))
            start += last - first
        return np.concatenate(parts)

    @cached_property
    def tokens(self) -> Ints:
        """Token ids, int32 (rows, length)."""
        return np.concatenate([super().tokens, self.other_tokens])

    @cached_property
    def keys(self) -> list[str]:
        """The key of each row in its source."""
        once = super().keys
        return once * (self.rows // len(once))


def _layout(arrays: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the number format, the shape and the shape of a chunk of each array."""
    return {n: [str(a.dtype), list(a.shape), list(a.chunks)] for n, a in arrays.items()}


def _location(store: Store, path: str) -> LocalStore | FsspecStore:
    """Return the zarr store of a block."""
    where = store.where(path)
    if store.is_local:
        return LocalStore(where, read_only=True)
    return FsspecStore.from_url(where, storage_options=store.options, read_only=True)


@dataclass(frozen=True)
class JoinedRows:
    """A few rows of several blocks, concatenated; their images stay in memory."""

    parts: tuple[tuple[DataBlock, npt.NDArray[np.integer[Any]]], ...]

    @property
    def where(self) -> str:
        """The locations of the blocks."""
        return " and ".join(block.where for block, _ in self.parts)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(len(rows) for _, rows in self.parts)

    @property
    def has_images(self) -> bool:
        """Whether the rows have images."""
        return all(block.has_images for block, _ in self.parts)

    def content_at(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
        """Return the rows at `indices`, in that order, of the images."""
        return self.take(indices)

    @property
    def captions(self) -> list[str]:
        """The caption of each row; empty where it has none."""
        return [block.captions[row] for block, rows in self.parts for row in rows]

    def take(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Pixels:
        """Return the rows at `indices`, in that order, as uint8 (rows, height, width, 3)."""
        return self._images[np.asarray(indices, dtype=np.int64)]

    @cached_property
    def _images(self) -> Pixels:
        return np.concatenate([block.take(rows) for block, rows in self.parts])


@contextmanager
def _undamaged(where: str) -> Iterator[None]:
    try:
        yield
    except (InputError, MissingError, FormatError):
        raise
    except DAMAGE as error:
        raise InputError(
            f"{where} is damaged: {reason_of(error)}",
            hint="`slsgu check --repair` removes it, if its sources are there; "
            "then `slsgu build-sets NAME --replay`",
        ) from error


def _row_digests(rows: npt.NDArray[Any]) -> list[bytes]:
    return [hashlib.sha256(row.data).digest() for row in rows]


def _fingerprint(
    size: Sequence[int], pixels: list[bytes], tokens: Ints, labels: Ints, attributes: dict[str, Any]
) -> str:
    """Return a digest of a block's rows.

    The images enter with their `size` (height, width) and the digests of their `pixels`;
    features with their width and their digests.
    """
    content = hashlib.sha256(repr(tuple(size)).encode() + b"".join(pixels))
    content.update(tokens.astype("<i4").tobytes())
    content.update(labels.astype("<i4").tobytes())
    measured = [list(attributes.get(name, [])) for name in ("class_names", "templates")]
    content.update(json.dumps(measured).encode())
    return content.hexdigest()[:24]


CHUNK_BYTES = 16 << 20
MIN_CHUNK_ROWS = 64

# Chunks compressed and written while the next one fills.
WRITERS = 2
DIGEST_BYTES = 16


class BlockWriter:
    """Takes rows one by one and writes them in chunks; made by `block_writer`.

    `shape` is that of a row: (height, width, 3) of an image, or (width,) of a feature.
    """

    def __init__(self, group: zarr.Group, *, shape: tuple[int, ...], rows: int) -> None:
        self.rows = 0
        self.path: str | None = None
        self._group = group
        self.content, dtype = (IMAGES, np.uint8) if len(shape) == 3 else (FEATURES, np.float32)
        chunk_rows = max(MIN_CHUNK_ROWS, CHUNK_BYTES // (np.dtype(dtype).itemsize * prod(shape)))
        self._chunk: npt.NDArray[Any] = np.empty((chunk_rows, *shape), dtype)
        # The number of rows is known at the end; `rows` is the maximum.
        whole = (max(rows, 1), *shape)
        self._rows = _create(group, self.content, whole, self._chunk.shape, str(np.dtype(dtype)))
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self._writing: list[Future[list[bytes]]] = []
        self._pixels: list[bytes] = []
        self.keys: list[str] = []
        self._captions: list[str] = []
        self._labels: list[int] = []
        self._digests: list[bytes] = []
        self._origins: list[Origin | None] = []

    def add(
        self,
        row: npt.NDArray[Any],
        *,
        key: str,
        caption: str | None = None,
        label: int = -1,
        source_digest: bytes = bytes(DIGEST_BYTES),
        origin: Origin | None = None,
    ) -> None:
        """Append a row. `source_digest` is a digest of the encoded image."""
        self._chunk[self.rows % len(self._chunk)] = row
        self.rows += 1
        self.keys.append(key)
        self._captions.append(caption or "")
        self._labels.append(label)
        self._digests.append(source_digest)
        self._origins.append(origin)
        if self.rows % len(self._chunk) == 0:
            self._write(len(self._chunk))

    def finish(
        self, tokens: Ints | None, attributes: dict[str, Any], *, path: str | None = None
    ) -> str:
        """Write the remaining rows and the attributes; return the fingerprint of the rows.

        `tokens` is (rows, length), or None for rows without tokens. `path` is the final path of
        the block, if it depends on the rows.
        """
        self.path = path
        if self.rows % len(self._chunk):
            self._write(self.rows % len(self._chunk))
        self._await(0)
        self._rows.resize((self.rows, *self._rows.shape[1:]))
        tokens = np.zeros((self.rows, 0), dtype=np.int32) if tokens is None else tokens
        labels = np.asarray(self._labels, dtype=np.int32)
        digests = np.frombuffer(b"".join(self._digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        columns: dict[str, npt.NDArray[Any]] = {
            "tokens": tokens,
            "labels": labels,
            "keys": _packed(self.keys),
            "captions": _packed(self._captions),
            "source_digests": digests,
            "origins": _packed([origin and astuple(origin) for origin in self._origins]),
        }
        arrays = {self.content: self._rows}
        for name, values in columns.items():
            # A chunk has at least one element in zarr, an array may have none.
            chunks = tuple(max(size, 1) for size in values.shape)
            arrays[name] = _create(self._group, name, values.shape, chunks, str(values.dtype))
            if values.size:
                arrays[name][:] = values
        size = self._rows.shape[1:3]
        fingerprint = _fingerprint(size, self._pixels, tokens, labels, attributes)
        content = {"rows": self.rows, "fingerprint": fingerprint, "complete": True}
        content[LAYOUT] = _layout(arrays)
        self._group.attrs.update(sealed(attributes | content))
        return fingerprint

    def close(self) -> None:
        """Wait for writes in progress and cancel the others."""
        self._pool.shutdown(cancel_futures=True)

    def _write(self, rows: int) -> None:
        """Start writing the last `rows` rows, and continue with another buffer."""
        self._await(WRITERS - 1)
        chunk = self._chunk[:rows]
        self._writing.append(self._pool.submit(self._write_chunk, self.rows - rows, chunk))
        self._chunk = np.empty_like(self._chunk)

    def _write_chunk(self, start: int, chunk: npt.NDArray[Any]) -> list[bytes]:
        """Write rows from `start` on; return the digest of each row."""
        self._rows[start : start + len(chunk)] = chunk
        return _row_digests(chunk)

    def _await(self, most: int) -> None:
        """Wait until at most `most` chunks are being written. Raises what a write raised."""
        while len(self._writing) > most:
            self._pixels += self._writing.pop(0).result()


def block_writer(
    store: Store, path: str, *, height: int, width: int, rows: int
) -> AbstractContextManager[BlockWriter]:
    """Return the context of a writer for at most `rows` images, as `row_writer`."""
    return row_writer(store, path, shape=(height, width, 3), rows=rows)


@contextmanager
def row_writer(
    store: Store, path: str, *, shape: tuple[int, ...], rows: int
) -> Iterator[BlockWriter]:
    """Yield a writer for at most `rows` rows of a shape; on success the block is at `path`.

    If `finish` gets another path, the block is there. A complete block that another process wrote
    in the meantime stays, because its path is derived from its inputs.
    """

    def whole(place: str) -> bool:
        with suppress(InputError, MissingError):
            DataBlock.at(store, place)
            return True
        return False

    with store.writing(path, lambda: writer.path or path, whole=whole) as partial:
        group = zarr.open_group(LocalStore(partial), mode="w", zarr_format=3)
        writer = BlockWriter(group, shape=shape, rows=rows)
        try:
            yield writer
        finally:
            writer.close()
        if not group.attrs.get("complete"):
            raise RuntimeError("`finish` was not called on a block")


def _create(
    group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str = "u1"
) -> Any:
    size = np.dtype(dtype).itemsize
    blosc = BloscCodec(typesize=size, cname="lz4", clevel=1, shuffle="noshuffle")
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        compressors=[blosc, Crc32cCodec()],
        # zarr would leave out black images, which a lost chunk looks the same as.
        config={"write_empty_chunks": True},
    )


def _packed(values: Sequence[Any]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(values).encode(), dtype=np.uint8)
