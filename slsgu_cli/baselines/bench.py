"""The workbench of one concept: its model, data and figures, and a run of any baseline on them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from slsgu_cli import progress
from slsgu_cli.baselines.dampening import dampen, importance_of
from slsgu_cli.baselines.epochs import (
    Weights,
    follow,
    forget_accuracy,
    set_weights,
    utility,
    weights_of,
)
from slsgu_cli.baselines.passes import ROLES, PassTimes
from slsgu_cli.baselines.records import Method, Outcome, Plan
from slsgu_cli.baselines.training import (
    Lesson,
    Mask,
    Pairs,
    lessons_of,
    saliency_mask,
    train,
)
from slsgu_cli.evaluation import Evaluation, prepare
from slsgu_cli.gradients import load_graded
from slsgu_cli.gradpass import GradientPass, arithmetic
from slsgu_cli.layout import gradient_path, squares_path
from slsgu_cli.models import tokenizer
from slsgu_cli.records import (
    Accuracy,
    GradientHeader,
    GradientPointer,
    PassOptions,
    Precision,
    SetManifest,
)
from slsgu_cli.sets import DataBlock
from slsgu_cli.store import Store


@dataclass
class Bench:
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
    ) -> "Bench":
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
        lessons = lessons_of(method, forget=self._forget, retain=self._retain)
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
            if not all(self.store.exists(squares_path(digest)) for digest in digests):
                progress.note("SSD needs squared gradients: computing them")
                self.times.ensure(self.pointer, squares=True)
            return self._seconds(ROLES, squares=True)
        return 0.0

    def _seconds(self, roles: Iterable[str], *, squares: bool) -> float:
        return self.times.seconds(self.pointer, roles, squares=squares, model=self.model)

    def _epochs(self, method: Method, setting: float) -> Iterator[int]:
        if method is Method.SSD:
            forget, retain = (
                self.store.read_tensors(squares_path(digest))
                for digest in (self.pointer.forget, self.pointer.retain)
            )
            importance = importance_of(forget, retain, self.times.device)
            return dampen(self.model, importance, alpha=setting, epochs=self.plan.epochs)
        lessons = lessons_of(method, forget=self._forget, retain=self._retain)
        mask = self._mask if method is Method.SALUN else None
        return train(self.model, lessons, rate=setting, plan=self.plan, mask=mask)

    @cached_property
    def _forget(self) -> Lesson:
        return self._lesson("forget", self.manifest.forget.rows, -1)

    @cached_property
    def _retain(self) -> Lesson:
        return self._lesson("retain", self.plan.retain_rows, 1)

    @cached_property
    def _mask(self) -> Mask:
        mask = saliency_mask(self.store.read_tensors(gradient_path(self.pointer.forget)))
        return {name: kept.to(self.times.device) for name, kept in mask.items()}

    def _lesson(self, role: str, rows: int, sign: int) -> Lesson:
        block = DataBlock.open(self.store, getattr(self.manifest, role))
        header = self.store.read_header(gradient_path(getattr(self.pointer, role)), GradientHeader)
        loss = GradientPass.prepare(
            self.model,
            header.loss,
            spec=self.manifest.input,
            options=PassOptions(batch_size=self.plan.batch_size, device=self.times.device),
        )
        return Lesson(Pairs.read(block, rows), loss, sign, shuffled=role == "retain")
