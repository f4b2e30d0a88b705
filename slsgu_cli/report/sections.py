"""Sections of the page: content from a template, or a notice that says what is missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from slsgu_cli.figures.templates import render
from slsgu_cli.report.gather import StoredRecord


@dataclass(frozen=True, slots=True)
class Section:
    """One section. If its content is missing, `run` is the command that adds it."""

    title: str
    content: Markup
    run: str | None = None

    @property
    def state(self) -> str:
        """Whether the content is shown or missing."""
        return "missing" if self.run else "shown"


def section(
    title: str, stored: StoredRecord[Any], build: Callable[..., Markup], *values: Any
) -> Section:
    """Return a section on a record, or a notice if the record cannot be shown.

    `build` makes its content from the record and the `values`.
    """
    if stored.record is not None:
        return Section(title, build(stored.record, *values))
    return absent(title, stored.trouble or "", stored.run)


def absent(title: str, trouble: str, run: str) -> Section:
    """Return a section that says what is missing and which command adds it."""
    return Section(title, fill("missing.html", trouble=trouble, run=run), run)


def fill(template: str, **values: Any) -> Markup:
    """Return one of the report's templates, filled with values."""
    return render("slsgu_cli.report", template, **values)


class Column(NamedTuple):
    """A column of a table.

    `kind` is "" for text, "figure" for right-aligned numbers, "code" for names and digests,
    "link" for links to the article with the number of the row.
    """

    label: str
    kind: str = ""


def texts(*labels: str) -> list[Column]:
    """Return columns of text."""
    return [Column(label) for label in labels]


def figures(*labels: str) -> list[Column]:
    """Return columns of numbers."""
    return [Column(label, "figure") for label in labels]


def codes(*labels: str) -> list[Column]:
    """Return columns of names, paths or digests."""
    return [Column(label, "code") for label in labels]


# A sequence has one value per line; None is shown as a dash.
Cell = str | Sequence[str] | None


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column names its rows. The rows in `marked` are highlighted."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    marked: Sequence[int] = ()

    def cells(self, row: Sequence[Cell]) -> list[tuple[Column, Cell]]:
        """Return the cells of a row with their columns. Raises ValueError for a wrong length."""
        return list(zip(self.columns, row, strict=True))


def tables(*contents: Table) -> Markup:
    """Return tables below one another."""
    return fill("tables.html", tables=contents)
