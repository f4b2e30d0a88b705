"""Results in rows and columns: drawn for a person, tab-separated for the next program."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
Rows = Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of results: its name everywhere, and how a terminal shows it.

    `shown` turns a value that is there into the text of a terminal's cell; `label` replaces
    the name in its header. With `on_terminal` off, the column is for TSV and JSON only.
    """

    name: str
    shown: Callable[[Any], str] | None = None
    label: str | None = None
    on_terminal: bool = True

    def cell(self, value: Any) -> str:
        """Return a value as a terminal shows it."""
        return text(value if self.shown is None or value is None else self.shown(value))


def drawn(columns: Sequence[Column], rows: Rows) -> Table:
    """Return a table for a terminal; a column that is empty in every row is left out.

    Where it is too wide, text is folded and figures are not.
    """
    table = Table(
        box=SIMPLE_HEAD, header_style="", show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    kept = []
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows]
        if not column.on_terminal or (cells and all(map(_is_empty, cells))):
            continue
        kept.append(index)
        numeric = bool(cells) and all(map(_is_number, cells))
        label = column.name if column.label is None else column.label
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(label, justify=justify, overflow="fold", no_wrap=numeric)
    for row in rows:
        table.add_row(*(columns[index].cell(row[index]) for index in kept))
    return table


def tab_separated(columns: Sequence[Column], rows: Rows) -> str:
    """Return a header and rows as lines; figures are in full, for the next program to read."""
    lines = ["\t".join(column.name for column in columns)]
    lines += ["\t".join(map(_plain, row)) for row in rows]
    return "".join(f"{line}\n" for line in lines)


def text(value: Any) -> str:
    """Return a value as a person reads it, on one line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        if abs(value) < 0.01 or abs(value) >= 1000:
            return f"{value:.4g}"
        # Two decimals or three digits, whichever says more: 96.97, 0.50, 0.0379.
        return max(f"{value:.2f}", f"{value:.3g}", key=len)
    return " ".join(printable(str(value)).split())


def printable(text: str) -> str:
    """Return `text` without what would steer a terminal: a caption or a key may hold anything."""
    return _CONTROL.sub(" ", text)


def _plain(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else text(value)


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value is None


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == ""
