"""`compare`: every method on every set; each row is recorded and never run twice."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar, Generic

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.compare.layer_edits import LayerEdits, layer_for
from slsgu_cli.compare.ours import OurEdit, original_outcome
from slsgu_cli.compare.pass_times import PassTimes
from slsgu_cli.compare.registry import ClosedForm, Trained, baseline
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.compare.tuning import tune
from slsgu_cli.errors import UsageError
from slsgu_cli.records.comparison import (
    CLIP_METHODS,
    ClipComparison,
    ClipOutcome,
    ClipPlan,
    CompareOptions,
    Comparison,
    Method,
    MethodSetting,
    Row,
)
from slsgu_cli.records.method import GradientHeader, GradientPointer
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer, resume
from slsgu_cli.store.store import Store


@dataclass(frozen=True, slots=True)
class Compared:
    """The rows of each concept, in the order of Table 1.

    `chosen` has the best setting of each tuned baseline, None if settings were given.
    """

    concepts: dict[str, tuple[ClipOutcome, ...]]
    chosen: dict[Method, float] | None


def compare(store: Store, names: Sequence[str], *, options: CompareOptions) -> Compared:
    """Run methods on the sets `names`; tune settings on the first of them.

    Raises MissingError, InputError, StaleError and UsageError.
    """
    layered = [
        method
        for method in CLIP_METHODS
        if isinstance(spec := baseline(method), ClosedForm) and spec.only is None
    ]
    if options.layer is not None and not set(layered) & set(options.methods):
        raise UsageError("--layer is for " + ", ".join(layered), hint=f"--methods {layered[0]},...")
    concepts: dict[str, tuple[ClipOutcome, ...]] = {}
    chosen: dict[Method, float] = {}
    for name in dict.fromkeys(names):
        run = ClipComparisonRun.open(store, name, options)
        rows = []
        # Ours first: a stale edit is reported before anything is trained.
        for method in sorted(options.methods, key=lambda method: method is not Method.OURS):
            spec = baseline(method)
            if spec is None:
                rows.append(run.row(method))
            elif not run.fits(method):
                progress.note(f"{spec.label} is skipped: the model has no layer for it")
            elif options.rates is not None:
                known = spec.hyperparameter
                values = (known.default,) if known else options.rates
                rows += [run.row(method, setting) for setting in values]
            elif method in chosen:
                rows.append(run.row(method, chosen[method]))
            else:
                best, tried = tune(method, partial(run.row, method))
                chosen[method] = best.setting or 0.0
                rows += tried
        concepts[name] = tuple(sorted(rows, key=lambda row: CLIP_METHODS.index(row.method)))
    return Compared(concepts, chosen if options.rates is None else None)


@dataclass
class ComparisonRun(ABC, Generic[Row]):
    """The record of one comparison: rows on record are reused, others are run and added."""

    store: Store
    name: str
    record: Comparison[Row]
    times: PassTimes

    artifact: ClassVar[Artifact]

    def __post_init__(self) -> None:
        self.record = resume(self.store, self.artifact, self.name, self.record)

    @abstractmethod
    def at(self, method: Method, setting: float | None) -> MethodSetting:
        """Return the identity of a row: the method, its setting and its plan."""

    @abstractmethod
    def run(self, method: Method, setting: float | None) -> Row:
        """Run a method and measure the model."""

    def row(self, method: Method, setting: float | None = None) -> Row:
        """Return the row of a method at a setting; run it if it is not recorded."""
        known = self.record.row_made_by(self.at(method, setting))
        if known is not None:
            return known
        row = self.run(method, setting)
        # Another process may have recorded rows in the meantime.
        with progress.silent():
            self.record = resume(self.store, self.artifact, self.name, self.record)
        self.record = self.with_row(row)
        self.store.write_record(self.artifact.path(self.name), self.record)
        return row

    def with_row(self, row: Row) -> Comparison[Row]:
        """Return the record with a new row."""
        return self.record.with_row(row)


@dataclass
class ClipComparisonRun(ComparisonRun[ClipOutcome]):
    """The comparison on one set; the model is loaded only for rows that are not recorded."""

    record: ClipComparison
    pointer: GradientPointer
    plan: ClipPlan
    layer: str | None

    artifact = Artifact.COMPARISON

    @classmethod
    def open(cls, store: Store, name: str, options: CompareOptions) -> "ClipComparisonRun":
        """Read the record of a set. Raises MissingError and StaleError."""
        manifest = read_manifest(store, name)
        store.require_writable(cls.artifact.path(name))
        times = PassTimes(store, manifest, pick_device(options.device))
        if store.exists(Artifact.POINTER.path(name)):
            pointer = read_pointer(store, manifest)
        else:
            progress.note(f"{name} has no gradients yet: computing them")
            pointer = times.compute(None, squares=False)
        plan = ClipPlan(
            epochs=options.epochs,
            batch_size=options.batch_size,
            retain_rows=min(options.retain_rows or manifest.retain.rows, manifest.retain.rows),
            seed=options.seed,
        )
        fresh = ClipComparison(
            name=name,
            model_fingerprint=pointer.model_fingerprint,
            forget=pointer.forget,
            retain=pointer.retain,
            evals=manifest.evaluation_blocks(),
            passes={},
            outcomes=(),
            version=slsgu_cli.__version__,
        )
        run = cls(store, name, fresh, times, pointer, plan, options.layer)
        times.known = {**run.record.passes, **times.known}
        return run

    @cached_property
    def baselines(self) -> BaselineRunner:
        """The loaded model and its data."""
        return BaselineRunner.open(self.pointer, self.plan, self.times)

    @cached_property
    def layer_edits(self) -> LayerEdits:
        """Closed-form edits of the loaded model."""
        return LayerEdits(self.baselines, self.layers)

    @cached_property
    def layers(self) -> dict[Method, str]:
        """The layer that each closed form edits, for those that find one in the model."""
        layers = {
            method: layer_for(spec, self.store, self.pointer, self.layer)
            for method in CLIP_METHODS
            if isinstance(spec := baseline(method), ClosedForm)
        }
        return {method: layer for method, layer in layers.items() if layer is not None}

    def fits(self, method: Method) -> bool:
        """Return whether the model has the layer or the parameters that a method changes."""
        spec = baseline(method)
        if isinstance(spec, ClosedForm):
            return method in self.layers
        if not isinstance(spec, Trained) or spec.needs is None:
            return True
        header = self.store.read_header(Artifact.GRADIENT.path(self.pointer.forget), GradientHeader)
        return any(map(spec.needs.fullmatch, header.weights))

    @cached_property
    def our_edit(self) -> OurEdit:
        """The set's edit; searched for if there is none."""
        return OurEdit.find(self.pointer, self.times)

    def at(self, method: Method, setting: float | None) -> MethodSetting:
        """Return the setting of a method with its plan or layer, or our edit."""
        spec = baseline(method)
        if isinstance(spec, ClosedForm):
            return MethodSetting(method, setting, layer=self.layers[method])
        if method is Method.OURS:
            return MethodSetting(method, edit=self.our_edit.label)
        if isinstance(spec, Trained):
            return MethodSetting(method, setting, spec.plan(self.plan))
        return MethodSetting(method)

    def run(self, method: Method, setting: float | None) -> ClipOutcome:
        """Run a method and measure the model; our edit has the figures of its search."""
        if method is Method.OURS:
            return self.our_edit.outcome(self.pointer, self.times)
        if setting is None:
            return original_outcome(self.baselines.original())
        is_layer_edit = isinstance(baseline(method), ClosedForm)
        return (self.layer_edits if is_layer_edit else self.baselines).run(method, setting)

    def with_row(self, row: ClipOutcome) -> ClipComparison:
        """Return the record with a new row, and with the times of passes."""
        passes = dict(sorted({**self.record.passes, **self.times.known}.items()))
        return replace(self.record.with_row(row), passes=passes)
