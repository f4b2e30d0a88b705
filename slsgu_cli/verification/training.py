"""Fine-tuning as an attacker or a later user would do it, with forget accuracy on the way.

AdamW over all parameters with a constant learning rate, on mini-batches drawn by seed. The
model has its own weights again afterwards.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.baselines.recipe import BETAS, EPSILON, LARGEST_LOGIT_SCALE
from slsgu_cli.records import Accuracy
from slsgu_cli.sets import DataBlock
from slsgu_cli.verification.bench import Bench, Utility, altered
from slsgu_cli.verification.records import Point, Settings

Rows = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Batch:
    """A mini-batch of pairs; the first `alike` of them show one thing and match each other."""

    images: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.integer]
    alike: int = 0


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


def cycled(rows: int, size: int, *, seed: int) -> Iterator[Rows]:
    """Yield `size` row numbers at a time without end, all rows once before any comes again."""
    generator = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < size:
            order = np.concatenate([order, generator.permutation(rows)])
        yield order[:size]
        order = order[size:]


def pairs(block: DataBlock, rows: Rows) -> Batch:
    """Return some rows of a block with their own captions."""
    return Batch(block.take(rows), block.tokens[rows])


def schedule(steps: int) -> list[int]:
    """Return the steps to measure at: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on, and the last."""
    doubled = [2**power for power in range(steps.bit_length())]
    between = [3 * step // 2 for step in doubled if step > 1]
    return sorted({0, *(step for step in (*doubled, *between) if step < steps), steps})


def trained(
    bench: Bench,
    batches: Iterator[Batch],
    settings: Settings,
    *,
    measure: Callable[[], Accuracy],
    utility: bool,
) -> tuple[tuple[Point, ...], Utility | None]:
    """Train the bench's model; return what `measure` says on the way, and utility at the end."""
    with altered(bench.model, lambda _, values: values.clone()):
        optimizer = torch.optim.AdamW(
            [p for p in bench.model.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=0.0,
        )
        points, done = [], 0
        for step in schedule(settings.steps):
            while done < step:
                _update(bench, next(batches), optimizer)
                done += 1
            points.append(Point(step, measure()))
        optimizer.zero_grad()
        kept = bench.figures(utility=True)[1] if utility else None
    return tuple(points), kept


def _update(bench: Bench, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    """Take one step down the loss of one mini-batch."""
    model: Any = bench.model
    with torch.enable_grad():
        loss = contrastive_of(
            bench.image_features(batch.images),
            bench.text_features(batch.tokens),
            alike=batch.alike,
            scale=bench.scale,
            bias=bench.bias,
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
    optimizer.step()
    model.logit_scale.data.clamp_(max=LARGEST_LOGIT_SCALE)
    bench.tick()
