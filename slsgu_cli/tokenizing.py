"""Tokenize captions in a thread of their own while images are decoded."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from slsgu_cli.sets import Ints

AT_ONCE = 512
Tokenize = Callable[[Sequence[str]], Ints]


class Tokenizing:
    """Captions that come one by one, and their tokens in the end; made by `tokenizing`."""

    def __init__(self, tokenize: Tokenize, pool: ThreadPoolExecutor) -> None:
        self._tokenize = tokenize
        self._pool = pool
        self._texts: list[str] = []
        self._parts: list[Future[Ints]] = []

    def add(self, text: str) -> None:
        """Take the next caption."""
        self._texts.append(text)
        if len(self._texts) == AT_ONCE:
            self._submit()

    def tokens(self) -> Ints:
        """Return the token ids of all captions, int32 (captions, length); there must be some."""
        if self._texts:
            self._submit()
        return np.concatenate([part.result() for part in self._parts])

    def _submit(self) -> None:
        self._parts.append(self._pool.submit(self._tokenize, self._texts))
        self._texts = []


@contextmanager
def tokenizing(tokenize: Tokenize) -> Iterator[Tokenizing]:
    """Yield what takes captions; what has not begun is dropped when the block is left."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
    try:
        yield Tokenizing(tokenize, pool)
    finally:
        pool.shutdown(cancel_futures=True)
