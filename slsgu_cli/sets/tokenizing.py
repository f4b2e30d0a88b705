"""Tokenizing captions in a thread while images are decoded."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from slsgu_cli.store.blocks import Ints

# Captions to tokenize in one call.
CHUNK = 512
Tokenize = Callable[[Sequence[str]], Ints]


class BackgroundTokenizer:
    """Take captions one by one, and return all their tokens at the end; see `tokenizing`."""

    def __init__(self, tokenize: Tokenize, pool: ThreadPoolExecutor) -> None:
        self._tokenize = tokenize
        self._pool = pool
        self._texts: list[str] = []
        self._chunks: list[Future[Ints]] = []

    def add(self, text: str) -> None:
        """Add the next caption."""
        self._texts.append(text)
        if len(self._texts) == CHUNK:
            self._submit()

    def tokens(self) -> Ints:
        """Return the token ids of all captions, int32 (captions, length); at least one caption."""
        if self._texts:
            self._submit()
        return np.concatenate([chunk.result() for chunk in self._chunks])

    def _submit(self) -> None:
        self._chunks.append(self._pool.submit(self._tokenize, self._texts))
        self._texts = []


@contextmanager
def tokenizing(tokenize: Tokenize) -> Iterator[BackgroundTokenizer]:
    """Yield a background tokenizer; leaving the block cancels chunks that have not started."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
    try:
        yield BackgroundTokenizer(tokenize, pool)
    finally:
        pool.shutdown(cancel_futures=True)
