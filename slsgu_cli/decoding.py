"""Decode many images on all cores, in the order they come, with a bounded number in flight.

PIL lets go of the interpreter lock while it decodes and resizes, so threads are enough.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from slsgu_cli.ahead import cores
from slsgu_cli.preprocess import DecodeError, Picture, Pixels

T = TypeVar("T")
AHEAD = 4


@dataclass(frozen=True, slots=True)
class Decoded:
    """One image, or the reason why there is none.

    `source_digest` names the encoded bytes; `oddities` says what was odd about an image that
    can be used.
    """

    pixels: Pixels | None
    reason: str | None
    source_digest: bytes
    oddities: tuple[str, ...] = ()

    def without_pixels(self) -> "Decoded":
        """Return the same without the image, to remember it by."""
        return replace(self, pixels=None)


def decode_in_order(
    encoded: Iterable[tuple[T, bytes | None]], decode: Callable[[bytes], Picture]
) -> Iterator[tuple[T, Decoded]]:
    """Yield (tag, result) for every (tag, encoded image), in order.

    At most a few images per core are in memory. When the consumer stops or is
    interrupted, what has not begun is dropped.
    """
    workers = cores()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    waiting: deque[tuple[T, Future[Decoded]]] = deque()
    try:
        for tag, data in encoded:
            waiting.append((tag, pool.submit(_decode_one, data, decode)))
            if len(waiting) >= workers * AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _decode_one(data: bytes | None, decode: Callable[[bytes], Picture]) -> Decoded:
    if data is None:
        return Decoded(None, "no image", b"")
    source = hashlib.blake2b(data, digest_size=16).digest()
    try:
        picture = decode(data)
    except DecodeError as error:
        return Decoded(None, error.reason, source)
    return Decoded(picture.pixels, None, source, picture.oddities)
