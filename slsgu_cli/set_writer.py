"""Write blocks of rows: decoded images with tokens, labels, captions and keys.

A block is a zarr group. Images lie in chunks of about 16 MB, lz4-compressed and with a
checksum each: measured at 1.8 to 4 GB/s on two cores, from icons (a tenth of the size) to
noise (no larger), where a GPU takes 0.6 GB/s. Everything else about a block is in the
group's attributes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from slsgu_cli.samples import Origin
from slsgu_cli.sets import Ints, Pixels
from slsgu_cli.store import Store

CHUNK_BYTES = 16 << 20
MIN_CHUNK_ROWS = 64
# Chunks that are compressed and written while the next one fills.
WRITERS = 2
DIGEST_BYTES = 16


class BlockWriter:
    """Takes rows one by one and writes them in chunks; made by `block_writer`."""

    def __init__(self, group: zarr.Group, *, height: int, width: int, rows: int) -> None:
        self.rows = 0
        self._group = group
        row_bytes = height * width * 3
        self._chunk = np.empty(
            (max(MIN_CHUNK_ROWS, CHUNK_BYTES // row_bytes), height, width, 3), dtype=np.uint8
        )
        # The number of rows is known in the end; `rows` is the most there can be.
        self._images = _create(group, "images", (max(rows, 1), height, width, 3), self._chunk.shape)
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self._writing: list[tuple[Future[list[bytes]], Pixels]] = []
        self._spare: list[Pixels] = []
        self.keys: list[str] = []
        self._captions: list[str] = []
        self._labels: list[int] = []
        self._digests: list[bytes] = []
        self._origins: list[Origin | None] = []
        self._content = hashlib.sha256(repr((height, width)).encode())

    def add(
        self,
        image: Pixels,
        *,
        key: str,
        caption: str | None = None,
        label: int = -1,
        source_digest: bytes = bytes(DIGEST_BYTES),
        origin: Origin | None = None,
    ) -> None:
        """Append a row. `source_digest` names the encoded image."""
        self._chunk[self.rows % len(self._chunk)] = image
        self.rows += 1
        self.keys.append(key)
        self._captions.append(caption or "")
        self._labels.append(label)
        self._digests.append(source_digest)
        self._origins.append(origin)
        if self.rows % len(self._chunk) == 0:
            self._write(len(self._chunk))

    def finish(self, tokens: Ints | None, attributes: dict[str, Any]) -> str:
        """Write what is left, and the attributes; return the fingerprint of the rows.

        `tokens` is (rows, length), or None for rows that have no use for any.
        """
        if self.rows % len(self._chunk):
            self._write(self.rows % len(self._chunk))
        self._await(0)
        self._images.resize((self.rows, *self._images.shape[1:]))
        tokens = np.zeros((self.rows, 0), dtype=np.int32) if tokens is None else tokens
        labels = np.asarray(self._labels, dtype=np.int32)
        self._put("tokens", tokens)
        self._put("labels", labels)
        self._put(
            "source_digests",
            np.frombuffer(b"".join(self._digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES),
        )
        origins = [None if o is None else [o.file, o.row, o.url] for o in self._origins]
        lists: dict[str, Sequence[Any]] = {
            "keys": self.keys,
            "captions": self._captions,
            "origins": origins,
        }
        for name, values in lists.items():
            self._put(name, np.frombuffer(_pack(values), dtype=np.uint8))
        for part in (tokens.astype("<i4").tobytes(), labels.astype("<i4").tobytes()):
            self._content.update(part)
        measured = [attributes.get("class_names", []), attributes.get("templates", [])]
        self._content.update(json.dumps(measured).encode())
        fingerprint = self._content.hexdigest()[:24]
        self._group.attrs.update(
            attributes | {"rows": self.rows, "fingerprint": fingerprint, "complete": True}
        )
        return fingerprint

    def close(self) -> None:
        """Wait for the writes that have begun and drop the others."""
        self._pool.shutdown(cancel_futures=True)

    def _write(self, rows: int) -> None:
        """Have the last `rows` rows written, and go on with a chunk of their own."""
        self._await(WRITERS - 1)
        written = self._pool.submit(self._write_chunk, self.rows - rows, self._chunk[:rows])
        self._writing.append((written, self._chunk))
        self._chunk = self._spare.pop() if self._spare else np.empty_like(self._chunk)

    def _write_chunk(self, start: int, chunk: Pixels) -> list[bytes]:
        """Write rows from `start` on; return what names each one by its pixels."""
        self._images[start : start + len(chunk)] = chunk
        return [hashlib.sha256(image.data).digest() for image in chunk]

    def _await(self, most: int) -> None:
        """Return when at most `most` chunks are being written. Raises what a write raised."""
        while len(self._writing) > most:
            written, chunk = self._writing.pop(0)
            for digest in written.result():
                self._content.update(digest)
            self._spare.append(chunk)

    def _put(self, name: str, values: npt.NDArray[Any]) -> None:
        # A chunk has at least one element in zarr, an array may have none.
        chunks = tuple(max(size, 1) for size in values.shape)
        array = _create(self._group, name, values.shape, chunks, dtype=str(values.dtype))
        if values.size:
            array[:] = values


@contextmanager
def block_writer(
    store: Store,
    path: str,
    *,
    height: int,
    width: int,
    rows: int,
    into: Callable[[], str] | None = None,
) -> Iterator[BlockWriter]:
    """Yield a writer for at most `rows` rows; the block stands at `path` if all goes well.

    `into` tells the path where that is known only when all rows are written.
    """
    with store.writing(path, into) as partial:
        location: Any = LocalStore(partial) if store.is_local else partial
        group = zarr.open_group(location, mode="w", zarr_format=3)
        writer = BlockWriter(group, height=height, width=width, rows=rows)
        try:
            yield writer
        finally:
            writer.close()
        if not group.attrs.get("complete"):
            raise RuntimeError("a block was left without `finish`")


def _create(
    group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str = "u1"
) -> Any:
    size = np.dtype(dtype).itemsize
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        compressors=[
            BloscCodec(typesize=size, cname="lz4", clevel=1, shuffle="noshuffle"),
            Crc32cCodec(),
        ],
        # An image may be all black: zarr would leave it out, and a lost chunk reads the same.
        config={"write_empty_chunks": True},
    )


def _pack(values: Sequence[Any]) -> bytes:
    return json.dumps(values).encode()
