"""`relearn`: training on images of the concept, compared with learning a new name."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from slsgu_cli.clip.towers import EMBED
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.verification import NEW, OWN, Curve, Finding, Settings
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.training import SETTINGS, Batch, cycled, pairs, trained
from slsgu_cli.verification.verdicts import READABLE, Verdict, VerdictRow, verdict

# One in four pairs of a mini-batch shows the concept: enough to teach it, without ruining the
# model.
CONCEPT_PAIRS = 4
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"

# The concept is back at this share of the original's FA@1.
RETURNED = 0.9
# A name that needs at least this share of a new name's steps is learnt, not remembered.
AS_NEW = 0.5


def rows(before: Finding, after: Finding) -> Iterator[VerdictRow]:
    """Yield the line that compares the steps to return with those to learn a new name."""
    was, now, new = before.curves[0], after.curves[0], _new_name_curve(before)
    first, last = was.points[0].forget, now.points[-1]
    goal = RETURNED * first.top1
    back, learnt = steps_to(now, goal), steps_to(new, goal)
    unknown = first.top1 < READABLE
    word = verdict(first, last.forget) if unknown or back is None else Verdict.BACK
    needed = last.step if back is None else back
    if word in (Verdict.PARTLY_BACK, Verdict.BACK) and learnt and needed >= AS_NEW * learnt:
        word = Verdict.AS_NEW
    yield VerdictRow(
        after.check,
        _variant(last.step, after),
        was.points[-1].forget,
        last.forget,
        word,
        f"back {_at(back)}; a new name {_at(learnt)}",
        was.utility,
        now.utility,
        control=new.points[-1].forget,
    )


def strongest(row: VerdictRow, before: Finding, after: Finding) -> VerdictRow:
    """Return the line of the step furthest ahead of the new name, if it brings the name back."""
    learnt = {point.step: point.forget for point in _new_name_curve(before).points}
    points = [point for point in after.curves[0].points if point.step in learnt]
    best = max(points, key=lambda point: point.forget.top1 - learnt[point.step].top1)
    variant, control = _variant(best.step, after), learnt[best.step]
    ahead = replace(row, variant=variant, after=best.forget, control=control)
    return ahead if ahead.brings_back else row


def steps_to(curve: Curve, goal: float) -> int | None:
    """Return the first measured step at which FA@1 is at least `goal` percent."""
    return next((point.step for point in curve.points if point.forget.top1 >= goal), None)


def _new_name_curve(original: Finding) -> Curve:
    return next(curve for curve in original.curves if curve.name == NEW)


def _variant(steps: int, finding: Finding) -> str:
    return f"{steps} steps, {finding.settings['shots']} shots"


def _at(step: int | None) -> str:
    return "not within these steps" if step is None else f"at step {step}"


def relearn(model: ModelUnderTest, settings: Settings) -> list[Curve]:
    """Train on images of the concept under its name; the original also under a new name."""
    targets = {OWN: model.name}
    if model.original is None:
        targets[NEW] = new_name(model.name, seed=settings.seed)
    curves: list[Curve] = []
    for label, target in targets.items():
        curves += model.results.next(1, partial(taught, model, settings, label, target))
    return curves


SPEC = CheckSpec(
    run=relearn,
    fills="curves",
    settings=("shots", *SETTINGS),
    rows=rows,
    effort="training on its images ({})",
    control="a made-up name",
    strongest=strongest,
)


def new_name(name: str, *, seed: int) -> str:
    """Return a made-up word about as long as `name`, of alternating consonants and vowels."""
    generator = np.random.default_rng((seed, len(name)))
    sounds = (CONSONANTS, VOWELS)
    length = min(max(len(name), 4), 12)
    return "".join(str(generator.choice(list(sounds[i % 2]))) for i in range(length))


def taught(model: ModelUnderTest, settings: Settings, label: str, target: str) -> list[Curve]:
    """Train on images of the concept named `target`, and measure by that name."""
    names, features = model.renamed(target), model.evaluation.forget.images.after_edit
    batches = _mixed(model, settings, target)

    def measure() -> Accuracy:
        return model.forget_accuracy(model.classes(names, model.templates), features(EMBED))

    points, utility = trained(model, batches, settings, name=target, measure=measure, utility=False)
    return [Curve(label, target, points, utility)]


def _mixed(model: ModelUnderTest, settings: Settings, target: str) -> Iterator[Batch]:
    """Yield mini-batches with some pairs of the concept and the rest of the retain set.

    Only `shots` images of the concept occur, captioned by the set's templates with `target`.
    """
    generator = np.random.default_rng(settings.seed)
    chosen = np.sort(generator.permutation(model.forget.rows)[: settings.shots])
    images = model.forget.take(chosen)
    captions = model.tokenize([template.replace("{}", target) for template in model.templates])
    size = max(1, settings.batch_size // CONCEPT_PAIRS)
    concept_rows = cycled(len(chosen), size, seed=settings.seed)
    retain_rows = cycled(model.retain.rows, settings.batch_size - size, seed=settings.seed)
    for concept, retain in zip(concept_rows, retain_rows, strict=True):
        words = captions[generator.integers(0, len(captions), size)]
        rest = pairs(model.retain, retain)
        yield Batch(
            np.concatenate([images[concept], rest.images]),
            np.concatenate([words, rest.tokens]),
            alike=size,
        )
