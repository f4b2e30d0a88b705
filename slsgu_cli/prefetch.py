"""Read ahead of the consumer in threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

# Items that each thread reads ahead.
AHEAD = 3


def prefetch(
    read: Callable[[S], T], items: Iterable[S], *, threads: int = 1, ahead: int = AHEAD
) -> Iterator[T]:
    """Yield `read(item)` in order, `ahead` items a thread before the consumer wants them.

    When the consumer stops or is interrupted, items not yet started are dropped.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > ahead * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
