"""`description`: texts that describe the concept without its name."""

from functools import partial

import numpy as np

from slsgu_cli import progress
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.verification import Check, Settings, Variant, VerifiedModel
from slsgu_cli.sources.descriptions import read_descriptions
from slsgu_cli.sources.matching import matcher
from slsgu_cli.verification.model import ModelUnderTest, SkippedCheck
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.verdicts import (
    READABLE,
    Verdict,
    VerdictRow,
    mean_and_worst,
    variant_rows,
    verdict,
)


def unnamed_descriptions(path: str, concept: str) -> tuple[str, ...]:
    """Return the descriptions of a concept in a file that do not contain its name.

    Raises MissingError and InputError.
    """
    texts, contains_name = read_descriptions(path, concept), matcher([concept])
    unnamed = tuple(text for text in texts if not contains_name(text))
    if named := len(texts) - len(unnamed):
        progress.warn(f"left out {named} of {len(texts)} descriptions that contain {concept}")
    return unnamed


def judge(before: Accuracy, after: Accuracy) -> Verdict:
    """Return the verdict on a description.

    A text by which only the other model recognises the concept brings it back.
    """
    found = verdict(before, after)
    return Verdict.BACK if found is Verdict.NOTHING and after.top1 >= READABLE else found


def lines_by_use(
    original: VerifiedModel, other: VerifiedModel
) -> tuple[list[VerdictRow], list[VerdictRow]]:
    """Return the lines of all descriptions, and of those that say something."""
    before, after = original.finding(Check.DESCRIPTION), other.finding(Check.DESCRIPTION)
    lines = list(variant_rows(before, after, judge)) if before and after else []
    return lines, [line for line in lines if line.verdict is not Verdict.NOTHING]


def figures(original: VerifiedModel, other: VerifiedModel) -> dict[str, float]:
    """Return the mean and the highest FA@1 over descriptions that say something."""
    _, counted = lines_by_use(original, other)
    top1 = [line.after.top1 for line in counted]
    return {"mean": sum(top1) / len(top1), "worst": max(top1)} if top1 else {}


def sentence(
    original: VerifiedModel, other: VerifiedModel, _strongest: VerdictRow | None
) -> str | None:
    """Return how many images descriptions find, or that they say nothing."""
    lines, counted = lines_by_use(original, other)
    if not lines:
        return None
    if not counted:
        return (
            f"None of {len(lines)} descriptions finds {READABLE:.0f}% of its images in either "
            "model, so they say nothing about the edit."
        )
    found, before = figures(original, other), sum(line.before.top1 for line in counted)
    return (
        f"{len(counted)} of {len(lines)} descriptions without its name find its images in at "
        f"least one of the models. By these, {found['mean']:.0f}% of its images are recognised "
        f"(original: {before / len(counted):.0f}%), and {found['worst']:.0f}% by the worst."
    )


def description(model: ModelUnderTest, settings: Settings) -> list[Variant]:
    """Measure with the feature of each description as the class embedding of the concept."""
    texts = settings.descriptions
    if not texts:
        raise SkippedCheck(f"--descriptions gives no text about {model.name} without its name")
    tokens = model.tokenize(texts)
    # Adding a word does not change a text that fills the context.
    full = (tokens == model.tokenize([f"{text} {model.name}" for text in texts])).all(axis=1)
    if model.original is None and full.any():
        progress.warn(
            f"{np.count_nonzero(full)} of {len(texts)} descriptions fill the model's context of "
            f"{tokens.shape[1]} tokens; it does not read what follows"
        )
    features = model.text_features(tokens)
    return [
        Variant(text, model.accuracy_with(feature))
        for text, feature in zip(texts, features, strict=True)
    ]


SPEC = CheckSpec(
    run=description,
    fills="variants",
    settings=("descriptions",),
    rows=partial(mean_and_worst, judge=judge),
    effort="describing it without its name ({})",
    sentence=sentence,
    figures=figures,
)
