"""Checks that train: what brings the concept back, and how soon."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.clip.towers import EMBED
from slsgu_cli.compare.methods import BETAS, EPSILON, LARGEST_LOGIT_SCALE
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.verification import NEW, OWN, Curve, Point, Settings
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.verification.model import ModelUnderTest, Utility, altered

Rows = npt.NDArray[np.integer]

# One in four pairs of a mini-batch shows the concept: enough to teach it, not to ruin the rest.
SHARE = 4
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


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
    points, utility = trained(
        model,
        batches,
        settings,
        measure=lambda: model.figures(utility=False)[0],
        utility=True,
    )
    return [Curve(OWN, model.names[model.concept_class], points, utility)]


def relearn(model: ModelUnderTest, settings: Settings) -> list[Curve]:
    """Train on images of the concept under its name; the original also under a new name."""
    name = model.names[model.concept_class]
    curves = [_taught(model, settings, OWN, name)]
    if model.is_original:
        curves.append(_taught(model, settings, NEW, new_name(name, seed=settings.seed)))
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

    def measure() -> Accuracy:
        return model.forget_accuracy(model.classes(names, model.templates), features(EMBED))

    points, utility = trained(
        model,
        _mixed(model, settings, target),
        settings,
        measure=measure,
        utility=False,
    )
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
    measure: Callable[[], Accuracy],
    utility: bool,
) -> tuple[tuple[Point, ...], Utility | None]:
    """Train the model's model; return what `measure` says on the way, and utility at the end."""
    with altered(model.module, lambda _, values: values.clone()):
        optimizer = torch.optim.AdamW(
            [p for p in model.module.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=0.0,
        )
        points, done = [], 0
        for step in schedule(settings.steps):
            while done < step:
                _update(model, next(batches), optimizer)
                done += 1
            points.append(Point(step, measure()))
        optimizer.zero_grad()
        kept = model.figures(utility=True)[1] if utility else None
    return tuple(points), kept


def _update(model: ModelUnderTest, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    """Take one step down the loss of one mini-batch."""
    with torch.enable_grad():
        loss = contrastive_of(
            model.image_features(batch.images),
            model.text_features(batch.tokens),
            alike=batch.alike,
            scale=model.scale,
            bias=model.bias,
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
    optimizer.step()
    scale: Any = model.module.logit_scale
    scale.data.clamp_(max=LARGEST_LOGIT_SCALE)
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
