"""The base of text formats: tables of image paths with captions or labels."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from slsgu_cli.sources.files import opened
from slsgu_cli.sources.reader import TEXT_LIMIT, TOO_LARGE
from slsgu_cli.sources.table import Header, Records, TableSource
from slsgu_cli.sources.texts import as_text

# The number of first rows that give the columns of a file without a header.
SAMPLED_ROWS = 100
RAGGED, NO_OBJECT = "not a value for each column", "not a JSON object"

# A row's columns, or the reason why it is unreadable.
Record = Mapping[str, Any] | str
Listing = tuple[Sequence[str], Iterable[Record]]


@dataclass(frozen=True, slots=True)
class TextTable(TableSource):
    """A text file of rows; a format implements `listing`."""

    def listing(self, file: Any) -> Listing:
        """Return the columns and the rows of an open file. Raises InputError."""
        raise NotImplementedError

    def header(self) -> Header:
        """Return the columns; any may hold paths."""
        with self._open_listing() as (names, _):
            return Header(names)

    def records(self, columns: Sequence[str], skipped: Counter[str]) -> Records:
        """Yield each row's number and columns; count unreadable rows in `skipped`."""
        with self._open_listing() as (_, rows):
            for index, row in enumerate(rows):
                if isinstance(row, str):
                    skipped[row] += 1
                elif any(len(as_text(row.get(name)) or "") > TEXT_LIMIT for name in columns):
                    skipped[TOO_LARGE] += 1
                else:
                    yield index, row

    @contextmanager
    def _open_listing(self) -> Iterator[Listing]:
        with opened(self.path, "r", encoding="utf-8-sig", errors="replace", newline="") as file:
            yield self.listing(file)


def self_describing(rows: Iterator[Record]) -> Listing:
    """Return rows that name their columns, and the columns of the first rows."""
    first = list(islice(rows, SAMPLED_ROWS))
    names = dict.fromkeys(name for row in first if not isinstance(row, str) for name in row)
    return list(names), chain(first, rows)
