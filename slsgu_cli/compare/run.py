"""`compare`: every method on every set, recorded as it ends and never run twice."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Generic, TypeVar

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.compare.methods import ALPHA, BaselineRunner
from slsgu_cli.compare.ours import (
    OurEdit,
    PassTimes,
    find_our_edit,
    original_outcome,
    our_outcome,
    standing_trials,
)
from slsgu_cli.compare.table import tune
from slsgu_cli.records.method import GradientPointer
from slsgu_cli.records.options import CompareOptions
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.studies import (
    CLIP_METHODS,
    TRAINED,
    Comparison,
    Method,
    MethodSetting,
    Outcome,
    PipelineComparison,
    PipelineOutcome,
    Plan,
)
from slsgu_cli.store.artifacts import (
    Artifact,
    evaluation_blocks,
    read_manifest,
    read_pointer,
    resume,
)
from slsgu_cli.store.store import Store


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
    settings: dict[Method, Sequence[float | None]] = {
        Method.OURS: (None,),  # first: its search measures the original model too
        Method.ORIGINAL: (None,),
        **dict.fromkeys(TRAINED, options.rates or ()),
        Method.SSD: (ALPHA,),
    }
    settings = {method: settings[method] for method in settings if method in options.methods}
    concepts: dict[str, tuple[Outcome, ...]] = {}
    chosen: dict[Method, float] = {}
    for name in dict.fromkeys(names):
        run = ClipComparisonRun.open(store, name, options)
        rows = []
        for method, given in settings.items():
            if options.rates is not None or method in (Method.ORIGINAL, Method.OURS):
                rows += run.rows({method: given})
            elif method in chosen:
                rows.append(run.row(method, chosen[method]))
            else:
                best, tried = tune(method, partial(run.row, method))
                chosen[method] = best.setting or 0.0
                rows += tried
        concepts[name] = tuple(sorted(rows, key=lambda row: CLIP_METHODS.index(row.method)))
    return Compared(concepts, chosen if options.rates is None else None)


Record = TypeVar("Record", Comparison, PipelineComparison)
Row = TypeVar("Row", Outcome, PipelineOutcome)


@dataclass
class ComparisonRun(ABC, Generic[Record, Row]):
    """One comparison's record: a row that is on it stands, one that is not is run and added."""

    store: Store
    name: str
    record: Record
    times: PassTimes

    artifact: ClassVar[Artifact]

    def __post_init__(self) -> None:
        self.record = resume(self.store, self.artifact, self.name, self.record)

    @abstractmethod
    def at(self, method: Method, setting: float | None) -> MethodSetting:
        """Return what running a method at a setting means here."""

    @abstractmethod
    def run(self, method: Method, setting: float | None) -> Row:
        """Run a method and measure what it left."""

    def rows(self, settings: Mapping[Method, Sequence[float | None]]) -> list[Row]:
        """Return each method's row at each of its settings."""
        return [self.row(method, setting) for method, each in settings.items() for setting in each]

    def row(self, method: Method, setting: float | None = None) -> Row:
        """Return a method's row at a setting, as recorded or else run now."""
        wanted = self.at(method, setting)
        rows: Sequence[Any] = self.record.outcomes
        for row in reversed(rows):
            if row.made_by == wanted:
                known: Row = row
                return known
        return self._add(self.run(method, setting))

    def _add(self, row: Row) -> Row:
        """Record a row, beside those that another process may have recorded meanwhile."""
        with progress.silent():
            self.record = resume(self.store, self.artifact, self.name, self.record)
        others: list[Any] = [other for other in self.record.outcomes if other.place != row.place]
        self.record = self.with_rows((*others, row))
        self.store.write_record(self.artifact.path(self.name), self.record)
        return row

    def with_rows(self, rows: tuple[Any, ...]) -> Record:
        """Return the record with other rows."""
        return replace(self.record, outcomes=rows)


@dataclass
class ClipComparisonRun(ComparisonRun[Comparison, Outcome]):
    """The comparison on one set; the model is loaded for what is not on record."""

    pointer: GradientPointer
    plan: Plan

    artifact = Artifact.COMPARISON

    @classmethod
    def open(cls, store: Store, name: str, options: CompareOptions) -> "ClipComparisonRun":
        """Read what is on record of a set. Raises MissingError and StaleError."""
        manifest = read_manifest(store, name)
        times = PassTimes(store, manifest, options.device)
        if store.exists(Artifact.POINTER.path(name)):
            pointer = read_pointer(store, manifest)
        else:
            progress.note(f"{name} has no gradients yet: computing them")
            pointer = times.compute(None, squares=False)
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
        run = cls(store, name, fresh, times, pointer, plan)
        times.remember(run.record.passes)
        return run

    @property
    def manifest(self) -> SetManifest:
        """The set."""
        return self.times.manifest

    @cached_property
    def baselines(self) -> BaselineRunner:
        """The loaded model and its data."""
        return BaselineRunner.open(self.store, self.manifest, self.pointer, self.plan, self.times)

    @cached_property
    def our_edit(self) -> OurEdit:
        """The set's edit, searched for if there is none."""
        return find_our_edit(self.store, self.manifest, self.pointer, self.times.device_option)

    def at(self, method: Method, setting: float | None) -> MethodSetting:
        """Return a method's setting and plan; of ours, the edit."""
        if method is Method.OURS:
            return MethodSetting(method, edit=self.our_edit.words)
        if method is Method.ORIGINAL:
            return MethodSetting(method)
        return MethodSetting(method, setting, self.plan.of(method))

    def run(self, method: Method, setting: float | None) -> Outcome:
        """Run a baseline, or tell of the original model and our edit what the search measured."""
        if method is Method.OURS:
            return our_outcome(self.store, self.our_edit, self.pointer, self.times)
        if setting is not None:
            return self.baselines.run(method, setting)
        trials = standing_trials(self.store, self.manifest, self.pointer)
        if trials is not None:
            return original_outcome(trials.baseline_forget, trials.baseline_utility)
        return original_outcome(*self.baselines.original())

    def with_rows(self, rows: tuple[Any, ...]) -> Comparison:
        """Return the record with other rows, and with the times measured for them."""
        passes = {**self.record.passes, **self.times.known}
        return replace(self.record, outcomes=rows, passes=passes)
