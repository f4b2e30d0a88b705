"""Verdicts on an edited model, from its accuracy under one variant of a check.

Thresholds are relative to the original model's accuracy under the same variant. A variant
that even the original does not recognise says nothing about an edit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from slsgu_cli.records.figures import Accuracy, Difference, Share, difference
from slsgu_cli.records.verification import Check, Finding

# Shares of the original's FA@1: up to FORGOTTEN_SHARE the concept stays forgotten, up to
# PARTLY_SHARE it is partly back.
FORGOTTEN_SHARE, PARTLY_SHARE = 0.1, 0.5

# A variant says nothing if the original's FA@1 is below this, in percent.
READABLE = 20.0

# A difference of up to this many points may be chance.
CHANCE = 5.0


class Verdict(StrEnum):
    """The conclusion drawn from one variant of a check."""

    FORGOTTEN = "stays forgotten"
    PARTLY_BACK = "partly back"
    BACK = "comes back"
    AS_NEW = "learnt as if new"
    AS_CONTROL = "not beyond its control"
    NOTHING = "says nothing"


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """One line of the verdict table. A short table omits lines marked `detail`.

    `control` is the accuracy of the other model under the same effort without the concept,
    `original_control` that of the original.
    """

    check: Check
    variant: str
    before: Accuracy
    after: Accuracy
    verdict: Verdict
    note: str = ""
    utility_before: dict[str, Accuracy] | None = None
    utility_after: dict[str, Accuracy] | None = None
    detail: bool = False
    control: Accuracy | None = None
    original_control: Accuracy | None = None

    @property
    def added(self) -> Difference | None:
        """FA@1 minus the control's; None without a control."""
        return difference(self.after, self.control) if self.control else None

    @property
    def gain(self) -> float:
        """FA@1 minus the control's, in points."""
        return self.after.top1 - (self.control.top1 if self.control else 0.0)

    @property
    def brings_back(self) -> bool:
        """Whether the gain exceeds chance and its 95% interval lies above 0."""
        low, _ = Share.of(self.after.top1, self.after.rows).interval
        beyond = (self.added.low if self.added else low) > 0
        return self.verdict is not Verdict.NOTHING and beyond and self.gain > CHANCE

    @property
    def utilities(self) -> tuple[dict[str, Accuracy] | None, dict[str, Accuracy] | None]:
        """The utility of the original and of the other model."""
        return self.utility_before, self.utility_after

    @property
    def utility_change(self) -> float | None:
        """The change of TA@1 against the original in points, averaged over the sets."""
        before, after = (side or {} for side in self.utilities)
        changes = [now.top1 - before[name].top1 for name, now in after.items() if name in before]
        return sum(changes) / len(changes) if changes else None


def verdict(before: Accuracy, after: Accuracy) -> Verdict:
    """Return the verdict on the accuracies of the original and of the other model."""
    if before.top1 < READABLE:
        return Verdict.NOTHING
    share = after.top1 / before.top1
    if share <= FORGOTTEN_SHARE:
        return Verdict.FORGOTTEN
    return Verdict.PARTLY_BACK if share <= PARTLY_SHARE else Verdict.BACK


Judge = Callable[[Accuracy, Accuracy], Verdict]


def attack_verdict(
    before: Accuracy, after: Accuracy, controls: tuple[Accuracy, Accuracy]
) -> Verdict:
    """Return the verdict on an attack, from how much of the name's contribution remains.

    An attack that does not significantly exceed its control says no more than the control.
    """
    plain = verdict(before, after)
    if plain in (Verdict.NOTHING, Verdict.FORGOTTEN):
        return plain
    was, now = difference(before, controls[0]), difference(after, controls[1])
    if now.low <= 0 or now.points <= FORGOTTEN_SHARE * was.points:
        return Verdict.AS_CONTROL
    return Verdict.PARTLY_BACK if now.points <= PARTLY_SHARE * was.points else Verdict.BACK


def variant_rows(before: Finding, after: Finding, judge: Judge = verdict) -> Iterator[VerdictRow]:
    """Yield a line for each variant on both models."""
    known = {variant.name: variant for variant in before.variants}
    for variant in after.variants:
        if original := known.get(variant.name):
            yield VerdictRow(
                after.check,
                variant.name,
                original.forget,
                variant.forget,
                judge(original.forget, variant.forget),
                utility_before=original.utility,
                utility_after=variant.utility,
            )


def mean_and_worst(before: Finding, after: Finding, judge: Judge = verdict) -> Iterator[VerdictRow]:
    """Yield the mean over the variants, then each; all but the worst are detail.

    Mean and worst are over variants that say something, if there are any.
    """
    lines = list(variant_rows(before, after, judge))
    if not lines:
        return
    counted = [line for line in lines if line.verdict is not Verdict.NOTHING] or lines
    original = _mean([line.before for line in counted])
    edited = _mean([line.after for line in counted])
    mean = f"{len(counted)} of {len(lines)}, mean"
    yield VerdictRow(after.check, mean, original, edited, judge(original, edited))
    worst = max(counted, key=lambda line: line.after.top1)
    for line in lines:
        yield replace(line, detail=line is not worst)


def _mean(accuracies: Sequence[Accuracy]) -> Accuracy:
    """Return the mean of accuracies on the same images."""
    top1 = sum(each.top1 for each in accuracies) / len(accuracies)
    top5 = sum(each.top5 for each in accuracies) / len(accuracies)
    return replace(accuracies[0], top1=top1, top5=top5)


def attack_rows(
    subject: str, control: str, *, variant: str, adds: str
) -> Callable[[Finding, Finding], Iterator[VerdictRow]]:
    """Return a function that yields the line of an attack on `subject` and its control.

    `variant` describes the attack, with the finding's settings filled in; `adds` begins the
    note about what the concept adds to the control.
    """

    def rows(before: Finding, after: Finding) -> Iterator[VerdictRow]:
        if not (before.attempts and after.attempts):
            return
        was, now = (finding.best(subject).forget for finding in (before, after))
        controls = before.best(control).forget, after.best(control).forget
        added, original = difference(now, controls[1]), difference(was, controls[0])
        yield VerdictRow(
            after.check,
            variant.format(**after.settings),
            was,
            now,
            attack_verdict(was, now, controls),
            f"{adds} {added}; to the original's {original}",
            control=controls[1],
            original_control=controls[0],
        )

    return rows
