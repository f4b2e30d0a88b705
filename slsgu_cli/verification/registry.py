"""The registry of checks: the declarations next to their code, imported on demand."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from slsgu_cli.records.verification import Check, Finding, Settings, VerifiedModel
from slsgu_cli.verification.verdicts import VerdictRow, variant_rows

if TYPE_CHECKING:
    from slsgu_cli.verification.model import ModelUnderTest

Run = Callable[["ModelUnderTest", Settings], Any]
Rows = Callable[[Finding, Finding], Iterator[VerdictRow]]
Strongest = Callable[[VerdictRow, Finding, Finding], VerdictRow]
Sentence = Callable[[VerifiedModel, VerifiedModel, VerdictRow | None], str | None]
Figures = Callable[[VerifiedModel, VerifiedModel], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSpec:
    """The declaration of a check.

    `run` returns the value of the field `fills` of a Finding. `settings` are the fields of
    Settings that change its result. Count `revision` up when the result changes for another
    reason: recorded findings are then not reused.

    `rows` makes the lines of the verdict table from the findings on the original and on the
    other model. `effort` says what the check does ("{}" is the variant) and `control` what
    its control does, as parts of a sentence. `strongest` picks the line that the conclusion
    uses, by default the line itself, and `sentence` adds a sentence to the conclusion.
    `figures` returns figures that bounds name with the check before them, as in
    `description.mean`; a figure that says nothing is missing.
    """

    run: Run
    fills: str
    settings: tuple[str, ...] = ()
    revision: int = 1
    needs_sklearn: bool = False
    rows: Rows = variant_rows
    effort: str = "{}"
    control: str = "its control"
    strongest: Strongest = lambda row, _before, _after: row
    sentence: Sentence | None = None
    figures: Figures = lambda _original, _other: {}


def spec_of(check: Check) -> CheckSpec:
    """Return the declaration of a check, which is the constant SPEC of its module."""
    module = import_module(f"slsgu_cli.verification.checks.{check.replace('-', '_')}")
    return module.SPEC  # type: ignore[no-any-return]
