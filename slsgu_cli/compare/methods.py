"""The methods compared with on CLIP (FT, GA, GAFT, SalUn, SSD), and one run of any of them."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.clip.evaluation import Evaluation, prepare
from slsgu_cli.clip.inputs import CacheBudget, pixel_normalizer, spans, to_tokens
from slsgu_cli.clip.models import resolve, tokenizer
from slsgu_cli.clip.zeroshot import counted_by
from slsgu_cli.compare.ours import ROLES, PassTimes
from slsgu_cli.errors import NotFiniteError
from slsgu_cli.method.gradient_pass import GradientPass, arithmetic
from slsgu_cli.method.gradients import load_graded
from slsgu_cli.records.figures import Accuracy, Figures
from slsgu_cli.records.method import GradientHeader, GradientPointer, Precision
from slsgu_cli.records.options import PassOptions
from slsgu_cli.records.sets import Purpose, SetManifest
from slsgu_cli.records.studies import TRAINED, ClipOutcome, ClipPlan, Method
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

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

    def order(self, plan: ClipPlan, epoch: int) -> list[npt.NDArray[np.intp]]:
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
    terms: list[LossTerm],
    *,
    rate: float,
    plan: ClipPlan,
    mask: Mask | None = None,
) -> Iterator[int]:
    """Train `model` in place, every term in turn; yield the epoch that has just ended."""
    optimizer = adamw(model, rate)
    epochs = range(1, plan.epochs + 1)
    steps = plan.epochs * sum(len(term.order(plan, 1)) for term in terms)
    step = 0
    for epoch in epochs:
        for term in terms:
            for rows in term.order(plan, epoch):
                for group in optimizer.param_groups:
                    group["lr"] = cosine_rate(rate, step, steps)
                optimizer.zero_grad()
                (term.sign * _loss(term, rows)).backward()  # type: ignore[no-untyped-call]
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


def _loss(term: LossTerm, rows: npt.NDArray[np.intp]) -> Tensor:
    run, pairs = term.loss, term.pairs
    normalize = pixel_normalizer(run.spec, run.options.device)
    ids = to_tokens(pairs.tokens[rows], "cpu")
    return run.losses(normalize(pairs.images[rows]), ids).sum()


Importance = Callable[[str], tuple[Tensor, Tensor]]
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


Weights = dict[str, Tensor]


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
    seconds, epoch, best = 0.0, 0, 0
    least: Accuracy | None = None
    weights: Weights = {}
    with progress.bar(label, total) as ticker:
        while True:
            start = perf_counter()
            ended = next(epochs, None)
            if ended is None:
                break
            settle(evaluation.model)
            seconds += perf_counter() - start
            epoch = ended
            ticker.advance()
            try:
                forget = forget_accuracy(evaluation)
            except NotFiniteError:
                if least is None:
                    raise
                progress.warn(f"{label}: epoch {epoch} is left out, its weights are not finite")
                break
            if least is None or forget.top1 < least.top1:
                best, least, weights = epoch, forget, weights_of(evaluation.model)
            if forget.top1 == 0:
                break
    if least is None:
        raise ValueError("a run has at least one epoch")
    set_weights(evaluation.model, weights)
    return Reported(best, epoch, figures_of(evaluation), seconds)


def forget_accuracy(evaluation: Evaluation) -> Accuracy:
    """Return how often the concept is recognised by the model as it is now."""
    with torch.no_grad():
        evaluation.forget.prompts.base_pass((), CacheBudget(0))
        for group in evaluation.shown:
            for _ in group.images.base_pass((), CacheBudget(0)):
                pass
        return evaluation.base_forget_accuracy()


def figures_of(evaluation: Evaluation) -> Figures:
    """Return what the model as it is now recognises, of the concept and of everything else."""
    with progress.silent():
        evaluation.base_pass((), cache_bytes=0)
    kept = {name: group.base_accuracy() for name, group in evaluation.utility.items()}
    return Figures(evaluation.base_forget_accuracy(), kept)


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
    store: Store,
    manifest: SetManifest,
    pointer: GradientPointer,
    model: nn.Module,
    device: str,
) -> tuple[Evaluation, Evaluation]:
    """Open what a set is chosen by and what it is reported on; one and the same where it is."""

    def opened(purpose: Purpose) -> Evaluation:
        tokenize = tokenizer(resolve(pointer.model))
        return prepare(store, manifest, model, tokenize=tokenize, device=device, purpose=purpose)

    choosing = opened(Purpose.CHOOSE)
    return choosing, opened(Purpose.REPORT) if manifest.deals else choosing


@dataclass
class BaselineRunner:
    """The original model, loaded once with its data; every run of a baseline starts from it.

    Epochs and settings are chosen by the rows of `choosing`, figures are of `reporting`: the
    same, where the set has no rows that nothing is chosen by.
    """

    store: Store
    manifest: SetManifest
    pointer: GradientPointer
    plan: ClipPlan
    model: nn.Module
    choosing: Evaluation
    reporting: Evaluation
    times: PassTimes
    _original: Weights

    @classmethod
    def open(
        cls,
        store: Store,
        manifest: SetManifest,
        pointer: GradientPointer,
        plan: ClipPlan,
        times: PassTimes,
    ) -> "BaselineRunner":
        """Load the model that the set's gradients are of. Raises StaleError and InputError."""
        _, model = load_graded(manifest, pointer, times.device)
        rows = evaluations(store, manifest, pointer, model, times.device)
        return cls(store, manifest, pointer, plan, model, *rows, times, weights_of(model))

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
        what = "alpha" if method is Method.SSD else "lr"
        label = f"{method} {what} {setting:g}"
        smaller = "a smaller --lr" if method in TRAINED else None
        with arithmetic(Precision.FP32), counted_by(label, hint=smaller):
            reported = follow(
                self._epochs(method, setting), self.choosing, label=label, total=self.plan.epochs
            )
            figures = reported.figures
            if self.reporting is not self.choosing:
                figures = figures_of(self.reporting)
        forget_passes, retain_passes = self._passes(method, reported.epochs)
        progress.detail(
            f"{label}: FA@1 {figures.forget.top1:.1f} after epoch {reported.epoch} "
            f"of {reported.epochs}"
        )
        return ClipOutcome(
            method=method,
            setting=setting,
            plan=self.plan.of(method),
            edit=None,
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
        if method is Method.SSD:
            return 1.0, 1.0
        terms = loss_terms(method, forget=self._forget, retain=self._retain)
        share = len(self._retain.pairs) / self.manifest.retain.rows
        of_the_mask = 1.0 if method is Method.SALUN else 0.0
        return (
            of_the_mask + epochs * (self._forget in terms),
            epochs * share * (self._retain in terms),
        )

    def _seconds_before(self, method: Method) -> float:
        """Return what the gradients take that a method needs before its first epoch."""
        if method is Method.SALUN:
            return self._seconds(["forget"], squares=False)
        if method is Method.SSD:
            digests = (self.pointer.forget, self.pointer.retain)
            if not all(self.store.exists(Artifact.SQUARES.path(digest)) for digest in digests):
                progress.note("SSD needs squared gradients: computing them")
                self.times.compute(self.pointer, squares=True)
            return self._seconds(ROLES, squares=True)
        return 0.0

    def _seconds(self, roles: Iterable[str], *, squares: bool) -> float:
        return self.times.seconds(self.pointer, roles, squares=squares, model=self.model)

    def _epochs(self, method: Method, setting: float) -> Iterator[int]:
        if method is Method.SSD:
            forget, retain = (
                self.store.read_tensors(Artifact.SQUARES.path(digest))
                for digest in (self.pointer.forget, self.pointer.retain)
            )
            importance = importance_of(forget, retain, self.times.device)
            return dampen(self.model, importance, alpha=setting, epochs=self.plan.epochs)
        terms = loss_terms(method, forget=self._forget, retain=self._retain)
        mask = self._mask if method is Method.SALUN else None
        return train(self.model, terms, rate=setting, plan=self.plan, mask=mask)

    @cached_property
    def _forget(self) -> LossTerm:
        return self._loss_term("forget", self.manifest.forget.rows, -1)

    @cached_property
    def _retain(self) -> LossTerm:
        return self._loss_term("retain", self.plan.retain_rows, 1)

    @cached_property
    def _mask(self) -> Mask:
        mask = saliency_mask(self.store.read_tensors(Artifact.GRADIENT.path(self.pointer.forget)))
        return {name: kept.to(self.times.device) for name, kept in mask.items()}

    def _loss_term(self, role: str, rows: int, sign: int) -> LossTerm:
        block = DataBlock.open(self.store, getattr(self.manifest, role))
        path = Artifact.GRADIENT.path(getattr(self.pointer, role))
        header = self.store.read_header(path, GradientHeader)
        loss = GradientPass.prepare(
            self.model,
            header.loss,
            spec=self.manifest.input,
            options=PassOptions(batch_size=self.plan.batch_size, device=self.times.device),
        )
        return LossTerm(Pairs.read(block, rows), loss, sign, shuffled=role == "retain")
