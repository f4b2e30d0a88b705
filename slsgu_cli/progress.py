"""What a long run tells of itself: notes, details, warnings, and how far it is.

The package tells these functions and knows no terminal. They pass everything on to one
sink, which is silent until a program sets another one; the command line sets its console.
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
    """Where all of it goes. This one is silent; a subclass shows what it overrides."""

    __slots__ = ()

    def note(self, text: str) -> None:
        """Tell what was done."""

    def detail(self, text: str) -> None:
        """Tell how it was done."""

    def warn(self, text: str) -> None:
        """Tell what somebody should look at."""

    def bar(self, label: str, total: int | None) -> AbstractContextManager[Ticker]:
        """Show how far a loop over `total` items is; yield what advances it."""
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
    """Tell nobody for the length of a block."""
    return using(Sink())


class _Bars(Sink):
    """Shows bars where another sink does, and nothing else."""

    __slots__ = ("_shown_by",)

    def __init__(self, shown_by: Sink) -> None:
        self._shown_by = shown_by

    def bar(self, label: str, total: int | None) -> AbstractContextManager[Ticker]:
        """Show how far a loop over `total` items is; yield what advances it."""
        return self._shown_by.bar(label, total)


def bars_only() -> AbstractContextManager[None]:
    """Tell only how far loops are for the length of a block."""
    return using(_Bars(_sink))


def note(text: str) -> None:
    """Tell what was done."""
    _sink.note(text)


def detail(text: str) -> None:
    """Tell how it was done."""
    _sink.detail(text)


def warn(text: str) -> None:
    """Tell what somebody should look at."""
    _sink.warn(text)


def bar(label: str, total: int | None) -> AbstractContextManager[Ticker]:
    """Show how far a loop over `total` items is; yield what advances it."""
    return _sink.bar(label, total)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what libraries log and warn of off the terminal for the length of a block."""
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

# What makes the text around it run the other way, so that a name could pass for another.
_REORDERING = re.compile(r"[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def terminal_safe(text: str) -> str:
    """Return `text` without what would criterion a terminal: a caption or a key may hold anything.

    Controls become spaces. Those that reorder text leave a mark: without any, two names that
    differ would look the same.
    """
    return _REORDERING.sub("\ufffd", _CONTROL.sub(" ", text))
