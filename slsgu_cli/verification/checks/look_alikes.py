"""`look-alikes`: the accuracy that classes like the concept lost, next to random classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slsgu_cli.engine.utility import LEAST_ROWS
from slsgu_cli.errors import InputError
from slsgu_cli.records.figures import ClassLoss, Difference
from slsgu_cli.records.verification import KIND, Check, KnownClass, Settings, VerifiedModel
from slsgu_cli.sources.prompts import find_class
from slsgu_cli.text import near
from slsgu_cli.verification.bootstrap import Values, percentile_interval, resampled_means
from slsgu_cli.verification.checks.nearest import known_classes
from slsgu_cli.verification.model import ModelUnderTest, SkippedCheck
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.verdicts import VerdictRow

LOOK_ALIKES, RANDOM = "look-alikes", "random classes"


@dataclass(frozen=True, slots=True)
class GroupLoss:
    """The accuracy that a group of classes lost.

    `before` and `after` are the mean TA@1 of its classes in percent, `lost` is their difference
    in points, and `low` and `high` its 95% interval by a bootstrap over classes. `worst` is the
    class that lost most, of those with enough images. `beyond` is the loss minus that of the
    control, with its interval; None for the control itself.
    """

    group: str
    classes: int
    rows: int
    before: float
    after: float
    lost: float
    low: float
    high: float
    worst: ClassLoss | None
    beyond: Difference | None = None


def group_losses(original: VerifiedModel, other: VerifiedModel) -> list[GroupLoss]:
    """Return the losses of look-alikes and of random classes; none unless both models have them."""
    before, after = original.finding(Check.LOOK_ALIKES), other.finding(Check.LOOK_ALIKES)
    if not (before and after and before.classes and after.classes):
        return []
    if before.settings != after.settings:
        return []
    accuracy = {(group, each.name): each.top1 for group, of in after.classes.items() for each in of}
    look_alikes, control = (
        [
            ClassLoss(each.name, each.rows, each.top1, accuracy[key, each.name])
            for key, known in before.classes.items()
            for each in known
            if key.startswith(group) and (key, each.name) in accuracy
        ]
        for group in (LOOK_ALIKES, RANDOM)
    )
    beyond = _mean_lost(look_alikes) - _mean_lost(control)
    # The two groups are drawn independently.
    draws = _resampled(look_alikes, 0) - _resampled(control, 1)
    return [
        _group_loss(LOOK_ALIKES, look_alikes, Difference(beyond, *percentile_interval(draws))),
        _group_loss(RANDOM, control, None),
    ]


def _mean_lost(classes: Sequence[ClassLoss]) -> float:
    return sum(each.lost for each in classes) / len(classes)


def _resampled(classes: Sequence[ClassLoss], seed: int) -> Values:
    return resampled_means([each.lost for each in classes], seed)


def _group_loss(group: str, classes: Sequence[ClassLoss], beyond: Difference | None) -> GroupLoss:
    enough = [each for each in classes if each.rows >= LEAST_ROWS]
    low, high = percentile_interval(_resampled(classes, 0))
    return GroupLoss(
        group,
        len(classes),
        sum(each.rows for each in classes),
        sum(each.before for each in classes) / len(classes),
        sum(each.after for each in classes) / len(classes),
        _mean_lost(classes),
        low,
        high,
        max(enough, key=lambda each: each.lost, default=None),
        beyond,
    )


def figures(original: VerifiedModel, other: VerifiedModel) -> dict[str, float]:
    """Return the points that look-alikes lost: the mean, and the most of one class."""
    losses = group_losses(original, other)
    if not losses:
        return {}
    worst = losses[0].worst
    return {"mean": losses[0].lost} | ({"worst": worst.lost} if worst else {})


def sentence(
    original: VerifiedModel, other: VerifiedModel, _strongest: VerdictRow | None
) -> str | None:
    """Return what look-alikes lost, and whether random classes lost as much."""
    losses = group_losses(original, other)
    if not losses:
        return None
    look_alikes, control = losses
    worst, most = look_alikes.worst, ""
    if worst and worst.lost > 0:
        most = f" Most: {worst.name}, from {worst.before:.0f}% to {worst.after:.0f}%."
    return (
        f"{look_alikes.classes} look-alikes lost {look_alikes.lost:z.1f} points of TA@1 on average "
        f"(95% interval {look_alikes.low:z.1f} to {look_alikes.high:z.1f}), {control.classes} "
        f"random classes {control.lost:z.1f} ({control.low:z.1f} to {control.high:z.1f}); "
        f"difference: {look_alikes.beyond}.{most}"
    )


def look_alikes(model: ModelUnderTest, settings: Settings) -> dict[str, tuple[KnownClass, ...]]:
    """Return classes like the concept, and as many random others, by group and evaluation set.

    Look-alikes are the classes with the names nearest to the concept's in the original model,
    at most half of all, or those in the settings. The others are of the same evaluation sets.
    All images of a class are measured. Raises InputError for a name that is no class, and
    SkippedCheck without a class for the control.
    """
    of_sets = known_classes(model, named_by=model.original() if model.original else model)
    others = [
        (name, each)
        for name, known in of_sets.items()
        for each in known
        if find_class([each.name], model.name) is None
    ]
    if settings.look_alikes:
        chosen = _named(others, settings.look_alikes)
    else:
        nearest = sorted(others, key=lambda pair: (-pair[1].cosine, pair[1].name))
        chosen = nearest[: min(settings.look_alike_count, len(nearest) // 2)]
    generator, groups = np.random.default_rng(settings.seed), {}
    for name in sorted({name for name, _ in chosen}):
        known = tuple(each for of_set, each in chosen if of_set == name)
        rest = [each for of_set, each in others if of_set == name and each not in known]
        rest.sort(key=lambda each: each.name)
        drawn = np.sort(generator.permutation(len(rest))[: len(known)])
        groups[f"{LOOK_ALIKES}{KIND}{name}"] = known
        groups[f"{RANDOM}{KIND}{name}"] = tuple(rest[place] for place in drawn)
    if not any(known for key, known in groups.items() if key.startswith(RANDOM)):
        raise SkippedCheck("no other class with images remains for its control")
    return groups


def _named(
    classes: Sequence[tuple[str, KnownClass]], names: Sequence[str]
) -> list[tuple[str, KnownClass]]:
    """Return the classes with these names. Raises InputError for a name without a class."""
    known = [each.name for _, each in classes]
    for name in names:
        if find_class(known, name) is None:
            raise InputError(
                f"{name}, of --look-alikes, is no other class with images in an evaluation set",
                hint=near(name, known) or "give class names of the evaluation sets",
            )
    return [pair for pair in classes if find_class(names, pair[1].name) is not None]


SPEC = CheckSpec(
    run=look_alikes,
    fills="classes",
    settings=("look_alikes", "look_alike_count", "seed"),
    sentence=sentence,
    figures=figures,
)
