"""Output of the command line: results on stdout, everything else on stderr."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, TextIO

from slsgu_cli import progress
from slsgu_cli.errors import InputError, SlsguError
from slsgu_cli.progress import terminal_safe
from slsgu_cli.records.codec import document, finite

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table

# Version of the JSON documents: incremented when a key is removed or changes its meaning.
SCHEMA = 1

Rows = Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    `get` is the dotted attribute or the function that gives the value of a row; rows that are
    sequences hold their values in the order of the columns. On a terminal, `shown` formats the
    values, `label` replaces the name in the header, and without `on_terminal` the column is
    omitted. If the name depends on data, `of` gives the place of the values in JSON, where keys
    never do: a list, the name of a row, and a key.
    """

    name: str
    get: str | Callable[[Any], Any] | None = None
    shown: Callable[[Any], str] | None = None
    label: str | None = None
    on_terminal: bool = True
    of: tuple[str, str, str] | None = None

    def value(self, row: Any) -> Any:
        """Return the value of a row that is an object."""
        return self.get(row) if callable(self.get) else attrgetter(self.get or self.name)(row)

    def cell(self, value: Any) -> str:
        """Return the text of a value on a terminal."""
        return text(value if self.shown is None or value is None else self.shown(value))


def drawn(columns: Sequence[Column], rows: Rows) -> "Table":
    """Return a table for a terminal, without empty columns.

    If it is too wide, text is folded but numbers are not.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD, header_style="", show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    shown = []
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows]
        if not column.on_terminal or (cells and all(map(_is_empty, cells))):
            continue
        shown.append(index)
        numeric = bool(cells) and all(map(_is_number, cells))
        label = column.name if column.label is None else column.label
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(label, justify=justify, overflow="fold", no_wrap=numeric)
    for row in rows:
        table.add_row(*(columns[index].cell(row[index]) for index in shown))
    return table


def text(value: Any) -> str:
    """Return a value as one line of text for a person."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        if abs(value) < 0.01 or abs(value) >= 1000:
            return f"{value:.4g}"
        # Two decimals or three digits, whichever says more: 96.97, 0.50, 0.0379.
        return max(f"{value:.2f}", f"{value:.3g}", key=len)
    return " ".join(terminal_safe(str(value)).split())


def _plain(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else text(value)


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value is None


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == ""


def _rich_stderr() -> "RichConsole":
    from rich.console import Console as RichConsole

    return RichConsole(stderr=True, highlight=False, emoji=False)


@dataclass(slots=True)
class Console(progress.Sink):
    """The console of a command.

    `verbosity` is -1 (results and errors only), 0, or 1 (details too). With `as_json`, results
    are collected and `flush` writes them as one document. A command that `streams` prints
    results while it runs, so no progress bar is shown on the terminal that receives them.
    """

    command: str | None = None
    verbosity: int = 0
    as_json: bool = False
    streams: bool = False
    _stderr: "RichConsole" = field(default_factory=_rich_stderr)
    # A copy, because sys.stdout is redirected for libraries. A shell can close it (`>&-`).
    _stdout: TextIO = field(default_factory=lambda: sys.stdout or StringIO())
    _results: dict[str, Any] = field(default_factory=dict)
    _parts: int = 0
    _flushed: bool = False

    @classmethod
    def writing_to(cls, file: TextIO) -> "Console":
        """Return a console whose results and notes all go to a file."""
        from rich.console import Console as RichConsole

        return cls(_stderr=RichConsole(file=file), _stdout=file)

    @property
    def on_terminal(self) -> bool:
        """Whether results are printed as tables on a terminal."""
        return not self.as_json and self._stdout.isatty()

    @property
    def brief(self) -> bool:
        """Whether to shorten long tables: on a terminal, without -v."""
        return self.on_terminal and self.verbosity <= 0

    def table(
        self,
        key: str,
        columns: Sequence[str | Column],
        rows: Iterable[Any],
        *,
        title: str | None = None,
        data: Any = None,
    ) -> None:
        """Print rows as a table, TSV or JSON; `data` replaces the rows in JSON."""
        heads = [Column(column) if isinstance(column, str) else column for column in columns]
        rows = [
            row if isinstance(row, Sequence) else [column.value(row) for column in heads]
            for row in rows
        ]
        if self.as_json:
            named = [_named(heads, row) for row in rows]
            self._results[key] = document(named if data is None else data)
            return
        # An empty line separates tables in a pipe.
        self._write("\n" if self._parts else "")
        self._parts += 1
        if self.on_terminal:
            self._draw(title, drawn(heads, rows))
            return
        lines = [
            [column.name for column in heads],
            *([_plain(cell) for cell in row] for row in rows),
        ]
        self._write("".join("\t".join(line) + "\n" for line in lines))

    def value(self, key: str, text: str, data: Any = None, *, shown: str | None = None) -> None:
        """Print one result line; in JSON, `data` (default: the text) under `key`.

        `shown` replaces the text on a terminal.
        """
        if self.as_json:
            self._results[key] = document(text if data is None else data)
        else:
            line = text if shown is None or not self.on_terminal else shown
            self._write("\t".join(map(terminal_safe, line.split("\t"))) + "\n")

    def paths(self, key: str, paths: Sequence[str]) -> None:
        """Report files that were written: a result in JSON, else a note."""
        if self.as_json:
            self._results[key] = list(paths)
        for path in paths:
            self.note(f"wrote {path}")

    def row(self, key: str, text: str, data: Any, *, shown: str | None = None) -> None:
        """Print one result line of several; in JSON, `data` is a row of the list `key`."""
        rows = self._results.get(key, [])
        self.value(key, text, data, shown=shown)
        if self.as_json:
            self._results[key] = [*rows, self._results[key]]

    @contextmanager
    def part(self, key: str) -> Iterator[None]:
        """Collect the JSON results of a block in an object, a row of the list `key`."""
        whole, self._results = self._results, {}
        try:
            yield
        finally:
            whole[key] = [*whole.get(key, []), self._results]
            self._results = whole

    def flush(self, error: SlsguError | None = None) -> None:
        """Write the JSON document with the results and the error, if JSON was requested."""
        if self.as_json and not self._flushed:
            self._flushed = True
            whole = {"schema": SCHEMA, "command": self.command, **self._results}
            if error is not None:
                whole["error"] = {
                    "message": error.message,
                    "hint": error.hint,
                    "exit_code": int(error.exit_code),
                }
            self._write(json.dumps(finite(whole), indent=1, allow_nan=False) + "\n")

    def note(self, text: str) -> None:
        """Print a note, unless quiet."""
        if self.verbosity >= 0:
            self._say(text)

    def detail(self, text: str) -> None:
        """Print a detail, with -v."""
        if self.verbosity > 0:
            self._say(text, "dim")

    def warn(self, text: str) -> None:
        """Print a warning, even when quiet."""
        self._say(f"warning: {text}", "yellow")

    def error(self, error: SlsguError) -> None:
        """Print an error with its hint."""
        self._say(f"error: {error.message}", "bold red")
        if error.hint:
            self._say(f"  try: {error.hint}")

    @contextmanager
    def bar(self, label: str, total: int | None) -> Iterator[progress.Ticker]:
        """Show a progress bar on a terminal that can move its cursor; yield its ticker."""
        from rich import progress as bars

        cursor = self._stderr.file.isatty() and not self._stderr.is_dumb_terminal
        shown = self.verbosity >= 0 and cursor and not (self.streams and self._stdout.isatty())
        columns = (
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(
            *columns, console=self._stderr, transient=True, disable=not shown
        ) as running:
            task = running.add_task(terminal_safe(label), total=total)
            yield _Ticker(partial(running.advance, task))

    def _say(self, text: str, style: str | None = None) -> None:
        # A full log or a closed pipe must not end hours of work.
        with suppress(OSError):
            self._stderr.print(terminal_safe(text), markup=False, soft_wrap=True, style=style)

    def _draw(self, title: str | None, table: "Table") -> None:
        from rich.console import Console as RichConsole

        drawing = RichConsole(file=self._stdout, highlight=False, markup=False, emoji=False)
        with drawing.capture() as lines:
            if title:
                drawing.print(terminal_safe(title), style="bold")
            drawing.print(table)
        self._write("".join(f"{line.rstrip()}\n" for line in lines.get().splitlines()))

    def _write(self, text: str) -> None:
        """Write results. Raises BrokenPipeError if the reader is gone, else InputError."""
        try:
            self._stdout.write(text)
            self._stdout.flush()
        except OSError as error:
            # Otherwise flushing the buffer at exit would fail again, with a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stdout.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise InputError(f"cannot write the results: {error.strerror or error}") from error


def _named(columns: Sequence[Column], row: Sequence[Any]) -> dict[str, Any]:
    """Return a row as JSON: values by the names of their columns, or in lists (see `of`)."""
    named: dict[str, Any] = {}
    lists: dict[tuple[str, str], dict[str, Any]] = {}
    for column, value in zip(columns, row, strict=True):
        if column.of is None:
            named[column.name] = value
            continue
        key, name, field = column.of
        if (key, name) not in lists:
            lists[key, name] = {"name": name}
            named.setdefault(key, []).append(lists[key, name])
        lists[key, name][field] = value
    return named


@dataclass(slots=True)
class _Ticker(progress.Ticker):
    _advance: Callable[[int], None]

    def advance(self, count: int = 1) -> None:
        """Mark `count` more items as done."""
        self._advance(count)
