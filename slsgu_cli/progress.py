"""Report on a long run: notes, details, warnings and progress bars.

The package calls these functions and knows no terminal. They pass everything on to one sink,
which is silent until a program sets another one; the command line sets its console.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Ticker:
    """Advances one progress bar; this one shows nothing."""

    __slots__ = ()

    def advance(self, count: int = 1) -> None:
        """Count `count` more items as done."""


class Sink:
    """Receives all reports. This one is silent; subclasses override what they show."""

    __slots__ = ()

    def note(self, text: str) -> None:
        """Report what was done."""

    def detail(self, text: str) -> None:
        """Report how it was done."""

    def warn(self, text: str) -> None:
        """Report a problem that the user should look at."""

    def bar(self, label: str, total: int | None) -> AbstractContextManager[Ticker]:
        """Show the progress of a loop over `total` items; yield its ticker."""
        del label, total
        return nullcontext(Ticker())


_sink = Sink()


def set_sink(sink: Sink) -> Sink:
    """Send everything to `sink` from now on; return the sink that was set before."""
    global _sink
    before, _sink = _sink, sink
    return before


@contextmanager
def using(sink: Sink) -> Iterator[None]:
    """Send everything to `sink` for the length of a block."""
    before = set_sink(sink)
    try:
        yield
    finally:
        set_sink(before)


def silent() -> AbstractContextManager[None]:
    """Report nothing for the length of a block."""
    return using(Sink())


class _Bars(Sink):
    """Shows bars where another sink does, and nothing else."""

    __slots__ = ("_shown_by",)

    def __init__(self, shown_by: Sink) -> None:
        self._shown_by = shown_by

    def bar(self, label: str, total: int | None) -> AbstractContextManager[Ticker]:
        """Show the progress of a loop over `total` items; yield its ticker."""
        return self._shown_by.bar(label, total)


def bars_only() -> AbstractContextManager[None]:
    """Show only progress bars for the length of a block."""
    return using(_Bars(_sink))


def note(text: str) -> None:
    """Report what was done."""
    _sink.note(text)


def detail(text: str) -> None:
    """Report how it was done."""
    _sink.detail(text)


def warn(text: str) -> None:
    """Report a problem that the user should look at."""
    _sink.warn(text)


def bar(label: str, total: int | None) -> AbstractContextManager[Ticker]:
    """Show the progress of a loop over `total` items; yield its ticker."""
    return _sink.bar(label, total)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress logs and warnings of libraries for the length of a block."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")

# Characters that reverse the text around them, so that one name could look like another.
_REORDERING = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def terminal_safe(text: str) -> str:
    """Return `text` without control characters, which captions and keys may contain.

    Controls become spaces. Characters that reorder text become a mark, because two different names
    would look the same without it.
    """
    return _REORDERING.sub("\ufffd", _CONTROL.sub(" ", text))
