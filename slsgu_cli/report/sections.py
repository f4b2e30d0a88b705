"""A section of the page: a title over what a record says, or one line on why it is not there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from slsgu_cli.report.gather import Finding
from slsgu_cli.report.grids import code, paragraph
from slsgu_cli.report.markup import Html

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Section:
    """One section. `trouble` says why its content is missing, `run` what adds it."""

    title: str
    content: Html
    trouble: str | None = None
    run: str | None = None

    @property
    def state(self) -> str:
        """Whether the section shows what it is about."""
        return "missing" if self.trouble else "shown"


def section(title: str, finding: Finding[T], build: Callable[[T], Html]) -> Section:
    """Return a section of what a record says, or of what is wrong with it."""
    if finding.record is not None:
        return Section(title, build(finding.record))
    return absent(title, finding.trouble or "", finding.run)


def absent(title: str, trouble: str, run: str) -> Section:
    """Return a section that says what is missing and which command adds it."""
    line = paragraph(trouble, " To add it: ", code(run), class_="notice")
    return Section(title, line, trouble, run)
