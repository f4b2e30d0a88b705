"""The membership attack: whether the model tells the forget set from pairs it was not shown."""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from slsgu_cli.records.verification import Attack, Settings
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.verification.model import ModelUnderTest

Values = npt.NDArray[np.float64]
Rows = npt.NDArray[np.integer]
SEEDS, SPLITS = 10, 10
TEST_SHARE = 0.1
CLIP = 100.0
TOLERANCE = 1e-10
ITERATIONS = 100
PAIRS = 32
FEWEST = 2
HELD_OUT, OTHERS, RETAINED = "held out", "other classes", "retain set"

# Points above chance up to which members are not told apart, and by which attacks differ.
CHANCE = 5.0


class Exposure(StrEnum):
    """What an attack on membership says."""

    HIDDEN = "not told apart"
    LESS = "told apart less"
    SAME = "told apart as before"
    MORE = "told apart more"


def membership(model: ModelUnderTest, settings: Settings) -> list[Attack]:
    """Attack the forget set by either figure, against held-out pairs and against the retain set.

    Held-out pairs are the concept's images in the evaluation set. Where no set has the
    concept, they are images of other classes. A side of one pair cannot be attacked.
    """
    forget, retain = model.forget, model.retain
    against, block, rows = _outside(model, settings)
    drawn = np.random.default_rng(settings.seed).permutation(retain.rows)[: settings.rows]
    captioned = all(block.captions[row] for row in rows)
    sides = {
        against: (block, rows, _words(model, block, rows, captioned)),
        RETAINED: (retain, np.sort(drawn), retain.tokens[np.sort(drawn)]),
    }
    member_rows = np.arange(forget.rows)
    attacks = []
    for name, side in sides.items():
        # Other pairs without captions get prompts; then the members get theirs too, or
        # the wording alone would tell the two apart.
        prompted = name == against and not captioned
        words = forget.tokens
        if prompted:
            words = _prompts(model, [model.names[model.concept_class]] * forget.rows)
        size = min(PAIRS, len(member_rows), len(side[1]))
        if size < FEWEST:
            continue
        members = _figures(model, forget, member_rows, words, size)
        others = _figures(model, *side, size)
        for figure, values in members.items():
            accuracies = attack(values, others[figure], seed=settings.seed)
            attacks.append(
                Attack(
                    figure,
                    name,
                    float(accuracies.mean()),
                    float(accuracies.std()),
                    len(values),
                    len(others[figure]),
                )
            )
    return attacks


def _outside(model: ModelUnderTest, settings: Settings) -> tuple[str, DataBlock, Rows]:
    """Return what stands for data outside the forget set, and its rows."""
    group = model.evaluation.forget
    if model.manifest.forget_eval is not None:
        return HELD_OUT, group.images.block, group.images.rows
    first = next(iter(model.evaluation.utility.values())).images
    return OTHERS, first.block, first.rows[: settings.rows]


def _words(
    model: ModelUnderTest, block: DataBlock, rows: Rows, captioned: bool
) -> npt.NDArray[np.int32]:
    """Return the captions of some evaluation rows, or prompts with their classes."""
    if captioned:
        return model.tokenize([block.captions[row] for row in rows])
    return _prompts(model, [block.class_names[block.labels[row]] for row in rows])


def _prompts(model: ModelUnderTest, names: Sequence[str]) -> npt.NDArray[np.int32]:
    return model.tokenize([model.templates[0].replace("{}", name) for name in names])


def _figures(
    model: ModelUnderTest, block: DataBlock, rows: Rows, tokens: npt.NDArray[np.integer], size: int
) -> dict[str, Values]:
    """Return the cosine and the contrastive loss of each pair, in mini-batches of `size`.

    The last mini-batch is filled up from the first rows: the loss depends on its size.
    """
    v = model.image_features(block.take(rows))
    t = model.text_features(tokens)
    model.tick()
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


def attack(members: Values, others: Values, *, seed: int = 0) -> Values:
    """Return the accuracy in percent for each of ten seeds, the mean over ten splits each.

    From both sides as many values are drawn as the smaller one has, so 50 is chance.
    """
    size = min(len(members), len(others))
    accuracies = []
    for number in range(seed, seed + SEEDS):
        generator = np.random.default_rng(number)
        drawn = [generator.permutation(side)[:size] for side in (others, members)]
        values = np.clip(np.concatenate(drawn), -CLIP, CLIP)
        truth = np.repeat([0.0, 1.0], size)
        scores = [_score(values, truth, test) for test in _splits(size, generator)]
        accuracies.append(100 * float(np.mean(scores)))
    return np.array(accuracies)


def fit(values: Values, truth: Values) -> tuple[float, float]:
    """Return slope and intercept of the logistic regression of `truth` (0 or 1) on `values`.

    Minimises slope^2 / 2 plus the sum of the log losses, as scikit-learn does by default,
    by Newton's method with step halving: the problem is convex and has two unknowns.
    """
    w = np.zeros(2)
    design = np.stack([values, np.ones_like(values)], axis=1)
    penalty = np.diag([1.0, 0.0])
    loss = _loss(w, design, truth)
    for _ in range(ITERATIONS):
        chance = _probability(design @ w)
        slope = design.T @ (chance - truth) + penalty @ w
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + penalty
        step = np.linalg.lstsq(curvature, slope, rcond=None)[0]
        while (moved := _loss(w - step, design, truth)) > loss and np.abs(step).max() > TOLERANCE:
            step = step / 2
        w, loss = w - step, moved
        if np.abs(step).max() <= TOLERANCE * max(1.0, float(np.abs(w).max())):
            break
    return float(w[0]), float(w[1])


def _loss(w: Values, design: Values, truth: Values) -> float:
    z = design @ w
    return float(0.5 * w[0] ** 2 + np.sum(np.logaddexp(0, z) - truth * z))


def _probability(z: Values) -> Values:
    return np.exp(-np.logaddexp(0, -z))


def _score(values: Values, truth: Values, test: npt.NDArray[np.bool_]) -> float:
    slope, intercept = fit(values[~test], truth[~test])
    return float(np.mean((slope * values[test] + intercept > 0) == truth[test]))


def _splits(size: int, generator: np.random.Generator) -> list[npt.NDArray[np.bool_]]:
    """Return which of two times `size` values are tested on, a tenth of each side.

    Where the tenth is an odd number, one side, drawn anew each time, has one value more.
    """
    total = int(np.ceil(TEST_SHARE * 2 * size))
    masks = []
    for _ in range(SPLITS):
        more = int(generator.integers(2))
        counts = [total // 2 + (total % 2 and more == side) for side in range(2)]
        mask = np.zeros(2 * size, dtype=bool)
        for side, count in enumerate(counts):
            mask[side * size + generator.permutation(size)[:count]] = True
        masks.append(mask)
    return masks
