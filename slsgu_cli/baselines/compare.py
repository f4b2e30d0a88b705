"""What `slsgu compare` does: every method on every set, each at its settings, recorded as it ends.

A method at a setting that is recorded for the same data and plan is not run again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.baselines.dampening import ALPHA
from slsgu_cli.baselines.ours import original_outcome, our_outcome, standing_trials
from slsgu_cli.baselines.passes import PassTimes
from slsgu_cli.baselines.records import TRAINED, Comparison, Method, Outcome, Plan
from slsgu_cli.baselines.tuning import tune
from slsgu_cli.layout import comparison_path, pointer_path, read_manifest, read_pointer
from slsgu_cli.outcomes import measured_on
from slsgu_cli.recorded import recorded
from slsgu_cli.records import GradientPointer
from slsgu_cli.store import Store

if TYPE_CHECKING:
    from slsgu_cli.baselines.bench import Bench

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
        if store.exists(pointer_path(name)):
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
            evals=measured_on(manifest),
            passes={},
            outcomes=(),
            version=slsgu_cli.__version__,
        )
        ledger = cls(store, pointer, plan, times, fresh)
        ledger._read()
        times.known = {**ledger.comparison.passes, **times.known}
        return ledger

    @cached_property
    def bench(self) -> "Bench":
        """The loaded model and its data."""
        from slsgu_cli.baselines.bench import Bench

        return Bench.open(self.store, self.times.manifest, self.pointer, self.plan, self.times)

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
        self.store.write_record(comparison_path(self.comparison.name), self.comparison)
        return outcome

    def _read(self) -> None:
        """Take up the record in the store, if it was made from the same things."""
        path = comparison_path(self.comparison.name)
        unusable = "recorded outcomes cannot be used and are made again"
        found = recorded(self.store, path, Comparison, unusable=unusable)
        if found and _made_from(found) == _made_from(self.comparison):
            self.comparison = found


def _made_from(comparison: Comparison) -> tuple[object, ...]:
    return (
        comparison.model_fingerprint,
        comparison.forget,
        comparison.retain,
        comparison.evals,
    )
