"""The methods compared with: the paper's optimizer; FT, GA, GAFT and SalUn; SSD."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli.clip.inputs import pixel_normalizer, spans, to_tokens
from slsgu_cli.method.gradient_pass import GradientPass
from slsgu_cli.records.studies import Method, Plan
from slsgu_cli.store.blocks import DataBlock

BETAS = (0.9, 0.98)
EPSILON = 1e-6
WEIGHT_DECAY = 0.1

# The multiplier of the cosines stays between 1 and 100.
LARGEST_LOGIT_SCALE = math.log(100)
_UNDECAYED = re.compile(r"bn|ln|bias|logit_scale")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay acts on a parameter: matrices, and no norms or biases."""
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
    """Return the learning rate of `step` (from 0) of `steps`: from `rate` towards 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps)) * rate


def clamp_logit_scale(model: nn.Module) -> None:
    """Keep logit_scale between 0 and ln 100."""
    with torch.no_grad():
        model.get_parameter("logit_scale").clamp_(0, LARGEST_LOGIT_SCALE)


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
class LossTerm:
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
    lessons: list[LossTerm],
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


def loss_terms(method: Method, *, forget: LossTerm, retain: LossTerm) -> list[LossTerm]:
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


def _loss(lesson: LossTerm, rows: npt.NDArray[np.intp]) -> Tensor:
    run, pairs = lesson.loss, lesson.pairs
    normalize = pixel_normalizer(run.spec, run.options.device)
    ids = to_tokens(pairs.tokens[rows], "cpu")
    return run.losses(normalize(pairs.images[rows]), ids).sum()


Importance = Callable[[str], tuple[Tensor, Tensor]]
ALPHA = 10.0
FIRST, LAST = 0.1, 5.0


def constants(epochs: int) -> list[float]:
    """Return the dampening constant of each epoch."""
    return [float(value) for value in np.linspace(FIRST, LAST, epochs)]


def dampening(forget: Tensor, retain: Tensor, *, alpha: float, constant: float) -> Tensor:
    """Return what each weight is multiplied by, given its importance to either set."""
    selected = forget > alpha * retain
    ratio = constant * retain / torch.where(selected, forget, torch.ones_like(forget))
    return torch.where(selected, ratio.clamp(max=1), torch.ones_like(forget))


def dampen(model: nn.Module, importance: Importance, *, alpha: float, epochs: int) -> Iterator[int]:
    """Dampen `model` in place once for each constant; yield the epoch that has just ended.

    `importance` returns a parameter's importance to the forget and the retain set. The
    selection is of the original model; the factors pile up from epoch to epoch.
    """
    for epoch, constant in enumerate(constants(epochs), start=1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                forget, retain = importance(name)
                parameter.mul_(dampening(forget, retain, alpha=alpha, constant=constant))
        yield epoch


def importance_of(
    forget: Mapping[str, npt.NDArray[np.floating]],
    retain: Mapping[str, npt.NDArray[np.floating]],
    device: str,
) -> Importance:
    """Return the importances held in two files of squared gradients, a parameter at a time."""

    def importance(name: str) -> tuple[Tensor, Tensor]:
        return (
            torch.from_numpy(forget[name]).to(device),
            torch.from_numpy(retain[name]).to(device),
        )

    return importance
