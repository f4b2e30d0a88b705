"""The notation for sources: paths with wild cards and ranges, and filters of their rows."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.sources.reader import Filters
from slsgu_cli.text import first_lines

FILTER = re.compile(r"[^=&?/*]+=[^&]*(?:&[^=&?/*]+=[^&]*)*")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class Source:
    """A source as the user wrote it, its path, and the filters of its rows."""

    text: str
    path: str
    filters: Filters = field(default_factory=dict)


def parse_source(text: str) -> Source:
    """Split `path?column=value&...` into path and filters; a column can have several values."""
    # A question mark without `column=value` after it is a wild card.
    splits = ((text[:at], text[at + 1 :]) for at, char in enumerate(text) if char == "?")
    path, query = next((split for split in splits if FILTER.fullmatch(split[1])), (text, ""))
    if not query:
        return Source(text, text)
    filters: dict[str, set[str]] = {}
    for part in query.split("&"):
        name, _, value = part.partition("=")
        filters.setdefault(unquote(name), set()).add(unquote(value).strip())
    return Source(text, path, {name: frozenset(values) for name, values in filters.items()})


def expand(source: Source) -> list[str]:
    """Return the files and folders that a source names. Raises MissingError or InputError."""
    paths: list[str] = []
    for pattern in _ranges(source.path):
        try:
            fs, inner = fsspec.core.url_to_fs(pattern)
            if fs.exists(inner):
                matches = [inner]
            else:
                matches = sorted(fs.glob(inner)) if any(mark in inner for mark in "*?[") else []
        except Exception as error:  # network file systems raise their own exception types
            hint = "check the URL, your network connection and your credentials"
            if pattern.startswith("hf://") and not pattern.startswith("hf://datasets/"):
                hint = "name data sets of the hub as hf://datasets/OWNER/NAME/..."
            raise InputError(
                f"cannot open source {source.text}: {first_lines(error)}", hint=hint
            ) from error
        if not matches:
            _require_access(source, fs, inner)
            raise MissingError(
                f"no file matches source {pattern}", hint="check the path; quote wild cards"
            )
        local = "file" in fs.protocol
        paths.extend(str(path) if local else str(fs.unstrip_protocol(path)) for path in matches)
    return paths


def _require_access(source: Source, fs: Any, inner: str) -> None:
    """Refuse a local path that the user has no permission for: it would look missing."""
    if "file" in fs.protocol:
        try:
            Path(inner).stat()
        except PermissionError as error:
            raise InputError(
                f"cannot open source {source.text}: {error.strerror}",
                hint="give this user permission to read it and its parent folders",
            ) from error
        except (OSError, ValueError):
            return


def _ranges(path: str) -> list[str]:
    """Return all paths of a `{000..012}` range, as webdataset users write shards."""
    match = RANGE.search(path)
    if match is None:
        return [path]
    first, last = match[1], match[2]
    return [
        expanded
        for number in range(int(first), int(last) + 1)
        for expanded in _ranges(
            f"{path[: match.start()]}{number:0{len(first)}}{path[match.end() :]}"
        )
    ]
