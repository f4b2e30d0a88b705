"""`search`: a step size for each layer of the fronts, and the best of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slsgu_cli import progress
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.method.scoring import best, first_step, left_to_forget, next_step
from slsgu_cli.method.search_plan import (
    SearchOptions,
    SearchPlan,
    fresh_trials,
    read_plan,
    recorded_trials,
    searched_edit,
)
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import LayerScore, Trial, Trials
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.store.artifacts import trials_path
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from slsgu_cli.clip.evaluation import Evaluation, SharedEvaluation
    from slsgu_cli.method.trial import Probe


# A trial's layer, the ridge that whitened its direction, and its step.
Key = tuple[str, float | None, float]


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Every trial, the chosen one, and whether it forgets completely."""

    trials: Trials
    chosen: Trial
    forgotten: bool
    reused: int


def search(
    store: Store,
    name: str,
    *,
    options: SearchOptions,
    evaluation: "Evaluation | None" = None,
    records: Store | None = None,
) -> SearchResult:
    """Search the front layers of set `name`, record the trials, write the edit.

    `evaluation` is the set's, after its base pass, where several sets share one. Trials
    are looked up and written in `records`, and so is the edit; default: the store.
    Raises MissingError, StaleError, InputError and UsageError.
    """
    from torch import no_grad

    from slsgu_cli.checkpoints.edits import write_edit
    from slsgu_cli.method.gradient_pass import arithmetic

    records = records or store
    case = read_plan(store, name, options=options)
    options = case.options
    with no_grad(), arithmetic(options.precision):
        evaluation = evaluation or load_evaluation(store, case)
        fresh = fresh_trials(case, evaluation)
        trials = recorded_trials(records, trials_path(name), fresh)
        recorded = len(trials.trials)
        run = _SearchRun(records, evaluation, trials, options)
        for probe in case.probes(store, evaluation):
            run.bisect(probe)
        chosen = run.choose()
        probe = run.probes[chosen.layer, chosen.ridge]
        write_edit(records, searched_edit(case, probe, run.trials, chosen))
    records.write_record(trials_path(name), run.trials)
    return SearchResult(run.trials, chosen, run.left(chosen) == 0, recorded)


class _SearchRun:
    """The state of one search: probes, trials by their keys, and the path taken."""

    def __init__(
        self, store: Store, evaluation: "Evaluation", trials: Trials, options: SearchOptions
    ) -> None:
        self.store = store
        self.evaluation = evaluation
        self.options = options
        self.probes: dict[tuple[str, float | None], Probe] = {}
        self.path: list[Key] = []
        self.found: dict[Key, Trial] = {(t.layer, t.ridge, t.step): t for t in trials.trials}
        self._header = trials

    @property
    def trials(self) -> Trials:
        """Return what was recorded so far, as an artifact."""
        return replace(self._header, trials=tuple(self.found.values()))

    def left(self, trial: Trial) -> float:
        """Return what a trial leaves to forget, by what the search steers on."""
        return left_to_forget(trial, self.options.steer, self.options.margin)

    def bisect(self, probe: "Probe") -> None:
        """Run Algorithm 3 along one direction of one layer, on what is left to forget alone."""
        layer, ridge = line = probe.score.layer, probe.ridge
        self.probes[line] = probe
        first = first_step(probe.score.weight_norm, probe.norm)
        tried: list[tuple[float, float]] = []
        with progress.bar(layer, self.options.steps) as ticker:
            for _ in range(self.options.steps):
                step = next_step(tried, first)
                trial = self.found.get((*line, step)) or probe.trial(step)
                self.found[layer, ridge, step] = trial
                tried.append((step, self.left(trial)))
                ticker.advance()
        self.path += [(layer, ridge, step) for step, _ in tried]
        self.store.write_record(trials_path(self._header.name), self.trials)

    def choose(self) -> Trial:
        """Measure the utility of the steps that may win, and return the best (Algorithm 1)."""
        from slsgu_cli.method.trial import UtilityMeter, mean_top1

        least = min(self.left(self.found[key]) for key in self.path)
        meter = UtilityMeter(self.evaluation)
        beat = float("-inf")
        for key in sorted(set(self.path), key=self._cost):
            trial = self.found[key]
            may_win = self.left(trial) == least
            if trial.utility is None and (may_win or self.options.full):
                bar = float("-inf") if self.options.full else beat
                probe = self.probes[trial.layer, trial.ridge]
                found = meter.measure(probe, trial.step, beat=bar)
                self.found[key] = trial = replace(trial, utility=found)
            if may_win and trial.utility is not None:
                beat = max(beat, mean_top1(trial.utility))
        measured = [key for key in self.path if self.found[key].utility is not None]
        figures = [
            (self.left(self.found[key]), mean_top1(self.found[key].utility or {}))
            for key in measured
        ]
        return self.found[measured[best(figures)]]

    def _cost(self, key: Key) -> tuple[bool, int, float]:
        """Order trials so that the cheap ones set the mark that dear ones must reach."""
        probe = self.probes[key[:2]]
        return (probe.score.tower == "vision", -probe.stage, self.found[key].share)


def load_evaluation(store: Store, case: SearchPlan) -> "Evaluation":
    """Load the model the gradients belong to and run it once over the evaluation data."""
    from slsgu_cli.clip.evaluation import prepare
    from slsgu_cli.clip.models import tokenizer
    from slsgu_cli.method.gradients import load_graded

    device = case.options.device
    model, module = load_graded(case.manifest, case.pointer, device)
    evaluation = prepare(store, case.manifest, module, tokenize=tokenizer(model), device=device)
    run_base_pass(evaluation, case.layers, case.options)
    return evaluation


def run_base_pass(
    evaluation: "Evaluation | SharedEvaluation",
    layers: Sequence[LayerScore],
    options: SearchOptions,
) -> None:
    """Run the original model once within the cache budget; tell of towers that are not split."""
    from slsgu_cli.clip.inputs import spare

    for tower in {score.tower for score in layers}:
        if not evaluation.tower(tower).exact_split:
            progress.detail(f"the {tower} tower is not split: every trial runs all of it")
    budget = options.cache_budget if options.cache_budget is not None else spare(options.device)
    evaluation.base_pass((s.layer for s in layers), cache_bytes=budget)


def evaluation_digest(manifest: SetManifest) -> str:
    """Return a digest of the evaluation rows of a set and of how they are taken in."""
    evals = {name: ref.fingerprint for name, ref in manifest.evals.items()}
    return digest([manifest.input, evals])


def require_alike(digests: Mapping[str, str]) -> None:
    """Raise InputError unless all sets have the same digest of what they are measured on."""
    first, *others = digests
    for name in others:
        if digests[name] != digests[first]:
            raise InputError(
                f"{first} and {name} are not measured on the same rows of the same model",
                hint="build both sets with the same --model, --eval, --classes and --templates",
            )


def require_distinct_names(names: Sequence[str]) -> None:
    """Raise UsageError where a set is named twice."""
    if len(set(names)) < len(names):
        raise UsageError("a set is named twice")


def read_plans(store: Store, names: Sequence[str], *, options: SearchOptions) -> list[SearchPlan]:
    """Return what to search of several sets. Raises what `read_case` does, and UsageError."""
    require_distinct_names(names)
    return [read_plan(store, name, options=options) for name in names]


def shares(case: SearchPlan) -> str:
    """Return a digest that is equal for cases which can share a model and a base pass."""
    return digest([case.pointer.model_fingerprint, evaluation_digest(case.manifest)])


def grouped(cases: Sequence[SearchPlan]) -> list[list[SearchPlan]]:
    """Return the cases in groups that can share a model and a base pass, in their order."""
    groups: dict[str, list[SearchPlan]] = {}
    for case in cases:
        groups.setdefault(shares(case), []).append(case)
    return list(groups.values())


def share_evaluation(store: Store, cases: Sequence[SearchPlan]) -> "SharedEvaluation":
    """Load the model of a group of cases and run it once over what all of them measure on."""
    from slsgu_cli.clip.evaluation import prepare_shared
    from slsgu_cli.clip.models import tokenizer
    from slsgu_cli.method.gradients import load_graded

    first = cases[0]
    device = first.options.device
    model, module = load_graded(first.manifest, first.pointer, device)
    manifests = [case.manifest for case in cases]
    shared = prepare_shared(store, manifests, module, tokenize=tokenizer(model), device=device)
    layers = [score for case in cases for score in case.layers]
    run_base_pass(shared, layers, first.options)
    return shared


def search_each(
    store: Store, names: Sequence[str], *, options: SearchOptions
) -> Iterator[SearchResult]:
    """Search the sets one after another, those that can on one model and one base pass."""
    from torch import no_grad

    from slsgu_cli.method.gradient_pass import arithmetic

    for group in grouped(read_plans(store, names, options=options)):
        with no_grad(), arithmetic(options.precision):
            shared = share_evaluation(store, group)
        for case in group:
            evaluation = shared.of(case.manifest)
            yield search(store, case.name, options=options, evaluation=evaluation)
