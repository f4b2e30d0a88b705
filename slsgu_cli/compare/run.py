"""`compare`: every method on every set, recorded as it ends."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter

import torch
from torch import Tensor, nn

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.clip.evaluation import Evaluation, prepare
from slsgu_cli.clip.models import tokenizer
from slsgu_cli.clip.towers import CacheBudget
from slsgu_cli.compare.methods import (
    ALPHA,
    LossTerm,
    Mask,
    Pairs,
    dampen,
    importance_of,
    loss_terms,
    saliency_mask,
    train,
)
from slsgu_cli.compare.ours import ROLES, PassTimes, original_outcome, our_outcome, standing_trials
from slsgu_cli.compare.table import tune
from slsgu_cli.method.gradient_pass import GradientPass, arithmetic
from slsgu_cli.method.gradients import load_graded
from slsgu_cli.records.method import (
    Accuracy,
    GradientHeader,
    GradientPointer,
    PassOptions,
    Precision,
)
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.studies import TRAINED, Comparison, Method, Outcome, Plan
from slsgu_cli.store.artifacts import (
    Artifact,
    evaluation_blocks,
    read_manifest,
    read_pointer,
    resume,
)
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Reported:
    """The epoch reported and its figures; how many epochs ran, and their seconds.

    The seconds are those of the epochs alone, without measuring.
    """

    epoch: int
    epochs: int
    forget: Accuracy
    utility: dict[str, Accuracy]
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
            _settle(evaluation.model)
            seconds += perf_counter() - start
            epoch = ended
            ticker.advance()
            found = forget_accuracy(evaluation)
            if least is None or found.top1 < least.top1:
                best, least, weights = epoch, found, weights_of(evaluation.model)
            if found.top1 == 0:
                break
    if least is None:
        raise ValueError("a run has at least one epoch")
    set_weights(evaluation.model, weights)
    return Reported(best, epoch, least, utility(evaluation), seconds)


def forget_accuracy(evaluation: Evaluation) -> Accuracy:
    """Return how often the concept is recognised by the model as it is now."""
    group = evaluation.forget
    with torch.no_grad():
        group.prompts.base_pass((), CacheBudget(0))
        for _ in group.images.base_pass((), CacheBudget(0)):
            pass
        return group.base_accuracy()


def utility(evaluation: Evaluation) -> dict[str, Accuracy]:
    """Return the accuracy on each evaluation set of the model as it is now."""
    with progress.silent():
        evaluation.base_pass((), cache_bytes=0)
    return {name: group.base_accuracy() for name, group in evaluation.utility.items()}


def weights_of(model: nn.Module) -> Weights:
    """Return a copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def set_weights(model: nn.Module, weights: Weights) -> None:
    """Put back what `weights_of` returned."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def _settle(model: nn.Module) -> None:
    """Wait for a GPU: its clock runs on after a call has returned."""
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


@dataclass
class MethodRun:
    """Everything that the methods are run on, loaded once; every run starts from the original."""

    store: Store
    manifest: SetManifest
    pointer: GradientPointer
    plan: Plan
    model: nn.Module
    evaluation: Evaluation
    times: PassTimes
    _original: Weights

    @classmethod
    def open(
        cls,
        store: Store,
        manifest: SetManifest,
        pointer: GradientPointer,
        plan: Plan,
        times: PassTimes,
    ) -> "MethodRun":
        """Load the model that the set's gradients are of. Raises StaleError and InputError."""
        device = times.device
        resolved, model = load_graded(manifest, pointer, device)
        evaluation = prepare(store, manifest, model, tokenize=tokenizer(resolved), device=device)
        return cls(store, manifest, pointer, plan, model, evaluation, times, weights_of(model))

    def original(self) -> tuple[Accuracy, dict[str, Accuracy]]:
        """Measure the original model: forget accuracy, and that of each evaluation set."""
        set_weights(self.model, self._original)
        return forget_accuracy(self.evaluation), utility(self.evaluation)

    def run(self, method: Method, setting: float) -> Outcome:
        """Run a baseline on the original model and measure the epoch that is reported."""
        set_weights(self.model, self._original)
        seconds = self._seconds_before(method)
        what = "alpha" if method is Method.SSD else "lr"
        label = f"{method} {what} {setting:g}"
        with arithmetic(Precision.FP32):
            found = follow(
                self._epochs(method, setting), self.evaluation, label=label, total=self.plan.epochs
            )
        forget_passes, retain_passes = self._passes(method, found.epochs)
        progress.detail(
            f"{label}: FA@1 {found.forget.top1:.1f} after epoch {found.epoch} of {found.epochs}"
        )
        return Outcome(
            method=method,
            setting=setting,
            plan=self.plan.of(method),
            edit=None,
            epoch=found.epoch,
            forget=found.forget,
            utility=found.utility,
            seconds=seconds + found.seconds,
            forget_passes=forget_passes,
            retain_passes=retain_passes,
            where=self.times.where,
        )

    def _passes(self, method: Method, epochs: int) -> tuple[float, float]:
        """Return the passes over all forget and all retain rows that a run amounts to."""
        if method is Method.SSD:
            return 1.0, 1.0
        lessons = loss_terms(method, forget=self._forget, retain=self._retain)
        share = len(self._retain.pairs) / self.manifest.retain.rows
        of_the_mask = 1.0 if method is Method.SALUN else 0.0
        return (
            of_the_mask + epochs * (self._forget in lessons),
            epochs * share * (self._retain in lessons),
        )

    def _seconds_before(self, method: Method) -> float:
        """Return what the gradients take that a method needs before its first epoch."""
        if method is Method.SALUN:
            return self._seconds(["forget"], squares=False)
        if method is Method.SSD:
            digests = (self.pointer.forget, self.pointer.retain)
            if not all(self.store.exists(Artifact.SQUARES.path(digest)) for digest in digests):
                progress.note("SSD needs squared gradients: computing them")
                self.times.ensure(self.pointer, squares=True)
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
        lessons = loss_terms(method, forget=self._forget, retain=self._retain)
        mask = self._mask if method is Method.SALUN else None
        return train(self.model, lessons, rate=setting, plan=self.plan, mask=mask)

    @cached_property
    def _forget(self) -> LossTerm:
        return self._lesson("forget", self.manifest.forget.rows, -1)

    @cached_property
    def _retain(self) -> LossTerm:
        return self._lesson("retain", self.plan.retain_rows, 1)

    @cached_property
    def _mask(self) -> Mask:
        mask = saliency_mask(self.store.read_tensors(Artifact.GRADIENT.path(self.pointer.forget)))
        return {name: kept.to(self.times.device) for name, kept in mask.items()}

    def _lesson(self, role: str, rows: int, sign: int) -> LossTerm:
        block = DataBlock.open(self.store, getattr(self.manifest, role))
        header = self.store.read_header(
            Artifact.GRADIENT.path(getattr(self.pointer, role)), GradientHeader
        )
        loss = GradientPass.prepare(
            self.model,
            header.loss,
            spec=self.manifest.input,
            options=PassOptions(batch_size=self.plan.batch_size, device=self.times.device),
        )
        return LossTerm(Pairs.read(block, rows), loss, sign, shuffled=role == "retain")


PAPER_RATES = (1e-6, 1e-7)
ORDER = tuple(Method)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """Which methods to run and how. `rates` is None to find each baseline's best setting."""

    methods: Sequence[Method] = tuple(Method)
    rates: Sequence[float] | None = PAPER_RATES
    epochs: int = 10
    batch_size: int = 32
    retain_rows: int | None = None
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Compared:
    """The rows of each concept in the order of Table 1.

    `chosen` has the setting found best for each baseline, None where they were given.
    """

    concepts: dict[str, tuple[Outcome, ...]]
    chosen: dict[Method, float] | None


def compare(store: Store, names: Sequence[str], *, options: CompareOptions) -> Compared:
    """Run every method on every set `names`; settings are tuned on the first of them.

    Raises MissingError, InputError and StaleError.
    """
    # Ours first: its search measures the original model too.
    methods = sorted(set(options.methods), key=lambda m: (m is not Method.OURS, ORDER.index(m)))
    settings: dict[Method, Sequence[float]] = {Method.SSD: (ALPHA,)}
    settings |= dict.fromkeys(TRAINED, options.rates or ())
    concepts: dict[str, tuple[Outcome, ...]] = {}
    chosen: dict[Method, float] = {}
    for name in dict.fromkeys(names):
        ledger = _Ledger.open(store, name, options)
        rows: list[Outcome] = []
        for method in methods:
            if method in (Method.ORIGINAL, Method.OURS):
                rows.append(ledger.plain(method))
            elif options.rates is None and method not in chosen:
                best, tried = tune(method, ledger.runner(method))
                chosen[method] = best.setting or 0.0
                settings[method] = (chosen[method],)
                rows += tried
            else:
                rows += map(ledger.runner(method), settings[method])
        concepts[name] = tuple(sorted(rows, key=lambda row: ORDER.index(row.method)))
    return Compared(concepts, chosen if options.rates is None else None)


@dataclass
class _Ledger:
    """The record of one concept; the model is loaded for what is missing in it."""

    store: Store
    pointer: GradientPointer
    plan: Plan
    times: PassTimes
    comparison: Comparison

    @classmethod
    def open(cls, store: Store, name: str, options: CompareOptions) -> "_Ledger":
        manifest = read_manifest(store, name)
        times = PassTimes(store, manifest, options.device)
        if store.exists(Artifact.POINTER.path(name)):
            pointer = read_pointer(store, manifest)
        else:
            progress.note(f"{name} has no gradients yet: computing them")
            pointer = times.ensure(None, squares=False)
        plan = Plan(
            epochs=options.epochs,
            batch_size=options.batch_size,
            retain_rows=min(options.retain_rows or manifest.retain.rows, manifest.retain.rows),
            seed=options.seed,
        )
        fresh = Comparison(
            name=name,
            model_fingerprint=pointer.model_fingerprint,
            forget=pointer.forget,
            retain=pointer.retain,
            evals=evaluation_blocks(manifest),
            passes={},
            outcomes=(),
            version=slsgu_cli.__version__,
        )
        ledger = cls(store, pointer, plan, times, fresh)
        ledger._read()
        times.known = {**ledger.comparison.passes, **times.known}
        return ledger

    @cached_property
    def bench(self) -> "MethodRun":
        """The loaded model and its data."""
        return MethodRun.open(self.store, self.times.manifest, self.pointer, self.plan, self.times)

    def plain(self, method: Method) -> Outcome:
        """Return the row of the original model, as the search or we measured it, or of our edit."""
        recorded = self.comparison.outcomes
        if method is Method.OURS:
            times = self.times
            return self._add(our_outcome(self.store, self.pointer, recorded, times))
        known = [outcome for outcome in recorded if outcome.method is Method.ORIGINAL]
        if known:
            return known[-1]
        trials = standing_trials(self.store, self.times.manifest, self.pointer)
        if trials is not None:
            return self._add(original_outcome(trials.baseline_forget, trials.baseline_utility))
        return self._add(original_outcome(*self.bench.original()))

    def runner(self, method: Method) -> Callable[[float], Outcome]:
        """Return the function that gives a baseline's row at a setting, run or recorded."""

        def row(setting: float) -> Outcome:
            key = (method, setting, self.plan.of(method))
            for known in self.comparison.outcomes:
                if (known.method, known.setting, known.plan) == key:
                    return known
            return self._add(self.bench.run(method, setting))

        return row

    def _add(self, outcome: Outcome) -> Outcome:
        """Record a row, beside those that another process may have recorded meanwhile."""
        with progress.silent():
            self._read()

        def same(other: Outcome) -> bool:
            key = (outcome.method, outcome.setting, outcome.plan)
            return (other.method, other.setting, other.plan) == key

        others = [known for known in self.comparison.outcomes if not same(known)]
        self.comparison = replace(
            self.comparison,
            outcomes=(*others, outcome),
            passes={**self.comparison.passes, **self.times.known},
        )
        self.store.write_record(Artifact.COMPARISON.path(self.comparison.name), self.comparison)
        return outcome

    def _read(self) -> None:
        """Take up the record in the store, if it was made from the same things."""
        fresh = self.comparison
        self.comparison = resume(self.store, Artifact.COMPARISON, fresh.name, fresh)
