"""Figures: shares with their exact intervals, accuracies, and what an edit does to them."""

import math
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from slsgu_cli.errors import UsageError
from slsgu_cli.text import near

# The confidence level of intervals, and the number of bisection steps for their ends.
CONFIDENCE = 0.95
HALVINGS = 60


@dataclass(frozen=True, slots=True)
class Share:
    """A count of images or answers out of a total."""

    count: int
    total: int

    @classmethod
    def of(cls, percent: float, total: int) -> "Share":
        """Return the share nearest to a percentage of `total`."""
        return cls(round(percent * total / 100) if total else 0, total)

    @property
    def percent(self) -> float | None:
        """Return the share in percent; None if the total is 0."""
        return 100 * self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """The exact two-sided 95% interval of the share in percent (Clopper and Pearson 1934)."""
        tail = (1 - CONFIDENCE) / 2
        low = 1 - _largest_share(self.total - self.count, self.total, tail)
        return 100 * low, 100 * _largest_share(self.count, self.total, tail)

    @property
    def upper_bound(self) -> float:
        """The one-sided 95% upper bound in percent, rounded up to a tenth."""
        tenths = 1000 * _largest_share(self.count, self.total, 1 - CONFIDENCE)
        return math.ceil(tenths) / 10

    def in_words(self, things: str) -> str:
        """Return the share of `things` with its 95% upper bound or interval."""
        counted = f"{self.count} of {self.total} {things}"
        if self.total == 0:
            return counted
        if self.count == 0:
            return f"{counted} (95% upper bound: {self.upper_bound:.1f}%)"
        low, high = self.interval
        return f"{counted} ({self.percent:.1f}%; 95% interval {low:.1f} to {high:.1f}%)"


def _largest_share(count: int, total: int, tail: float) -> float:
    """Return the share under which `count` or fewer of `total` have the probability `tail`.

    It is 1 if all are counted or the total is 0. Above count / total, the terms of the binomial
    sum decrease from `count` down, so the sum ends at the first negligible term.
    """
    if count >= total:
        return 1.0
    ways = math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1)
    low, high = count / total, 1.0
    for _ in range(HALVINGS):
        share = (low + high) / 2
        if share >= 1:
            break
        term = math.exp(ways + count * math.log(share) + (total - count) * math.log1p(-share))
        likelihood, k = term, count
        while k and term > likelihood * 1e-17:
            term *= k / (total - k + 1) * (1 - share) / share
            likelihood += term
            k -= 1
        low, high = (share, high) if likelihood > tail else (low, share)
    return (low + high) / 2


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Zero-shot accuracy in percent over `rows` images, or `of_prompts` where there are none.

    With `is_test`, no layer or step was chosen by these.
    """

    top1: float
    top5: float
    rows: int
    is_test: bool = False
    of_prompts: bool = False

    @property
    def measured_on(self) -> str:
        """What the accuracy is measured on, in the plural."""
        return "prompts" if self.of_prompts else "images"


@dataclass(frozen=True, slots=True)
class TextStructure:
    """How much an edit leaves of the structure of text embeddings, over neutral `prompts`.

    `spread` is the spread of their unit embeddings in percent of the original's, and `overlap`
    the mean overlap of the nearest prompts of each before and after, in percent. Both are 100 if
    the text tower is unchanged.
    """

    prompts: int
    spread: float = 100.0
    overlap: float = 100.0


@dataclass(frozen=True, slots=True)
class Difference:
    """By how many points one accuracy exceeds another, with a 95% interval."""

    points: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return it in words, as `+3.3 points (95% interval -12.0 to +18.5)`."""
        return f"{self.points:+.1f} points (95% interval {self.low:+.1f} to {self.high:+.1f})"


def difference(first: Accuracy, second: Accuracy) -> Difference:
    """Return by how much the first top-1 accuracy exceeds the second.

    The interval is Newcombe's (1998, "square and add"), from both exact intervals. It assumes
    independent samples, so it is wider than necessary if both are of the same images.
    """
    shares = [Share.of(accuracy.top1, accuracy.rows) for accuracy in (first, second)]
    (low, high), (other_low, other_high) = (share.interval for share in shares)
    points = first.top1 - second.top1
    return Difference(
        points,
        points - math.hypot(first.top1 - low, other_high - second.top1),
        points + math.hypot(high - first.top1, second.top1 - other_low),
    )


@dataclass(frozen=True, slots=True)
class ClassLoss:
    """One class of an evaluation set: its top-1 accuracy in percent before and after an edit."""

    name: str
    rows: int
    before: float
    after: float

    @property
    def lost(self) -> float:
        """The accuracy that the class lost, in points; negative if it gained."""
        return self.before - self.after


# The figures of a TextStructure, as assertions name them.
STRUCTURE = ("spread", "overlap")

# The comparisons of an assertion.
RELATIONS = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, slots=True)
class Assertion:
    """A condition on a figure, such as `fa1<=0`."""

    figure: str
    relation: str
    bound: float

    def __str__(self) -> str:
        """Return its words."""
        return f"{self.figure}{self.relation}{self.bound:g}"

    def holds(self, value: float) -> bool:
        """Return whether a value meets the condition; NaN never does."""
        return bool(RELATIONS[self.relation](round(value, 9), self.bound))


def read_assertions(name: str, texts: Sequence[str]) -> tuple[Assertion, ...]:
    """Parse the assertions of an option. Raises UsageError."""
    read = []
    for text in texts:
        match = re.fullmatch(r"\s*(.*?[^\s<>=])\s*(<=|>=|==|<|>)\s*([^\s<>=]+)\s*", text)
        try:
            figure, relation, bound = match.groups() if match else ("", "", "nan")
            number = float(bound)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            raise UsageError(
                f"{name} {text!r} compares no figure with a number",
                hint=f"{name} 'fa1<=0', or {name} 'loss.SET<=0.5'",
            )
        read.append(Assertion(figure, relation, number))
    return tuple(read)


def require_known(
    assertions: Iterable[Assertion],
    names: Sequence[str],
    sets: Iterable[str],
    *,
    compared: bool,
    further: Iterable[str] = (),
    said: str = "--assert",
) -> None:
    """Raise UsageError for an assertion on a figure that `eval` of these sets does not have.

    `sets` are the evaluation sets. Losses on them, and the structure of text embeddings, are known
    if models are `compared`. `further` adds other figures. `said` is the name of the option in
    messages.
    """
    concepts = [""] if len(names) == 1 else [f".{name}" for name in names]
    known = [f"fa{k}{behind}" for behind in concepts for k in (1, 5)]
    for name in sorted(sets):
        known += [f"ta1.{name}", f"ta5.{name}", *([f"loss.{name}"] if compared else [])]
    known += [*(STRUCTURE if compared else ()), *further]
    for each in assertions:
        if each.figure not in known:
            raise UsageError(
                f"{said} {each} is about an unknown figure; known figures: {', '.join(known)}",
                hint=near(each.figure, known) or f"{said} '{known[0]}<=0'",
            )


Loss = TypeVar("Loss", bound=ClassLoss)


def harmed(losses: Iterable[Loss]) -> list[Loss]:
    """Return the classes that lost accuracy, largest loss first, ties by name."""
    lost = [loss for loss in losses if loss.lost > 0]
    return sorted(lost, key=lambda loss: (-loss.lost, loss.name))


@dataclass(frozen=True, slots=True)
class Figures:
    """Accuracy of a model on the concept, and on everything else by evaluation set."""

    forget: Accuracy
    utility: dict[str, Accuracy]


@dataclass(frozen=True, slots=True)
class EarlierEdit:
    """An earlier edit that a later one builds on, with accuracies on its concept.

    They are those of the original model, and of the models `before` and `after` the later edit.
    `digest` is the digest of the header.
    """

    digest: str
    original: Accuracy
    before: Accuracy
    after: Accuracy


@dataclass(frozen=True, slots=True)
class BaseEdits:
    """The edits that a later edit builds on, by name, and the figures with only these applied."""

    edits: dict[str, EarlierEdit]
    figures: Figures


@dataclass(frozen=True, slots=True)
class Report:
    """Test accuracy before and after an edit.

    `harmed` has the classes that lost most; `nearest` has the classes whose names are nearest to
    the concept's under the original model, nearest first; at most 20 of each. `words` has each
    word of a concept of several: how often one of them is recognised where it is shown.
    """

    before: Figures
    after: Figures
    harmed: tuple[ClassLoss, ...]
    nearest: tuple[ClassLoss, ...]
    words: tuple[ClassLoss, ...] = ()
    base_edits: BaseEdits | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """How well a model built on CLIP still shows the concept, and everything else.

    `concept` counts images recognised as the concept (or answers that name it), `others` images
    of other classes recognised as their class.
    """

    concept: Share
    others: Share

    @property
    def unlearned(self) -> Share:
        """The share of images of the concept that are not recognised."""
        return Share(self.concept.total - self.concept.count, self.concept.total)

    @property
    def ua(self) -> float | None:
        """The unlearning accuracy in percent: images of the concept that are not recognised."""
        share = self.concept.percent
        return None if share is None else 100 - share

    @property
    def ira(self) -> float | None:
        """The retained accuracy in percent: images of other classes that are recognised."""
        return self.others.percent


def meets(goal: float, concept: Share) -> bool:
    """Return whether the unlearning accuracy in percent reaches a goal."""
    return 100 - (concept.percent or 0.0) >= goal


@dataclass(frozen=True, slots=True)
class JudgeFigures:
    """The effect on a model built on CLIP, by one judge, before and after an edit."""

    judge: str
    before: Effect
    after: Effect


@dataclass(frozen=True, slots=True)
class TargetFigures:
    """The effect of an edit on the target that it was searched on.

    `judge` decided in the search and gives `before` and `after`; `further` are figures by other
    judges. With `is_test`, these images or answers did not select layer or step. `applied` has the
    digests of the applied edits of other text encoders.
    """

    target: str
    fingerprint: str
    before: Effect
    after: Effect
    judge: str
    is_test: bool = False
    further: tuple[JudgeFigures, ...] = ()
    applied: dict[str, str] = field(default_factory=dict)

    @property
    def by_judge(self) -> tuple[JudgeFigures, ...]:
        """The figures by each judge, the one that decided in the search first."""
        return JudgeFigures(self.judge, self.before, self.after), *self.further


@dataclass(frozen=True, slots=True)
class PassTime:
    """The duration of a gradient pass or a search, and the device."""

    seconds: float
    where: str
