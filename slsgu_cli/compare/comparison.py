"""`compare`: every method on every set, recorded as it ends and never run twice; the table of it.

Nothing here loads PyTorch before a method is run: reports and tables read what is on record.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, ClassVar, Generic

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.compare.ours import OurEdit, PassTimes, original_outcome
from slsgu_cli.engine.choice import mean_top1
from slsgu_cli.errors import NotFiniteError, UsageError
from slsgu_cli.records.figures import Accuracy, Figures
from slsgu_cli.records.method import GradientPointer
from slsgu_cli.records.studies import (
    CLIP_METHODS,
    CLOSED_FORMS,
    TRAINED,
    ClipComparison,
    ClipOutcome,
    ClipPlan,
    CompareOptions,
    Comparison,
    Method,
    MethodSetting,
    Row,
)
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer, resume
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from slsgu_cli.compare.closed_forms import ClosedForms
    from slsgu_cli.compare.methods import BaselineRunner

# What tables call a method: those without a name here by their acronyms.
LABELS = {method: method.upper() for method in Method} | {
    Method.ORIGINAL: "Original",
    Method.SALUN: "SalUn",
    Method.ALPHAEDIT: "AlphaEdit",
    Method.LEACE_TEXT: "LEACE text",
    Method.LEACE_VISION: "LEACE image",
    Method.CCUP_TEXT: "CCUP text",
    Method.CCUP_VISION: "CCUP image",
    Method.OURS: "Ours",
    Method.ESD: "ESD-x",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """The one number of a method that is not trained: its name, usual value, values to try."""

    name: str
    usual: float
    tried: tuple[float, ...]


_RIDGE = Parameter("damping", 0.01, (0.001, 0.01, 0.1, 1.0))
_SHARE = Parameter("alpha", 1.0, (0.5, 0.9, 1.0))
PARAMETERS = {
    Method.SSD: Parameter("alpha", 10.0, (1.0, 10.0, 100.0, 1000.0)),
    Method.ROME: _RIDGE,
    Method.MEMIT: Parameter("lambda", 10.0, (0.1, 1.0, 10.0, 100.0)),
    Method.UCE: Parameter("preserve", 1.0, (0.1, 1.0, 10.0, 100.0)),
    Method.ALPHAEDIT: Parameter("below", 0.1, (0.01, 0.1, 1.0)),
    Method.LEACE_TEXT: _RIDGE,
    Method.LEACE_VISION: _RIDGE,
    Method.CCUP_TEXT: _SHARE,
    Method.CCUP_VISION: _SHARE,
}
# The learning rates that are tried first.
DECADES = (1e-6, 1e-5, 1e-4)


@dataclass(frozen=True, slots=True)
class Compared:
    """The rows of each concept in the order of Table 1.

    `chosen` has the setting found best for each baseline, None where they were given.
    """

    concepts: dict[str, tuple[ClipOutcome, ...]]
    chosen: dict[Method, float] | None


def compare(store: Store, names: Sequence[str], *, options: CompareOptions) -> Compared:
    """Run every method on every set `names`; settings are tuned on the first of them.

    Raises MissingError, InputError and StaleError.
    """
    settings: dict[Method, Sequence[float | None]] = {
        Method.OURS: (None,),  # first: its search measures the original model too
        Method.ORIGINAL: (None,),
        **dict.fromkeys(TRAINED, options.rates or ()),
        **{method: (parameter.usual,) for method, parameter in PARAMETERS.items()},
    }
    settings = {method: settings[method] for method in settings if method in options.methods}
    concepts: dict[str, tuple[ClipOutcome, ...]] = {}
    chosen: dict[Method, float] = {}
    for name in dict.fromkeys(names):
        run = ClipComparisonRun.open(store, name, options)
        rows = []
        for method, given in settings.items():
            if method in CLOSED_FORMS and method not in run.layers:
                progress.note(f"{LABELS[method]} is left out: the model has no layer for it")
            elif options.rates is not None or method in (Method.ORIGINAL, Method.OURS):
                rows += [run.row(method, setting) for setting in given]
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
    """One comparison's record: a row that is on it stands, one that is not is run and added."""

    store: Store
    name: str
    record: Comparison[Row]
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

    def row(self, method: Method, setting: float | None = None) -> Row:
        """Return a method's row at a setting, as recorded or else run now."""
        known = self.record.row_made_by(self.at(method, setting))
        if known is not None:
            return known
        row = self.run(method, setting)
        # Another process may have recorded rows meanwhile.
        with progress.silent():
            self.record = resume(self.store, self.artifact, self.name, self.record)
        self.record = self.with_row(row)
        self.store.write_record(self.artifact.path(self.name), self.record)
        return row

    def with_row(self, row: Row) -> Comparison[Row]:
        """Return the record with a row that was run now."""
        return self.record.with_row(row)


@dataclass
class ClipComparisonRun(ComparisonRun[ClipOutcome]):
    """The comparison on one set; the model is loaded for what is not on record."""

    record: ClipComparison
    pointer: GradientPointer
    plan: ClipPlan
    layer: str | None

    artifact = Artifact.COMPARISON

    @classmethod
    def open(cls, store: Store, name: str, options: CompareOptions) -> "ClipComparisonRun":
        """Read what is on record of a set. Raises MissingError and StaleError."""
        manifest = read_manifest(store, name)
        store.require_writable(cls.artifact.path(name))
        times = PassTimes(store, manifest, options.device)
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
        times.remember(run.record.passes)
        return run

    @cached_property
    def baselines(self) -> "BaselineRunner":
        """The loaded model and its data."""
        from slsgu_cli.compare.methods import BaselineRunner

        return BaselineRunner.open(self.pointer, self.plan, self.times)

    @cached_property
    def closed_forms(self) -> "ClosedForms":
        """The closed forms on the loaded model."""
        from slsgu_cli.compare.closed_forms import ClosedForms

        return ClosedForms(self.baselines, self.layers)

    @cached_property
    def layers(self) -> dict[Method, str]:
        """What each closed form edits of the model; those that find no layer are not there."""
        from slsgu_cli.compare.closed_forms import layer_for

        layers = {m: layer_for(m, self.store, self.pointer, self.layer) for m in CLOSED_FORMS}
        return {method: layer for method, layer in layers.items() if layer is not None}

    @cached_property
    def our_edit(self) -> OurEdit:
        """The set's edit, searched for if there is none."""
        return OurEdit.find(self.pointer, self.times)

    def at(self, method: Method, setting: float | None) -> MethodSetting:
        """Return a method's setting, with its plan or layer; of ours, the edit."""
        if method in CLOSED_FORMS:
            return MethodSetting(method, setting, layer=self.layers[method])
        if method is Method.OURS:
            return MethodSetting(method, edit=self.our_edit.words)
        if method is Method.ORIGINAL:
            return MethodSetting(method)
        return MethodSetting(method, setting, self.plan.of(method))

    def run(self, method: Method, setting: float | None) -> ClipOutcome:
        """Run a baseline, or tell of the original model and our edit what the search measured."""
        if method is Method.OURS:
            return self.our_edit.outcome(self.pointer, self.times)
        if method in CLOSED_FORMS:
            return self.closed_forms.run(method, setting or 0.0)
        if setting is not None:
            return self.baselines.run(method, setting)
        edit = OurEdit.standing(self.pointer, self.times)
        return original_outcome(edit.before if edit else self.baselines.original())

    def with_row(self, row: ClipOutcome) -> ClipComparison:
        """Return the record with a row that was run now, and with the times measured for it."""
        passes = dict(sorted({**self.record.passes, **self.times.known}.items()))
        return replace(self.record.with_row(row), passes=passes)


def tune(
    method: Method, run: Callable[[float], ClipOutcome]
) -> tuple[ClipOutcome, list[ClipOutcome]]:
    """Return a method's best outcome and all that were tried for it.

    Learning rates: three decades, then half a decade to either side of the best of them.
    """
    if method in PARAMETERS:
        tried = [run(value) for value in PARAMETERS[method].tried]
        return best(tried), tried
    tried = list(_finite(DECADES, run))
    middle = best(tried).setting or 0.0
    between = (middle / 10**0.5, middle * 10**0.5)
    tried += _finite([float(f"{rate:.0e}") for rate in between], run)
    return best(tried), sorted(tried, key=lambda o: o.setting or 0.0)


def _finite(rates: Sequence[float], run: Callable[[float], ClipOutcome]) -> Iterator[ClipOutcome]:
    """Yield the outcome of each learning rate at which training stays finite.

    The least of the decades must.
    """
    for rate in rates:
        try:
            yield run(rate)
        except NotFiniteError as error:
            if rate == DECADES[0]:
                raise
            progress.warn(f"left out: {error.message}")


def best(outcomes: list[ClipOutcome]) -> ClipOutcome:
    """Return the outcome of the best trade-off; of equals the one with the least setting."""
    return min(outcomes, key=lambda o: (-trade_off(o), o.setting or 0.0))


def trade_off(outcome: ClipOutcome) -> float:
    """Return the mean of what is forgotten (100 - FA@1) and what is kept (mean TA@1).

    On the rows to choose by.
    """
    by = outcome.chosen_by or Figures(outcome.forget, outcome.utility)
    return (100 - by.forget.top1 + mean_top1(by.utility)) / 2


@dataclass(frozen=True, slots=True)
class TableRow:
    """A method at one setting: its mean figures over `concepts`."""

    method: Method
    setting: float | None
    layer: str | None
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
        return mean_top1(self.utility)

    @property
    def words(self) -> str:
        """The setting as a person reads it."""
        if self.setting is None:
            return ""
        parameter = PARAMETERS.get(self.method)
        return f"{parameter.name if parameter else 'lr'} {self.setting:g}"


def mean_rows(
    concepts: dict[str, tuple[ClipOutcome, ...]], chosen: dict[Method, float] | None
) -> list[TableRow]:
    """Return a row for each method and setting that every concept has, in their order.

    Raises UsageError where the concepts have no evaluation set in common.
    """
    by_key = [{(o.method, o.setting, o.layer): o for o in each} for each in concepts.values()]
    sets = set.intersection(*(set(o.utility) for each in by_key for o in each.values()))
    if not sets:
        raise UsageError(
            f"{', '.join(concepts)} have no evaluation set in common",
            hint="build them with the same --eval names",
        )
    rows = []
    for key in by_key[0]:
        outcomes = [each[key] for each in by_key if key in each]
        if len(outcomes) == len(by_key):
            marked = chosen is not None and key[1] is not None and chosen.get(key[0]) == key[1]
            rows.append(_row(outcomes, sorted(sets), chosen=marked))
    return rows


def _row(outcomes: Sequence[ClipOutcome], sets: Sequence[str], *, chosen: bool) -> TableRow:
    def mean(value: Callable[[ClipOutcome], float]) -> float:
        return sum(map(value, outcomes)) / len(outcomes)

    first = outcomes[0]
    return TableRow(
        method=first.method,
        setting=first.setting,
        layer=first.layer,
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
