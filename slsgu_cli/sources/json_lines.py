"""JSON lines: one object per line."""

from dataclasses import dataclass
from typing import Any, ClassVar

from slsgu_cli.records.codec import parse_json
from slsgu_cli.sources.text_table import (
    NO_OBJECT,
    Listing,
    Record,
    TextTable,
    self_describing,
)


@dataclass(frozen=True, slots=True)
class JsonLinesSource(TextTable):
    """A file with one JSON object per line."""

    description: ClassVar[str] = "JSON lines"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")

    def listing(self, file: Any) -> Listing:
        """Return the fields of the first lines, and a row for each line."""
        return self_describing(map(_parse, filter(str.strip, file)))


def _parse(line: str) -> Record:
    try:
        value = parse_json(line)
    except ValueError:
        return NO_OBJECT
    return value if isinstance(value, dict) else NO_OBJECT
