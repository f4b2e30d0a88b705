"""Training of the model under test on batches of pairs, measured on the way."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.compare.training import BETAS, EPSILON, LARGEST_LOGIT_SCALE
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.verification import Point, Settings
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.verification.model import ModelUnderTest, Utility, altered
from slsgu_cli.verification.resumable import Training

Rows = npt.NDArray[np.integer]
# The settings that change the result of training.
SETTINGS = ("steps", "learning_rate", "batch_size", "rows", "seed")


@dataclass(frozen=True, slots=True)
class Batch:
    """A mini-batch of pairs; the first `alike` show the same thing and match each other."""

    images: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.integer]
    alike: int = 0


def trained(
    model: ModelUnderTest,
    batches: Iterator[Batch],
    settings: Settings,
    *,
    name: str,
    measure: Callable[[], Accuracy],
    utility: bool,
) -> tuple[tuple[Point, ...], Utility | None]:
    """Train the model on batches; return accuracies by `measure` on the way and utility after.

    `name` is that of the state saved for resuming. The weights are restored in the end.
    """
    with altered(model.module, lambda _, values: values.clone()):
        optimizer = torch.optim.AdamW(
            [p for p in model.module.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=0.0,
        )
        training = model.training(optimizer, settings.steps, name)
        measured_at = schedule(settings.steps)
        for _ in range(training.done):
            next(batches)
        for step in measured_at[len(training.figures) :]:
            while training.done < step:
                _update(model, next(batches), training)
            training.figures.append(measure())
        optimizer.zero_grad()
        after = model.measure(utility=True)[1] if utility else None
        training.remove()
    points = map(Point, measured_at, training.figures)
    return tuple(points), after


def _update(model: ModelUnderTest, batch: Batch, training: Training) -> None:
    """Take one step on the loss of one mini-batch."""
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
    """Return the steps to measure at: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., and the last."""
    doubled = [2**power for power in range(steps.bit_length())]
    between = [3 * step // 2 for step in doubled if step > 1]
    return sorted({0, *(step for step in (*doubled, *between) if step < steps), steps})


def pairs(block: DataBlock, rows: Rows) -> Batch:
    """Return some rows of a block with their own captions."""
    return Batch(block.take(rows), block.tokens[rows])


def cycled(rows: int, size: int, *, seed: int) -> Iterator[Rows]:
    """Yield `size` row numbers at a time, endlessly; each row occurs once per epoch."""
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

    It is the symmetric contrastive loss (Eq. 4), or SigLIP's pairwise sigmoid loss if the
    model has a `bias`. Pairs that are alike have all their texts as equal targets.
    """
    match = torch.eye(len(images), device=images.device)
    match[:alike, :alike] = 1
    logits = scale * images @ texts.T
    if bias is not None:
        return -F.logsigmoid((2 * match - 1) * (logits + bias)).sum() / len(images)
    target = match / match.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
