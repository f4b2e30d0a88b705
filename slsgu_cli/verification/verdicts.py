"""From figures to words: what each probe of an edited model says beside the original.

The thresholds are shares of the original model's own accuracy under the same probe, so
that a probe which nobody could read images through condemns no edit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from slsgu_cli.records.method import Accuracy
from slsgu_cli.records.studies import NEW, Attack, Check, Curve, Finding, VerifiedModel
from slsgu_cli.verification.probes import TEMPLATE

# Of the original's FA@1: up to here it is forgotten, up to there it is partly back.
KEPT, PARTLY = 0.1, 0.5

# Points of FA@1 of the original under which a probe says nothing.
READABLE = 20.0

# The share of the original's FA@1 at which the concept has returned.
RETURNED = 0.9

# A name that returns in at least this share of a new name's steps is learnt, not remembered.
AS_NEW = 0.5

# Points above chance up to which members are not told apart, and by which attacks differ.
CHANCE = 5.0


class Verdict(StrEnum):
    """What a probe says."""

    FORGOTTEN = "kept forgotten"
    PARTLY_BACK = "partly back"
    BACK = "comes back"
    AS_NEW = "learnt as if new"
    NOTHING = "says nothing"


class Exposure(StrEnum):
    """What an attack on membership says."""

    HIDDEN = "not told apart"
    LESS = "told apart less"
    SAME = "told apart as before"
    MORE = "told apart more"


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """One line of the result. `detail` lines are left out of a short table."""

    check: Check
    probe: str
    before: Accuracy
    after: Accuracy
    verdict: Verdict
    note: str = ""
    utility_before: dict[str, Accuracy] | None = None
    utility_after: dict[str, Accuracy] | None = None
    detail: bool = False

    @property
    def utilities(self) -> tuple[dict[str, Accuracy] | None, dict[str, Accuracy] | None]:
        """The original's utility and the other model's."""
        return self.utility_before, self.utility_after


def verdict(before: Accuracy, after: Accuracy) -> Verdict:
    """Return what a probe says, from the original's accuracy under it and the other model's."""
    if before.top1 < READABLE:
        return Verdict.NOTHING
    share = after.top1 / before.top1
    if share <= KEPT:
        return Verdict.FORGOTTEN
    return Verdict.PARTLY_BACK if share <= PARTLY else Verdict.BACK


def exposure(before: Attack, after: Attack) -> Exposure:
    """Return what an attack says, from its accuracy on the original and on the other model.

    An attack below chance tells nothing: it is trained on rows other than it is scored on.
    """
    if after.mean - 50 <= max(CHANCE, after.deviation):
        return Exposure.HIDDEN
    was = max(50.0, before.mean)
    if abs(after.mean - was) <= CHANCE:
        return Exposure.SAME
    return Exposure.MORE if after.mean > was else Exposure.LESS


def steps_to(curve: Curve, goal: float) -> int | None:
    """Return the first measured step at which FA@1 is `goal` percent or more."""
    return next((point.step for point in curve.points if point.forget.top1 >= goal), None)


def rows(original: VerifiedModel, other: VerifiedModel) -> list[VerdictRow]:
    """Return a line for each probe that both models went through."""
    lines: list[VerdictRow] = []
    for check in Check:
        before, after = original.finding(check), other.finding(check)
        if before and after:
            lines += _of_probes(check, before, after)
            lines += _of_finetuning(check, before, after)
            lines += _of_relearning(check, before, after)
    return lines


def _of_probes(check: Check, before: Finding, after: Finding) -> Iterator[VerdictRow]:
    """Yield a line for each probe; of single templates all but the worst are detail."""
    pairs = list(zip(before.probes, after.probes, strict=True))
    alone = [pair for pair in pairs if pair[1].name.startswith(TEMPLATE)]
    worst = max(alone, key=lambda pair: pair[1].forget.top1, default=None)
    for was, now in pairs:
        yield VerdictRow(
            check,
            now.name,
            was.forget,
            now.forget,
            verdict(was.forget, now.forget),
            "",
            was.utility,
            now.utility,
            detail=(was, now) in alone and (was, now) != worst,
        )


def _of_finetuning(check: Check, before: Finding, after: Finding) -> Iterator[VerdictRow]:
    """Yield the line of the step at which most had come back."""
    if check is not Check.FINETUNE:
        return
    was, now = before.curves[0], after.curves[0]
    place = max(range(len(now.points)), key=lambda index: now.points[index].forget.top1)
    first, second = was.points[place].forget, now.points[place].forget
    yield VerdictRow(
        check,
        f"{now.points[-1].step} steps",
        first,
        second,
        verdict(first, second),
        f"most at step {now.points[place].step}",
        was.utility,
        now.utility,
    )


def _of_relearning(check: Check, before: Finding, after: Finding) -> Iterator[VerdictRow]:
    """Yield the line that holds the steps to return against the steps to learn a new name."""
    if check is not Check.RELEARN:
        return
    was, now = before.curves[0], after.curves[0]
    new = next(curve for curve in before.curves if curve.name == NEW)
    first, last = was.points[0].forget, now.points[-1]
    goal = RETURNED * first.top1
    back, learnt = steps_to(now, goal), steps_to(new, goal)
    unknown = first.top1 < READABLE
    word = verdict(first, last.forget) if unknown or back is None else Verdict.BACK
    needed = last.step if back is None else back
    if word in (Verdict.PARTLY_BACK, Verdict.BACK) and learnt and needed >= AS_NEW * learnt:
        word = Verdict.AS_NEW
    yield VerdictRow(
        check,
        f"{last.step} steps, {after.settings['shots']} shots",
        was.points[-1].forget,
        last.forget,
        word,
        f"back {_at(back)}; a new name {_at(learnt)}",
        was.utility,
        now.utility,
    )


def _at(step: int | None) -> str:
    return "not within these steps" if step is None else f"at step {step}"
