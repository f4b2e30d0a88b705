"""Checks that train: the model, to bring the concept back; an attack, to tell what it was shown.

The membership attack tells the forget set from pairs that the model was not shown.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.clip.evaluation import EvaluationSet
from slsgu_cli.clip.towers import EMBED
from slsgu_cli.compare.methods import BETAS, EPSILON, LARGEST_LOGIT_SCALE
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.verification import NEW, OWN, Attack, Curve, Point, Settings
from slsgu_cli.store.blocks import DataBlock, JoinedRows
from slsgu_cli.verification.model import ModelUnderTest, Training, Utility, altered

Rows = npt.NDArray[np.integer]
Values = npt.NDArray[np.float64]

# One in four pairs of a mini-batch shows the concept: enough to teach it, not to ruin the rest.
SHARE = 4
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"

# Of the attack: its draws, the share of pairs that test it, and the bounds of its fit.
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


@dataclass(frozen=True, slots=True)
class Batch:
    """A mini-batch of pairs; the first `alike` of them show one thing and match each other."""

    images: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.integer]
    alike: int = 0


def finetune(model: ModelUnderTest, settings: Settings) -> list[Curve]:
    """Train on the retain set, in which the concept does not occur."""
    rows = cycled(model.retain.rows, settings.batch_size, seed=settings.seed)
    batches = (pairs(model.retain, some) for some in rows)

    def measure() -> Accuracy:
        return model.figures(utility=False)[0]

    points, utility = trained(model, batches, settings, what="", measure=measure, utility=True)
    return [Curve(OWN, model.names[model.concept_class], points, utility)]


def relearn(model: ModelUnderTest, settings: Settings) -> list[Curve]:
    """Train on images of the concept under its name; the original also under a new name."""
    name = model.names[model.concept_class]
    targets = {OWN: name}
    if model.is_original:
        targets[NEW] = new_name(name, seed=settings.seed)
    curves: list[Curve] = []

    def taught(label: str) -> list[Curve]:
        return [_taught(model, settings, label, targets[label])]

    for label in targets:
        curves += model.parts.made(1, partial(taught, label))
    return curves


def new_name(name: str, *, seed: int) -> str:
    """Return a made-up word about as long as `name`, of alternating consonants and vowels."""
    generator = np.random.default_rng((seed, len(name)))
    sounds = (CONSONANTS, VOWELS)
    length = min(max(len(name), 4), 12)
    return "".join(str(generator.choice(list(sounds[i % 2]))) for i in range(length))


def _taught(model: ModelUnderTest, settings: Settings, label: str, target: str) -> Curve:
    """Train on the same images with `target` as what they show, and measure by that name."""
    names, features = model.renamed(target), model.evaluation.forget.images.after_edit
    batches = _mixed(model, settings, target)

    def measure() -> Accuracy:
        return model.forget_accuracy(model.classes(names, model.templates), features(EMBED))

    points, utility = trained(model, batches, settings, what=target, measure=measure, utility=False)
    return Curve(label, target, points, utility)


def _mixed(model: ModelUnderTest, settings: Settings, target: str) -> Iterator[Batch]:
    """Yield mini-batches of which a part shows the concept, the rest is of the retain set.

    Only `shots` images of the concept occur. Their captions are the set's templates with
    `target` in them.
    """
    generator = np.random.default_rng(settings.seed)
    chosen = np.sort(generator.permutation(model.forget.rows)[: settings.shots])
    images = model.forget.take(chosen)
    captions = model.tokenize([template.replace("{}", target) for template in model.templates])
    size = max(1, settings.batch_size // SHARE)
    shown = cycled(len(chosen), size, seed=settings.seed)
    others = cycled(model.retain.rows, settings.batch_size - size, seed=settings.seed)
    for taught, rest in zip(shown, others, strict=True):
        words = captions[generator.integers(0, len(captions), size)]
        kept = pairs(model.retain, rest)
        yield Batch(
            np.concatenate([images[taught], kept.images]),
            np.concatenate([words, kept.tokens]),
            alike=size,
        )


def trained(
    model: ModelUnderTest,
    batches: Iterator[Batch],
    settings: Settings,
    *,
    what: str,
    measure: Callable[[], Accuracy],
    utility: bool,
) -> tuple[tuple[Point, ...], Utility | None]:
    """Train the model's model on batches that teach `what`.

    Returned are what `measure` says on the way, and utility at the end.
    """
    with altered(model.module, lambda _, values: values.clone()):
        optimizer = torch.optim.AdamW(
            [p for p in model.module.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=0.0,
        )
        training = Training.of(model, what, optimizer, settings.steps)
        measured_at = schedule(settings.steps)
        for _ in range(training.done):
            next(batches)
        for step in measured_at[len(training.figures) :]:
            while training.done < step:
                _update(model, next(batches), training)
            training.figures.append(measure())
        optimizer.zero_grad()
        kept = model.figures(utility=True)[1] if utility else None
        training.remove()
    points = map(Point, measured_at, training.figures)
    return tuple(points), kept


def _update(model: ModelUnderTest, batch: Batch, training: Training) -> None:
    """Take one step down the loss of one mini-batch."""
    with torch.enable_grad():
        loss = contrastive_of(
            model.image_features(batch.images),
            model.text_features(batch.tokens),
            alike=batch.alike,
            scale=model.scale,
            bias=model.bias,
        )
        training.optimizer.zero_grad()
        torch.autograd.backward(loss)
    training.optimizer.step()
    scale: Any = model.module.logit_scale
    scale.data.clamp_(max=LARGEST_LOGIT_SCALE)
    training.advance()
    model.tick()


def schedule(steps: int) -> list[int]:
    """Return the steps to measure at: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on, and the last."""
    doubled = [2**power for power in range(steps.bit_length())]
    between = [3 * step // 2 for step in doubled if step > 1]
    return sorted({0, *(step for step in (*doubled, *between) if step < steps), steps})


def pairs(block: DataBlock, rows: Rows) -> Batch:
    """Return some rows of a block with their own captions."""
    return Batch(block.take(rows), block.tokens[rows])


def cycled(rows: int, size: int, *, seed: int) -> Iterator[Rows]:
    """Yield `size` row numbers at a time without end, all rows once before any comes again."""
    generator = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < size:
            order = np.concatenate([order, generator.permutation(rows)])
        yield order[:size]
        order = order[size:]


def contrastive_of(
    images: Tensor, texts: Tensor, *, alike: int, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return the model's own contrastive loss of a mini-batch whose first pairs are alike.

    Without pairs that are alike it is the symmetric contrastive loss (Eq. 4), or SigLIP's
    pairwise sigmoid loss where the model has a `bias`. An image with several texts of its
    own has them all as equal targets.
    """
    match = torch.eye(len(images), device=images.device)
    match[:alike, :alike] = 1
    logits = scale * images @ texts.T
    if bias is not None:
        return -F.logsigmoid((2 * match - 1) * (logits + bias)).sum() / len(images)
    target = match / match.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


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
    name, group = _outside(model, settings)
    block, rows = group.images.block, group.images.rows
    drawn = np.random.default_rng(settings.seed).permutation(retain.rows)[: settings.rows]
    retained = np.sort(drawn)
    captions = [block.captions[row] for row in rows]
    if all(captions):
        words, members_words = model.tokenize(captions), forget.tokens
    else:
        # Other pairs without captions get prompts; then the members get theirs too, or
        # the wording alone would tell the two apart.
        words = _prompts(model, [group.names[label] for label in group.images.labels])
        members_words = _prompts(model, [model.names[model.concept_class]] * forget.rows)
    sides = (
        (name, members_words, block, rows, words),
        (RETAINED, forget.tokens, retain, retained, retain.tokens[retained]),
    )
    attacks = []
    for against, members_words, block, rows, words in sides:
        size = min(PAIRS, forget.rows, len(rows))
        if size < FEWEST:
            continue
        members = _figures(model, forget, np.arange(forget.rows), members_words, size)
        others = _figures(model, block, rows, words, size)
        for figure, values in members.items():
            accuracies = attack(values, others[figure], seed=settings.seed)
            attacks.append(
                Attack(
                    figure,
                    against,
                    float(accuracies.mean()),
                    float(accuracies.std()),
                    len(values),
                    len(others[figure]),
                )
            )
    return attacks


def _outside(model: ModelUnderTest, settings: Settings) -> tuple[str, EvaluationSet]:
    """Return what stands for data outside the forget set."""
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
