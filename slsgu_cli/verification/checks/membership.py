"""`membership`: a membership inference attack on the forget set."""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from slsgu_cli.clip.evaluation import EvaluationSet
from slsgu_cli.records.verification import MembershipScore, Settings
from slsgu_cli.store.blocks import DataBlock, JoinedRows
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.verdicts import CHANCE

Rows = npt.NDArray[np.integer]
Values = npt.NDArray[np.float64]

SEEDS, SPLITS = 10, 10
TEST_FRACTION = 0.1
# Figures are clipped to this magnitude.
CLIP = 100.0
# Pairs in a mini-batch of losses, and the fewest pairs of a side.
PAIRS, FEWEST = 32, 2
HELD_OUT, OTHERS, RETAINED = "held out", "other classes", "retain set"


class Exposure(StrEnum):
    """The conclusion of a membership attack on an edited model."""

    HIDDEN = "not separable"
    LESS = "less separable"
    SAME = "as separable as before"
    MORE = "more separable"


def exposure(before: MembershipScore, after: MembershipScore) -> Exposure:
    """Return the conclusion from the scores on the original and on the other model.

    Accuracy below chance says nothing: training and test rows differ.
    """
    if after.mean - 50 <= max(CHANCE, after.deviation):
        return Exposure.HIDDEN
    was = max(50.0, before.mean)
    if abs(after.mean - was) <= CHANCE:
        return Exposure.SAME
    return Exposure.MORE if after.mean > was else Exposure.LESS


def membership(model: ModelUnderTest, settings: Settings) -> list[MembershipScore]:
    """Separate the forget set from held-out pairs and from the retain set by each figure.

    Held-out pairs are the concept's images in the evaluation set, or images of other classes
    where no set has the concept. A side of one pair is not attacked.
    """
    forget, retain = model.forget, model.retain
    name, group = _held_out(model, settings)
    block, rows = group.images.block, group.images.rows
    drawn = np.random.default_rng(settings.seed).permutation(retain.rows)[: settings.rows]
    retained = np.sort(drawn)
    captions = [block.captions[row] for row in rows]
    if all(captions):
        words, member_words = model.tokenize(captions), forget.tokens
    else:
        # If the held-out pairs lack captions, both sides get prompts: otherwise the wording
        # alone would separate them.
        words = _prompts(model, [group.names[label] for label in group.images.labels])
        member_words = _prompts(model, [model.name] * forget.rows)
    sides = (
        (name, member_words, block, rows, words),
        (RETAINED, forget.tokens, retain, retained, retain.tokens[retained]),
    )
    scores = []
    for against, member_words, block, rows, words in sides:
        size = min(PAIRS, forget.rows, len(rows))
        if size < FEWEST:
            continue
        members = _figures(model, forget, np.arange(forget.rows), member_words, size)
        others = _figures(model, block, rows, words, size)
        for figure, values in members.items():
            accuracies = attack(values, others[figure], seed=settings.seed)
            mean, deviation = float(accuracies.mean()), float(accuracies.std())
            sizes = len(values), len(others[figure])
            scores.append(MembershipScore(figure, against, mean, deviation, *sizes))
    return scores


SPEC = CheckSpec(
    run=membership,
    fills="membership",
    settings=("rows", "seed"),
    revision=2,
    needs_sklearn=True,
)


def attack(members: Values, others: Values, *, seed: int = 0) -> Values:
    """Return the accuracy of a logistic regression in percent, one for each of ten seeds.

    Each is the mean over ten stratified splits. Both sides are subsampled to equal size, so
    50 is chance.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    size = min(len(members), len(others))
    truth = np.repeat([0, 1], size)
    accuracies = []
    for number in range(seed, seed + SEEDS):
        generator = np.random.default_rng(number)
        drawn = [generator.permutation(side)[:size] for side in (others, members)]
        values = np.clip(np.concatenate(drawn), -CLIP, CLIP)[:, None]
        test_size = max(2, int(np.ceil(TEST_FRACTION * 2 * size)))
        splits = StratifiedShuffleSplit(SPLITS, test_size=test_size, random_state=number)
        scores = cross_val_score(LogisticRegression(), values, truth, cv=splits)
        accuracies.append(100 * float(scores.mean()))
    return np.array(accuracies)


def _held_out(model: ModelUnderTest, settings: Settings) -> tuple[str, EvaluationSet]:
    """Return the data outside the forget set, and its name."""
    if model.manifest.forget_eval is not None:
        return HELD_OUT, model.evaluation.forget
    first = next(iter(model.evaluation.utility.values()))
    return OTHERS, first.some(np.arange(len(first.images))[: settings.rows])


def _prompts(model: ModelUnderTest, names: Sequence[str]) -> npt.NDArray[np.int32]:
    return model.tokenize([model.templates[0].replace("{}", name) for name in names])


def _figures(
    model: ModelUnderTest,
    block: DataBlock | JoinedRows,
    rows: Rows,
    tokens: npt.NDArray[np.integer],
    size: int,
) -> dict[str, Values]:
    """Return the cosine and the contrastive loss of each pair, in mini-batches of `size`.

    The loss depends on the size of a mini-batch, so the first rows fill up the last one.
    """
    v = model.image_features(block.take(rows))
    t = model.text_features(tokens)
    logits = model.scale * v @ t.T
    losses = torch.empty(len(v), device=v.device)
    for start in range(0, len(v), size):
        batch = torch.arange(start, start + size, device=v.device) % len(v)
        square = logits[batch][:, batch]
        truth = torch.arange(size, device=v.device)
        each = F.cross_entropy(square, truth, reduction="none")
        each = each + F.cross_entropy(square.T, truth, reduction="none")
        here = min(size, len(v) - start)
        losses[start : start + here] = each[:here] / 2
    cosines = (v * t).sum(dim=1)
    return {"cosine": cosines.double().cpu().numpy(), "loss": losses.double().cpu().numpy()}
