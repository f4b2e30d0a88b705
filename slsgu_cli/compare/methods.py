"""The methods compared with on CLIP (FT, GA, GAFT, SalUn, SSD), and one run of any of them."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.clip.activations import CacheBudget
from slsgu_cli.clip.batches import pixel_normalizer, spans, to_tokens
from slsgu_cli.clip.evaluation import Evaluation, prepare
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.compare.ours import ROLES, PassTimes
from slsgu_cli.engine.gradient_pass import GradientPass, arithmetic
from slsgu_cli.engine.gradients import load_graded
from slsgu_cli.errors import NotFiniteError, SlsguError, once
from slsgu_cli.records.figures import Accuracy, Figures
from slsgu_cli.records.method import GradientHeader, GradientPointer, Precision
from slsgu_cli.records.options import PassOptions
from slsgu_cli.records.sets import Split
from slsgu_cli.records.studies import ClipOutcome, ClipPlan, Method
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock

BETAS = (0.9, 0.98)
EPSILON = 1e-6
WEIGHT_DECAY = 0.1

# The multiplier of the cosines stays between 1 and 100.
LARGEST_LOGIT_SCALE = math.log(100)
_UNDECAYED = re.compile(r"bn|ln|bias|logit_scale")

# The dampening constants of the first epoch and of the last.
FIRST, LAST = 0.1, 5.0


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


Weights = dict[str, Tensor]
Mask = Mapping[str, Tensor]
Gradient = Mapping[str, npt.NDArray[np.floating]]


@dataclass(frozen=True, slots=True, eq=False)
class LossTerm:
    """Pairs in memory, the pass that gives their loss, and +1 to descend it or -1 to ascend it.

    They are read in a new order every epoch if they are `shuffled`.
    """

    images: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.integer]
    loss: GradientPass
    sign: int
    shuffled: bool

    def order(self, plan: ClipPlan, epoch: int) -> list[npt.NDArray[np.intp]]:
        """Return the rows of each mini-batch of an epoch.

        Shuffled rows go round to fill the last mini-batch; others keep a smaller one. No
        mini-batch has a row twice.
        """
        rows = len(self.images)
        size = min(plan.batch_size, rows)
        order = np.arange(rows)
        if self.shuffled:
            drawn = np.random.default_rng([plan.seed, epoch]).permutation(rows)
            order = np.resize(drawn, -(-rows // size) * size)
        return [order[start:stop] for start, stop in spans(len(order), size)]

    def of(self, rows: npt.NDArray[np.intp]) -> Tensor:
        """Return what is descended for some rows: the sum of their losses, with the sign."""
        normalize = pixel_normalizer(self.loss.spec, self.loss.options.device)
        ids = to_tokens(self.tokens[rows], "cpu")
        return self.sign * self.loss.losses(normalize(self.images[rows]), ids).sum()


def train(
    model: nn.Module, terms: list[LossTerm], *, rate: float, plan: ClipPlan, mask: Mask | None
) -> Iterator[int]:
    """Train `model` in place, every term in turn; yield the epoch that has just ended."""
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


# Whose gradients a method needs first, and whose losses an epoch goes through, in order.
PASSES: dict[Method, tuple[tuple[str, ...], tuple[str, ...]]] = {
    Method.FT: ((), ("retain",)),
    Method.GA: ((), ("forget",)),
    Method.GAFT: ((), ROLES),
    Method.SALUN: (("forget",), ROLES),
    Method.SSD: (ROLES, ()),
}


def mask_gradients(model: nn.Module, mask: Mask) -> None:
    """Zero the gradient wherever `mask` is false; weight decay still acts there."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(mask[name])


def saliency_mask(gradient: Gradient) -> dict[str, Tensor]:
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
    parts = np.split(chosen, np.cumsum([gradient[name].size for name in names])[:-1])
    return {
        name: torch.from_numpy(part.reshape(gradient[name].shape))
        for name, part in zip(names, parts, strict=True)
    }


def constants(epochs: int) -> list[float]:
    """Return the dampening constant of each epoch."""
    return [float(value) for value in np.linspace(FIRST, LAST, epochs)]


def dampening(forget: Tensor, retain: Tensor, *, alpha: float, constant: float) -> Tensor:
    """Return what each weight is multiplied by, given its importance to either set."""
    selected = forget > alpha * retain
    ratio = constant * retain / torch.where(selected, forget, torch.ones_like(forget))
    return torch.where(selected, ratio.clamp(max=1), torch.ones_like(forget))


@torch.no_grad()
def dampen(
    model: nn.Module, forget: Gradient, retain: Gradient, *, alpha: float, epochs: int
) -> Iterator[int]:
    """Dampen `model` in place once for each constant; yield the epoch that has just ended.

    Squared gradients are a parameter's importance to the forget and the retain set. The
    selection is of the original model; the factors pile up from epoch to epoch.
    """
    for epoch, constant in enumerate(constants(epochs), start=1):
        for name, parameter in model.named_parameters():
            squares = (torch.from_numpy(of[name]).to(parameter.device) for of in (forget, retain))
            parameter.mul_(dampening(*squares, alpha=alpha, constant=constant))
        yield epoch


@dataclass(frozen=True, slots=True)
class Reported:
    """The epoch reported and its figures on the rows it was chosen by; how many epochs ran.

    The seconds are those of all epochs alone, without measuring.
    """

    epoch: int
    epochs: int
    figures: Figures
    seconds: float


def follow(epochs: Iterator[int], evaluation: Evaluation, *, label: str, total: int) -> Reported:
    """Run epochs until one forgets or none is left; leave the model as it is reported."""
    seconds, epoch, best, least = 0.0, 0, 0, math.inf
    weights: Weights = {}
    with progress.bar(label, total) as ticker:
        start = perf_counter()
        for epoch in epochs:
            settle(evaluation.model)
            seconds += perf_counter() - start
            ticker.advance()
            try:
                forget = forget_accuracy(evaluation).top1
            except NotFiniteError:
                if not best:
                    raise
                progress.warn(f"{label}: epoch {epoch} is left out, its weights are not finite")
                break
            if forget < least:
                best, least, weights = epoch, forget, weights_of(evaluation.model)
            if forget == 0:
                break
            start = perf_counter()
    if not best:
        raise ValueError("a run has at least one epoch")
    set_weights(evaluation.model, weights)
    return Reported(best, epoch, figures_of(evaluation), seconds)


def forget_accuracy(evaluation: Evaluation) -> Accuracy:
    """Return how often the concept is recognised by the model as it is now."""
    with torch.no_grad():
        evaluation.forget.prompts.base_pass((), CacheBudget(0))
        for _ in evaluation.forget.images.base_pass({}, CacheBudget(0)):
            pass
        return evaluation.forget.base_accuracy()


def figures_of(evaluation: Evaluation) -> Figures:
    """Return what the model as it is now recognises, of the concept and of everything else."""
    with progress.silent():
        evaluation.base_pass((), cache_bytes=0)
    kept = {name: group.base_accuracy() for name, group in evaluation.utility.items()}
    return Figures(evaluation.forget.base_accuracy(), kept)


def weights_of(model: nn.Module) -> Weights:
    """Return a copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def set_weights(model: nn.Module, weights: Weights) -> None:
    """Put back what `weights_of` returned."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def settle(model: nn.Module) -> None:
    """Wait for a GPU: its clock runs on after a call has returned."""
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def evaluations(
    times: PassTimes, pointer: GradientPointer, model: nn.Module
) -> tuple[Evaluation, Evaluation]:
    """Open what a set is chosen by and what it is reported on; one and the same where it is."""
    tokenize = tokenizer(resolve(pointer.model))
    opened = partial(
        prepare, times.store, times.manifest, model, tokenize=tokenize, device=times.device
    )
    choosing = opened(split=Split.VALIDATION)
    return choosing, opened(split=Split.TEST) if times.manifest.is_split else choosing


@dataclass
class BaselineRunner:
    """The original model, loaded once with its data; every run of a baseline starts from it.

    Epochs and settings are chosen by the rows of `choosing`, figures are of `reporting`: the
    same, where the set has no rows that nothing is chosen by.
    """

    pointer: GradientPointer
    plan: ClipPlan
    times: PassTimes
    model: nn.Module
    choosing: Evaluation
    reporting: Evaluation
    _original: Weights
    _terms: dict[str, LossTerm | SlsguError] = field(init=False, default_factory=dict)

    @classmethod
    def open(cls, pointer: GradientPointer, plan: ClipPlan, times: PassTimes) -> "BaselineRunner":
        """Load the model that the set's gradients are of. Raises StaleError and InputError."""
        _, model = load_graded(times.manifest, pointer, times.device)
        evaluated = evaluations(times, pointer, model)
        return cls(pointer, plan, times, model, *evaluated, weights_of(model))

    def restore(self) -> None:
        """Make the model the original again."""
        set_weights(self.model, self._original)

    def original(self) -> Figures:
        """Measure the original model."""
        self.restore()
        return figures_of(self.reporting)

    def run(self, method: Method, setting: float) -> ClipOutcome:
        """Run a baseline on the original model and measure the epoch that is reported."""
        self.restore()
        seconds = self._seconds_before(method)
        number, hint = ("alpha", None) if method is Method.SSD else ("lr", "a smaller --lr")
        label = f"{method} {number} {setting:g}"
        with arithmetic(Precision.FP32), counted_by(label, hint=hint):
            epochs = self._epochs(method, setting)
            reported = follow(epochs, self.choosing, label=label, total=self.plan.epochs)
            same = self.reporting is self.choosing
            figures = reported.figures if same else figures_of(self.reporting)
        forget_passes, retain_passes = self._passes(method, reported.epochs)
        after = f"after epoch {reported.epoch} of {reported.epochs}"
        progress.detail(f"{label}: FA@1 {figures.forget.top1:.1f} {after}")
        return ClipOutcome(
            method=method,
            setting=setting,
            plan=self.plan.of(method),
            epoch=reported.epoch,
            forget=figures.forget,
            utility=figures.utility,
            seconds=seconds + reported.seconds,
            forget_passes=forget_passes,
            retain_passes=retain_passes,
            where=self.times.where,
            chosen_by=reported.figures,
        )

    def _passes(self, method: Method, epochs: int) -> tuple[float, float]:
        """Return the passes over all forget and all retain rows that a run amounts to."""
        share = self.plan.retain_rows / self.times.manifest.retain.rows
        needed, losses = PASSES[method]
        return (
            float(("forget" in needed) + epochs * ("forget" in losses)),
            float(("retain" in needed) + epochs * share * ("retain" in losses)),
        )

    def _seconds_before(self, method: Method) -> float:
        """Return what the gradients take that a method needs before its first epoch."""
        squares = method is Method.SSD
        if squares and not all(map(self.times.store.exists, self._squares)):
            progress.note("SSD needs squared gradients: computing them")
            self.times.compute(self.pointer, squares=True)
        needed, _ = PASSES[method]
        return self.times.seconds(self.pointer, needed, squares=squares, model=self.model)

    def _epochs(self, method: Method, setting: float) -> Iterator[int]:
        if method is Method.SSD:
            forget, retain = map(self.times.store.read_tensors, self._squares)
            return dampen(self.model, forget, retain, alpha=setting, epochs=self.plan.epochs)
        _, losses = PASSES[method]
        terms = [once(self._terms, role, partial(self._term, role)) for role in losses]
        mask = self._mask if method is Method.SALUN else None
        return train(self.model, terms, rate=setting, plan=self.plan, mask=mask)

    @property
    def _squares(self) -> list[str]:
        """Where the squared gradients of the forget and of the retain set lie."""
        digests = (self.pointer.forget, self.pointer.retain)
        return [Artifact.SQUARES.path(digest) for digest in digests]

    def _term(self, role: str) -> LossTerm:
        """Return the loss of the forget set, which methods ascend, or of the retain set."""
        store, manifest = self.times.store, self.times.manifest
        options = PassOptions(batch_size=self.plan.batch_size, device=self.times.device)
        rows = manifest.forget.rows if role == "forget" else self.plan.retain_rows
        path = Artifact.GRADIENT.path(getattr(self.pointer, role))
        kind, spec = store.read_header(path, GradientHeader).loss, manifest.input
        loss = GradientPass.prepare(self.model, kind, spec=spec, options=options)
        block = DataBlock.open(store, getattr(manifest, role))
        images, tokens = block.images(0, rows), np.asarray(block.tokens[:rows])
        sign = -1 if role == "forget" else 1
        return LossTerm(images, tokens, loss, sign, shuffled=role == "retain")

    @cached_property
    def _mask(self) -> Mask:
        path = Artifact.GRADIENT.path(self.pointer.forget)
        mask = saliency_mask(self.times.store.read_tensors(path))
        return {name: kept.to(self.times.device) for name, kept in mask.items()}
