"""What the user sees: results on stdout, everything else on stderr.

Results are a table on a terminal, tab-separated when piped, one JSON document with
`--json`. Progress, notes and warnings go to stderr, so a pipe carries results only.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from slsgu_cli.errors import SlsguError
from slsgu_cli.records import encode

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(slots=True)
class Console:
    """Where output goes and how much of it there is.

    `verbosity` is -1 (results and errors only), 0, or 1 (how things were done as well).
    With `as_json`, results are collected and written once by `flush`.
    """

    verbosity: int = 0
    as_json: bool = False
    _stderr: RichConsole = field(
        default_factory=lambda: RichConsole(stderr=True, highlight=False, emoji=False)
    )
    _results: dict[str, Any] = field(default_factory=dict)

    def table(
        self,
        key: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        *,
        title: str | None = None,
        data: Any = None,
    ) -> None:
        """Print rows as a table, TSV or JSON; `data` replaces the rows in JSON."""
        rows = [list(row) for row in rows]
        if self.as_json:
            named = [dict(zip(columns, row, strict=True)) for row in rows]
            self._results[key] = encode(named if data is None else data)
        elif sys.stdout.isatty():
            table = Table(title=title, title_justify="left", header_style="bold")
            for index, column in enumerate(columns):
                numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
                table.add_column(column, justify="right" if numeric else "left", overflow="fold")
            for row in rows:
                table.add_row(*(_text(value) for value in row))
            RichConsole(highlight=False, markup=False, emoji=False).print(table)
        else:
            lines = ["\t".join(columns), *("\t".join(_text(v) for v in row) for row in rows)]
            sys.stdout.write("\n".join(lines) + "\n")

    def value(self, key: str, text: str, data: Any = None) -> None:
        """Print one result line; in JSON, `data` (default: the text) under `key`."""
        if self.as_json:
            self._results[key] = encode(text if data is None else data)
        else:
            sys.stdout.write(text + "\n")

    def paths(self, key: str, paths: Sequence[str]) -> None:
        """Name files that were written: in JSON a result, else a note."""
        if self.as_json:
            self._results[key] = list(paths)
        for path in paths:
            self.note(f"wrote {path}")

    def flush(self) -> None:
        """Write the collected JSON document, if that is what was asked for."""
        if self.as_json:
            document = json.dumps(_finite(self._results), indent=1, allow_nan=False)
            sys.stdout.write(document + "\n")
            self._results.clear()
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Tell what was done, unless quiet."""
        if self.verbosity >= 0:
            self._stderr.print(text, markup=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        """Tell how it was done, with -v."""
        if self.verbosity > 0:
            self._stderr.print(text, markup=False, soft_wrap=True, style="dim")

    def warn(self, text: str) -> None:
        """Tell what the user should look at, even when quiet."""
        self._stderr.print(f"warning: {text}", markup=False, soft_wrap=True, style="yellow")

    def error(self, error: SlsguError) -> None:
        """Report an error with its hint."""
        self._stderr.print(
            f"error: {error.message}", markup=False, soft_wrap=True, style="bold red"
        )
        if error.hint:
            self._stderr.print(f"  try: {error.hint}", markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: int | None) -> Iterator["Ticker"]:
        """Show a progress bar on a terminal; yield what advances it."""
        shown = self.verbosity >= 0 and self._stderr.is_terminal
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._stderr,
            transient=True,
            disable=not shown,
        ) as bar:
            yield Ticker(bar, bar.add_task(label, total=total))


@dataclass(slots=True)
class Ticker:
    """Advances one progress bar."""

    _bar: Progress
    _task: Any

    def advance(self, count: int = 1) -> None:
        """Count `count` more items as done."""
        self._bar.advance(self._task, count)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value is None


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        if abs(value) < 0.01 or abs(value) >= 1000:
            return f"{value:.4g}"
        # Two decimals or three digits, whichever says more: 96.97, 0.50, 0.0379.
        return max(f"{value:.2f}", f"{value:.3g}", key=len)
    # A caption may hold anything: no tab, line break or terminal escape may leave its cell.
    return " ".join(_CONTROL.sub(" ", str(value)).split())


def _finite(value: Any) -> Any:
    """Return `value` with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
