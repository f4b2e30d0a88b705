"""Reading a few items ahead of whoever takes them, in order; how many cores there are for it."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
AHEAD = 3


def read_ahead(read: Callable[[S], T], items: Iterable[S], *, threads: int = 1) -> Iterator[T]:
    """Yield `read(item)` in order, a few items ahead of the consumer."""
    pool = ThreadPoolExecutor(threads)
    waiting: list[Future[T]] = []
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > AHEAD * threads:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
