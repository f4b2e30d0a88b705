"""Tables with a header line and a delimiter: CSV, TSV and open_clip's tables."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

from slsgu_cli.sources.reader import TOO_LARGE
from slsgu_cli.sources.text_table import RAGGED, Listing, Record, TextTable


@dataclass(frozen=True, slots=True)
class CsvSource(TextTable):
    """A table with a header line."""

    description: ClassVar[str] = "tables of image paths"
    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".tsv")

    def listing(self, file: Any) -> Listing:
        """Return the columns in the first line, and the rows in the others."""
        return csv_listing(file)


def csv_listing(text: Iterable[str]) -> Listing:
    """Return the columns and the rows of a CSV file's lines."""
    rest = iter(text)
    first = next(rest, "")
    reader = csv.reader(chain([first], rest), delimiter=_delimiter(first))
    names = [name.strip() for name in next(reader, [])]

    def rows() -> Iterator[Record]:
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield TOO_LARGE if "limit" in str(error) else RAGGED
                continue
            if len(values) == len(names):
                yield dict(zip(names, values, strict=True))
            elif values:
                yield RAGGED

    return names, rows()


def header_names(line: str) -> list[str]:
    """Return the columns that a header line names."""
    return [name.strip().strip('"') for name in line.split(_delimiter(line))]


def _delimiter(header: str) -> str:
    """Return the delimiter: open_clip's tables have tabs, whatever their suffix."""
    return next((mark for mark in "\t,;|" if mark in header), ",")
