"""`compare`: every method on every set, recorded as it ends and never run twice; the table of it.

Nothing here loads PyTorch before a method is run: reports and tables read what is on record.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.compare.ours import (
    OurEdit,
    PassTimes,
    find_our_edit,
    original_outcome,
    our_outcome,
    standing_trials,
)
from slsgu_cli.errors import UsageError
from slsgu_cli.records.method import Accuracy, GradientPointer
from slsgu_cli.records.options import CompareOptions
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.studies import (
    CLIP_METHODS,
    TRAINED,
    Comparison,
    Method,
    MethodSetting,
    Outcome,
    Plan,
)
from slsgu_cli.records.targets import PipelineComparison, PipelineOutcome
from slsgu_cli.store.artifacts import (
    Artifact,
    evaluation_blocks,
    read_manifest,
    read_pointer,
    resume,
)
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from slsgu_cli.compare.methods import BaselineRunner

LABELS = {
    Method.ORIGINAL: "Original",
    Method.FT: "FT",
    Method.GA: "GA",
    Method.GAFT: "GAFT",
    Method.SALUN: "SalUn",
    Method.SSD: "SSD",
    Method.OURS: "Ours",
    Method.ESD: "ESD-x",
}


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
    def baselines(self) -> "BaselineRunner":
        """The loaded model and its data."""
        from slsgu_cli.compare.methods import BaselineRunner

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


DECADES = (1e-6, 1e-5, 1e-4)

# SSD has no learning rate: its alpha decides how many weights are dampened. The paper's is ALPHA.
ALPHA = 10.0
ALPHAS = (1.0, 10.0, 100.0, 1000.0)


def tune(method: Method, run: Callable[[float], Outcome]) -> tuple[Outcome, list[Outcome]]:
    """Return a baseline's best outcome and all that were tried for it.

    Learning rates: three decades, then half a decade to either side of the best of them.
    """
    if method is Method.SSD:
        tried = [run(alpha) for alpha in ALPHAS]
        return best(tried), tried
    tried = [run(rate) for rate in DECADES]
    middle = best(tried).setting or 0.0
    tried += [run(rate) for rate in (_rounded(middle / 10**0.5), _rounded(middle * 10**0.5))]
    return best(tried), sorted(tried, key=lambda o: o.setting or 0.0)


def best(outcomes: list[Outcome]) -> Outcome:
    """Return the outcome of the best trade-off; of equals the one with the least setting."""
    return min(outcomes, key=lambda o: (-trade_off(o), o.setting or 0.0))


def trade_off(outcome: Outcome) -> float:
    """Return the mean of what is forgotten (100 - FA@1) and what is kept (mean TA@1)."""
    kept = [figure.top1 for figure in outcome.utility.values()]
    return (100 - outcome.forget.top1 + sum(kept) / len(kept)) / 2


def _rounded(rate: float) -> float:
    return float(f"{rate:.0e}")


@dataclass(frozen=True, slots=True)
class TableRow:
    """A method at one setting: its mean figures over `concepts`."""

    method: Method
    setting: float | None
    epoch: float | None
    forget: Accuracy
    utility: dict[str, Accuracy]
    seconds: float
    forget_passes: float
    retain_passes: float
    concepts: int
    chosen: bool

    @property
    def kept(self) -> float:
        """The mean TA@1 over the evaluation sets."""
        return sum(figure.top1 for figure in self.utility.values()) / len(self.utility)

    @property
    def words(self) -> str:
        """The setting as a person reads it."""
        if self.setting is None:
            return ""
        return f"{'alpha' if self.method is Method.SSD else 'lr'} {self.setting:g}"


def mean_rows(
    concepts: dict[str, tuple[Outcome, ...]], chosen: dict[Method, float] | None
) -> list[TableRow]:
    """Return a row for each method and setting that every concept has, in their order.

    Raises UsageError where the concepts have no evaluation set in common.
    """
    by_key = [{(o.method, o.setting): o for o in outcomes} for outcomes in concepts.values()]
    sets = set.intersection(*(set(o.utility) for each in by_key for o in each.values()))
    if not sets:
        raise UsageError(
            f"{', '.join(concepts)} have no evaluation set in common",
            hint="build them with the same --eval names",
        )
    rows = []
    for method, setting in by_key[0]:
        outcomes = [each[method, setting] for each in by_key if (method, setting) in each]
        if len(outcomes) == len(by_key):
            marked = chosen is not None and chosen.get(method) == setting
            rows.append(_row(outcomes, sorted(sets), chosen=marked))
    return rows


def _row(outcomes: Sequence[Outcome], sets: Sequence[str], *, chosen: bool) -> TableRow:
    def mean(value: Callable[[Outcome], float]) -> float:
        return sum(map(value, outcomes)) / len(outcomes)

    first = outcomes[0]
    return TableRow(
        method=first.method,
        setting=first.setting,
        epoch=None if first.epoch is None else mean(lambda o: o.epoch or 0),
        forget=_mean([o.forget for o in outcomes]),
        utility={name: _mean([o.utility[name] for o in outcomes]) for name in sets},
        seconds=mean(lambda o: o.seconds),
        forget_passes=mean(lambda o: o.forget_passes),
        retain_passes=mean(lambda o: o.retain_passes),
        concepts=len(outcomes),
        chosen=chosen,
    )


def _mean(figures: Sequence[Accuracy]) -> Accuracy:
    return Accuracy(
        sum(figure.top1 for figure in figures) / len(figures),
        sum(figure.top5 for figure in figures) / len(figures),
        sum(figure.rows for figure in figures),
    )


def better(rows: Sequence[TableRow]) -> list[TableRow]:
    """Return the baselines that beat ours: no worse on FA@1 and mean TA@1, better on one."""
    beating = []
    for ours in (row for row in rows if row.method is Method.OURS):
        for row in rows:
            gains = (ours.forget.top1 - row.forget.top1, row.kept - ours.kept)
            if row.method is not Method.OURS and min(gains) >= 0 and max(gains) > 0:
                beating.append(row)
    return beating
