"""The results of all checks of a model: lines with verdicts, and a conclusion in sentences."""

from collections.abc import Iterator
from dataclasses import dataclass

from slsgu_cli.records.figures import Share
from slsgu_cli.records.method import Tower
from slsgu_cli.records.verification import ATTACK, ATTACKED, Check, Finding, VerifiedModel
from slsgu_cli.verification.registry import CheckSpec, spec_of
from slsgu_cli.verification.verdicts import Verdict, VerdictRow


def _findings(
    original: VerifiedModel, other: VerifiedModel
) -> Iterator[tuple[CheckSpec, Finding, Finding]]:
    """Yield the checks that ran on both models with the same settings, and their findings."""
    for check in Check:
        before, after = original.finding(check), other.finding(check)
        if before and after and before.settings == after.settings:
            yield spec_of(check), before, after


def verdict_rows(original: VerifiedModel, other: VerifiedModel) -> list[VerdictRow]:
    """Return the lines of all checks that ran on both models with the same settings."""
    findings = _findings(original, other)
    return [row for spec, before, after in findings for row in spec.rows(before, after)]


def bounded_figures(original: VerifiedModel, other: VerifiedModel) -> dict[str, float]:
    """Return the figures of the checks that ran, by the names that bounds give them.

    A figure that says nothing is missing.
    """
    figures = {
        f"{ATTACK}{row.check}": row.gain
        for row in verdict_rows(original, other)
        if row.check in ATTACKED
    }
    for check in Check:
        of_check = spec_of(check).figures(original, other)
        figures |= {f"{check}.{name}": value for name, value in of_check.items()}
    return figures


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The conclusion of all checks of a model.

    `strongest` is the line that brings most back beyond its control, None if none does. The
    first of the `sentences` is about it.
    """

    model: str
    strongest: VerdictRow | None
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        """All sentences."""
        return " ".join(self.sentences)


def conclusion(concept: str, original: VerifiedModel, other: VerifiedModel) -> Conclusion:
    """Summarise what brings a concept back, what remains of it, and what the edit cost."""
    lines = [
        spec.strongest(row, before, after)
        for spec, before, after in _findings(original, other)
        for row in spec.rows(before, after)
    ]
    returning = [row for row in lines if row.brings_back]
    strongest = max(returning, key=lambda row: row.gain, default=None)
    sentences = [_of_name(concept, lines, strongest)]
    for check in Check:
        if other.finding(check) and (sentence := spec_of(check).sentence):
            sentences.append(sentence(original, other, strongest) or "")
    sentences.append(_of_scope(other))
    return Conclusion(other.label, strongest, tuple(filter(None, sentences)))


def _effort(row: VerdictRow) -> str:
    return spec_of(row.check).effort.format(row.variant)


def against(row: VerdictRow) -> str:
    """Return the accuracy of the control of a line, as the end of a clause."""
    if row.control is None:
        return ""
    return f", against {row.control.top1:.0f}% for {spec_of(row.check).control}"


def _of_name(concept: str, lines: list[VerdictRow], strongest: VerdictRow | None) -> str:
    """Describe the strongest attempt, or give the upper bound if none succeeds."""
    telling = [row for row in lines if row.verdict is not Verdict.NOTHING]
    count = sum(row.check is not Check.BASELINE for row in telling)
    attempts = f"{count} attempt{'s' * (count != 1)}"
    if strongest is not None:
        return (
            f"Strongest of {attempts} to bring {concept} back: {_effort(strongest)}. "
            f"{strongest.after.top1:.0f}% of its images get its name{against(strongest)} "
            f"(original: {strongest.before.top1:.0f}%)."
        )
    if not telling:
        return f"The checks say nothing: the original hardly recognises {concept} either."
    most = max(telling, key=lambda row: (row.after.top1, row.gain))
    share = Share.of(most.after.top1, most.after.rows)
    rows = most.after.measured_on
    hits = share.in_words(f"test {rows}" if most.after.is_test else rows)
    if count == 0:
        return f"The model names {concept} for {hits}."
    if share.count == 0:
        return f"None of {attempts} brings {concept} back: {hits}."
    lead = f"None of {attempts} brings {concept} back beyond chance. Strongest: {_effort(most)}"
    if most.control is None:
        return f"{lead}, {hits}."
    adds = "The name adds nothing to it."
    if most.added and most.added.points > 0:
        adds = f"The name adds {most.added}, which may be chance."
    return f"{lead}, {most.after.top1:.0f}%{against(most)}. {adds}"


def _of_scope(model: VerifiedModel) -> str:
    """Name the tower that the edit leaves unchanged."""
    if model.edit is None:
        return ""
    towers = [("image", "text tower, with the name's embedding,"), ("text", "image tower")]
    tower, rest = towers[model.edit.tower is not Tower.VISION]
    return (
        f"The edit changed one layer of the {tower} tower. The {rest} is unchanged, and training "
        "on its images can teach the name again."
    )
