"""The trained baselines: fine-tuning, gradient ascent, both in turn, and both under a mask.

FT descends the retain loss. GA ascends the forget loss. GAFT does, in every epoch, one
whole forget pass and then one whole retain pass, with one optimizer. SalUn is GAFT whose
gradients count only where the original model's forget gradient is large.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli.baselines.recipe import adamw, clamp_logit_scale, cosine_rate
from slsgu_cli.baselines.records import Method, Plan
from slsgu_cli.batches import pixel_normalizer, spans, to_tokens
from slsgu_cli.gradpass import GradientPass
from slsgu_cli.sets import DataBlock

Mask = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Images and tokens in memory, where they are read in a new order every epoch."""

    images: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.integer]

    @classmethod
    def read(cls, block: DataBlock, rows: int) -> "Pairs":
        """Return the first `rows` pairs of a block."""
        return cls(block.images(0, rows), np.asarray(block.tokens[:rows]))

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """Pairs, the pass that gives their loss, and +1 to descend it or -1 to ascend it."""

    pairs: Pairs
    loss: GradientPass
    sign: int
    shuffled: bool

    def order(self, plan: Plan, epoch: int) -> list[npt.NDArray[np.intp]]:
        """Return the rows of each mini-batch of an epoch.

        Shuffled rows go round to fill the last mini-batch; others keep a smaller one. No
        mini-batch has a row twice.
        """
        rows = len(self.pairs)
        size = min(plan.batch_size, rows)
        order = np.arange(rows)
        if self.shuffled:
            drawn = np.random.default_rng([plan.seed, epoch]).permutation(rows)
            order = np.resize(drawn, -(-rows // size) * size)
        return [order[start:stop] for start, stop in spans(len(order), size)]


def train(
    model: nn.Module,
    lessons: list[Lesson],
    *,
    rate: float,
    plan: Plan,
    mask: Mask | None = None,
) -> Iterator[int]:
    """Train `model` in place, every lesson in turn; yield the epoch that has just ended."""
    optimizer = adamw(model, rate)
    epochs = range(1, plan.epochs + 1)
    steps = plan.epochs * sum(len(lesson.order(plan, 1)) for lesson in lessons)
    step = 0
    for epoch in epochs:
        for lesson in lessons:
            for rows in lesson.order(plan, epoch):
                for group in optimizer.param_groups:
                    group["lr"] = cosine_rate(rate, step, steps)
                optimizer.zero_grad()
                (lesson.sign * _loss(lesson, rows)).backward()  # type: ignore[no-untyped-call]
                if mask is not None:
                    mask_gradients(model, mask)
                optimizer.step()
                clamp_logit_scale(model)
                step += 1
        yield epoch


def lessons_of(method: Method, *, forget: Lesson, retain: Lesson) -> list[Lesson]:
    """Return what a method goes through in each epoch, in order."""
    match method:
        case Method.FT:
            return [retain]
        case Method.GA:
            return [forget]
        case Method.GAFT | Method.SALUN:
            return [forget, retain]
    raise ValueError(f"{method} is not trained")


def mask_gradients(model: nn.Module, mask: Mask) -> None:
    """Zero the gradient wherever `mask` is false; weight decay still acts there."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(mask[name])


def saliency_mask(gradient: Mapping[str, npt.NDArray[np.floating]]) -> dict[str, Tensor]:
    """Return where |gradient| is in its top half over all parameters (SalUn).

    Exactly half of all entries, rounded down, are kept. Of entries that tie at the
    threshold, the first in the order of names are.
    """
    names = sorted(gradient)
    sizes = np.concatenate([np.abs(gradient[name]).ravel() for name in names])
    kept = sizes.size // 2
    threshold = np.partition(sizes, sizes.size - kept)[sizes.size - kept] if kept else np.inf
    chosen = sizes > threshold
    ties = np.flatnonzero(sizes == threshold)
    chosen[ties[: kept - int(chosen.sum())]] = True
    mask, start = {}, 0
    for name in names:
        stop = start + gradient[name].size
        mask[name] = torch.from_numpy(chosen[start:stop].reshape(gradient[name].shape))
        start = stop
    return mask


def _loss(lesson: Lesson, rows: npt.NDArray[np.intp]) -> Tensor:
    run, pairs = lesson.loss, lesson.pairs
    normalize = pixel_normalizer(run.spec, run.options.device)
    ids = to_tokens(pairs.tokens[rows], "cpu")
    return run.losses(normalize(pairs.images[rows]), ids).sum()
