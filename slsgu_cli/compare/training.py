"""Training as in the papers: AdamW, a cosine schedule, and losses over rows in memory."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli.clip.batches import spans, to_tokens
from slsgu_cli.engine.gradient_pass import GradientPass
from slsgu_cli.records.comparison import ClipPlan

BETAS = (0.9, 0.98)
EPSILON = 1e-6
WEIGHT_DECAY = 0.1

# The scale of the cosines stays between 1 and 100.
LARGEST_LOGIT_SCALE = math.log(100)
_UNDECAYED = re.compile(r"bn|ln|bias|logit_scale")

Mask = Mapping[str, Tensor]


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies to a parameter: to matrices, not to norms and biases."""
    return parameter.ndim >= 2 and not _UNDECAYED.search(name)


def adamw(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """Return the optimizer of every parameter of `model`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if is_decayed(name, p) is decayed], "weight_decay": by}
        for decayed, by in ((False, 0.0), (True, WEIGHT_DECAY))
    ]
    fused = all(p.device.type in ("cpu", "cuda") for _, p in named)
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, eps=EPSILON, fused=fused)


def cosine_rate(rate: float, step: int, steps: int) -> float:
    """Return the learning rate at `step` (from 0) of `steps`, decaying from `rate` to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps)) * rate


def clamp_logit_scale(model: nn.Module) -> None:
    """Keep logit_scale between 0 and ln 100."""
    with torch.no_grad():
        model.get_parameter("logit_scale").clamp_(0, LARGEST_LOGIT_SCALE)


@dataclass(frozen=True, slots=True, eq=False)
class LossTerm:
    """Pairs in memory, the pass that computes their loss, and its sign (-1 to ascend).

    `shuffled` pairs come in a new order every epoch.
    """

    images: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.integer]
    loss: GradientPass
    sign: int
    shuffled: bool

    def order(self, plan: ClipPlan, epoch: int) -> list[npt.NDArray[np.intp]]:
        """Return the rows of each mini-batch of an epoch.

        The last mini-batch of shuffled rows is filled up from their beginning, that of
        others may be smaller. No mini-batch has a row twice.
        """
        rows = len(self.images)
        size = min(plan.batch_size, rows)
        order = np.arange(rows)
        if self.shuffled:
            drawn = np.random.default_rng([plan.seed, epoch]).permutation(rows)
            order = np.resize(drawn, -(-rows // size) * size)
        return [order[start:stop] for start, stop in spans(len(order), size)]

    def of(self, rows: npt.NDArray[np.intp]) -> Tensor:
        """Return the sum of the losses of some rows, with the sign."""
        ids = to_tokens(self.tokens[rows], "cpu")
        return self.sign * self.loss.losses(self.loss.normalize(self.images[rows]), ids).sum()


def train(
    model: nn.Module, terms: list[LossTerm], *, rate: float, plan: ClipPlan, mask: Mask | None
) -> Iterator[int]:
    """Train `model` in place on one term after the other; yield the number of each epoch."""
    optimizer = adamw(model, rate)
    steps = plan.epochs * sum(len(term.order(plan, 1)) for term in terms)
    step = 0
    for epoch in range(1, plan.epochs + 1):
        for term in terms:
            for rows in term.order(plan, epoch):
                for group in optimizer.param_groups:
                    group["lr"] = cosine_rate(rate, step, steps)
                optimizer.zero_grad()
                term.of(rows).backward()  # type: ignore[no-untyped-call]
                if mask is not None:
                    mask_gradients(model, mask)
                optimizer.step()
                clamp_logit_scale(model)
                step += 1
        yield epoch


def mask_gradients(model: nn.Module, mask: Mask) -> None:
    """Zero the gradient where `mask` is false; weight decay still applies there."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(mask[name])
