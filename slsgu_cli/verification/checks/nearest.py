"""`nearest`: the accuracy that each class lost, above all those with the nearest names."""

from collections.abc import Sequence
from dataclasses import dataclass

from slsgu_cli.clip.evaluation import by_nearness
from slsgu_cli.clip.metrics import class_accuracies
from slsgu_cli.engine.utility import LEAST_ROWS
from slsgu_cli.records.figures import ClassLoss, harmed
from slsgu_cli.records.verification import Check, KnownClass, Settings, VerifiedModel
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.verdicts import VerdictRow

# How many classes to show: those with the nearest names, and those that lost most.
NEAREST_NAMES, HARMED = 20, 10


@dataclass(frozen=True, slots=True)
class LossRow(ClassLoss):
    """The accuracy that a class of an evaluation set lost, and the cosine of its name."""

    evaluation: str
    cosine: float


def losses(original: VerifiedModel, other: VerifiedModel) -> list[LossRow]:
    """Return the loss of each class by evaluation set, the nearest names first.

    Cosines are those of the original's class embeddings.
    """
    before, after = original.finding(Check.NEAREST), other.finding(Check.NEAREST)
    if not (before and after and before.classes and after.classes):
        return []
    accuracy = {(name, each.name): each.top1 for name, of in after.classes.items() for each in of}
    return [
        LossRow(each.name, each.rows, each.top1, accuracy[name, each.name], name, each.cosine)
        for name, classes in before.classes.items()
        for each in classes
    ]


def nearest_names(rows: Sequence[LossRow]) -> dict[str, list[LossRow]]:
    """Return the classes of each set whose names are nearest to the concept's."""
    sets: dict[str, list[LossRow]] = {}
    for row in rows:
        sets.setdefault(row.evaluation, []).append(row)
    return {name: classes[:NEAREST_NAMES] for name, classes in sets.items()}


def most_harmed(rows: Sequence[LossRow]) -> list[LossRow]:
    """Return the classes of all sets that lost most, among those with enough images."""
    return harmed([row for row in rows if row.rows >= LEAST_ROWS])[:HARMED]


def sentence(
    original: VerifiedModel, other: VerifiedModel, _strongest: VerdictRow | None
) -> str | None:
    """Return which class lost most."""
    rows = losses(original, other)
    if not rows:
        return None
    if not (most := most_harmed(rows)):
        return f"No class with at least {LEAST_ROWS} images lost accuracy."
    loss = most[0]
    return (
        f"Of the classes with at least {LEAST_ROWS} images, {loss.name} lost most: TA@1 on its "
        f"{loss.rows} images fell from {loss.before:.0f}% to {loss.after:.0f}%."
    )


def nearest(model: ModelUnderTest, _settings: Settings) -> dict[str, tuple[KnownClass, ...]]:
    """Return the classes with images by evaluation set, the nearest names first.

    All images of the sets are measured: a mean over all classes hides which one lost.
    """
    return known_classes(model, named_by=model)


def known_classes(
    model: ModelUnderTest, *, named_by: ModelUnderTest
) -> dict[str, tuple[KnownClass, ...]]:
    """Return the classes with images by evaluation set, the nearest names first.

    Cosines are those of the class embeddings of `named_by`.
    """
    known = {}
    for name, group in model.groups().items():
        accuracies, rows = class_accuracies(
            group.base_ranks() == 0, group.images.labels, len(group.names)
        )
        named = {name: named_by.whole[name]}
        known[name] = tuple(
            KnownClass(group.names[i], int(rows[i]), float(accuracies[i]), cosine)
            for cosine, _, i in by_nearness(named, named_by.concept_embedding)
            if rows[i]
        )
    return known


SPEC = CheckSpec(run=nearest, fills="classes", sentence=sentence)
