"""`search`: a step size for each layer of the fronts, and the best of them.

A search tries steps of moves, each one layer in one direction, by doubling and bisection.
What a step leaves to forget is measured on the CLIP here, and in `downstream.search` on a
model that is built on it. Sets that are measured on the same rows share one base pass.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, make_edit, write_edit
from slsgu_cli.checkpoints.weights import layer_digests
from slsgu_cli.clip.models import resolve
from slsgu_cli.method.scoring import best, left_to_forget, next_step
from slsgu_cli.method.search_plan import (
    SearchPlan,
    grouped,
    read_plan,
    read_plans,
)
from slsgu_cli.records.method import (
    Direction,
    EditHeader,
    GradientPointer,
    JointRef,
    LayerScore,
    Steer,
    Tower,
    Trial,
    Trials,
)
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.studies import JointMove
from slsgu_cli.records.targets import TargetTrial
from slsgu_cli.store.artifacts import Artifact, evaluation_blocks, resume
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from slsgu_cli.clip.evaluation import Evaluation, SharedEvaluation
    from slsgu_cli.method.trial import Probe

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T", Trial, TargetTrial)

# A layer, and the ridge that whitened its direction; None for the gradient.
Line = tuple[str, float | None]
# A step along a line.
Key = tuple[Line, float]

NO_BAR = float("-inf")


class Move(Protocol[T_co]):
    """One layer and the direction it moves in: each step along it can be measured."""

    @property
    def line(self) -> Line:
        """The layer and the ridge, which tell its trials from those of other moves."""

    @property
    def first(self) -> float:
        """The first step to try."""

    def measure(self, step: float) -> T_co:
        """Return the trial of a step: what it leaves to forget."""


def bisection(
    measure: Callable[[float], T], left: Callable[[T], float], first: float
) -> Iterator[T]:
    """Yield trials of doubled, then bisected steps (Algorithm 3), without end.

    `left` says what a trial leaves to forget.
    """
    tried: list[tuple[float, float]] = []
    while True:
        trial = measure(next_step(tried, first))
        yield trial
        tried.append((trial.step, left(trial)))


class StepSearch(Generic[T]):
    """The trials of a search by move and step, those on file before among them.

    `left` says what a trial leaves to forget. `path` has the steps that this search went
    through, in order: trials on file may be of others.
    """

    def __init__(self, trials: Mapping[Key, T], left: Callable[[T], float]) -> None:
        self.trials: dict[Key, T] = dict(trials)
        self.left: Callable[[T], float] = left
        self.path: list[Key] = []

    def trial(self, move: Move[T], step: float) -> T:
        """Return the trial of a step: the one on file, else measured now."""
        key = move.line, step
        if key not in self.trials:
            self.keep(key, move.measure(step))
        return self.trials[key]

    def keep(self, key: Key, trial: T) -> None:
        """Keep a trial that was measured now, in place of what was known of its step."""
        self.trials[key] = trial

    def bisect(self, move: Move[T], steps: int, first: float | None = None) -> None:
        """Try a number of steps along a move, from `first` (default: its own first step) on."""
        trials = bisection(partial(self.trial, move), self.left, first or move.first)
        with progress.bar(move.line[0], steps) as ticker:
            for trial in islice(trials, steps):
                self.path.append((move.line, trial.step))
                ticker.advance()


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Every trial, the chosen one, and whether it forgets completely."""

    trials: Trials
    chosen: Trial
    forgotten: bool
    reused: int


class SetSearch(StepSearch[Trial]):
    """The search of one set's layers on a CLIP, with its record in a file of a store."""

    def __init__(
        self, records: Store, kind: Artifact, plan: SearchPlan, evaluation: "Evaluation"
    ) -> None:
        from slsgu_cli.method.trial import UtilityMeter

        self._header = resume(records, kind, plan.name, fresh_trials(plan, evaluation))
        trials = {(line_of(trial), trial.step): trial for trial in self._header.trials}
        steer, margin = plan.options.steer, plan.options.margin
        super().__init__(trials, lambda trial: left_to_forget(trial, steer, margin))
        self.records, self.file, self.plan = records, kind.path(plan.name), plan
        self.probes: dict[Line, Probe] = {}
        self.reused = len(trials)
        self._meter = UtilityMeter(evaluation)

    @property
    def record(self) -> Trials:
        """The trials so far, as an artifact."""
        return replace(self._header, trials=tuple(self.trials.values()))

    def write(self) -> None:
        """Put the trials so far on file."""
        self.records.write_record(self.file, self.record)

    def run(self, probes: "Iterable[Probe]") -> SearchResult:
        """Search along every probe; write the trials, and the best one as an edit."""
        for probe in probes:
            self.probes[probe.line] = probe
            self.bisect(probe, self.plan.options.steps)
            self.write()
        chosen = self.choose()
        probe = self.probes[line_of(chosen)]
        write_edit(self.records, searched_edit(self.plan, probe, self.record, chosen))
        self.write()
        return SearchResult(self.record, chosen, self.left(chosen) == 0, self.reused)

    def choose(self) -> Trial:
        """Measure the utility of the steps that may win, and return the best (Algorithm 1)."""
        from slsgu_cli.method.trial import mean_top1

        full, bar = self.plan.options.full, NO_BAR
        least = min(self.left(self.trials[key]) for key in self.path)
        for key in sorted(dict.fromkeys(self.path), key=self._cost):
            trial = self.trials[key]
            may_win = self.left(trial) == least
            if may_win or full:
                probe = self.probes[key[0]]
                trial = self.with_utility(probe, trial, beat=NO_BAR if full else bar)
            if may_win and trial.utility is not None:
                bar = max(bar, mean_top1(trial.utility))
        path = [self.trials[key] for key in self.path]
        measured = [trial for trial in path if trial.utility is not None]
        figures = [(self.left(trial), mean_top1(trial.utility or {})) for trial in measured]
        return measured[best(figures)]

    def with_utility(self, probe: "Probe", trial: Trial, *, beat: float = NO_BAR) -> Trial:
        """Return a trial with its utility, measured now unless it was, or cannot reach `beat`."""
        if trial.utility is None:
            utility = self._meter.measure(probe, trial.step, beat=beat)
            trial = replace(trial, utility=utility)
            self.keep((probe.line, trial.step), trial)
        return trial

    def _cost(self, key: Key) -> tuple[bool, int, float]:
        """Order trials so that the cheap ones set the mark that dear ones must reach."""
        probe = self.probes[key[0]]
        return (probe.score.tower == "vision", -probe.stage, self.trials[key].share)


def line_of(move: Trial | JointMove) -> Line:
    """Return the layer and the ridge of a move."""
    return move.layer, move.ridge


def search(
    store: Store,
    name: str,
    *,
    options: SearchOptions = SearchOptions(),
    records: Store | None = None,
) -> SearchResult:
    """Search the front layers of set `name`, record the trials, write the edit.

    Trials are looked up and written in `records`, and so is the edit; default: the store.
    Raises MissingError, StaleError, InputError and UsageError.
    """
    from torch import no_grad

    from slsgu_cli.method.gradient_pass import arithmetic

    plan = read_plan(store, name, options=options)
    with no_grad(), arithmetic(plan.options.precision):
        evaluation = load_evaluation(store, plan)
        run = SetSearch(records or store, Artifact.TRIALS, plan, evaluation)
        return run.run(plan.probes(store, evaluation))


def search_each(
    store: Store, names: Sequence[str], *, options: SearchOptions
) -> Iterator[SearchResult]:
    """Search the sets one after another, those that can on one model and one base pass."""
    from torch import no_grad

    from slsgu_cli.method.gradient_pass import arithmetic

    for group in grouped(read_plans(store, names, options=options)):
        with no_grad(), arithmetic(options.precision):
            shared = share_evaluation(store, group)
        for plan in group:
            with no_grad(), arithmetic(options.precision):
                evaluation = shared.of(plan.manifest)
                run = SetSearch(store, Artifact.TRIALS, plan, evaluation)
                result = run.run(plan.probes(store, evaluation))
            yield result


def load_evaluation(store: Store, plan: SearchPlan) -> "Evaluation":
    """Load the model the gradients belong to and run it once over the evaluation data."""
    from slsgu_cli.clip.evaluation import prepare
    from slsgu_cli.clip.models import tokenizer
    from slsgu_cli.method.gradients import load_graded

    device = plan.options.device
    model, module = load_graded(plan.manifest, plan.pointer, device)
    evaluation = prepare(store, plan.manifest, module, tokenize=tokenizer(model), device=device)
    run_base_pass(evaluation, plan.layers, plan.options)
    return evaluation


def share_evaluation(store: Store, plans: Sequence[SearchPlan]) -> "SharedEvaluation":
    """Load the model of a group of plans and run it once over what all of them measure on."""
    from slsgu_cli.clip.evaluation import prepare_shared
    from slsgu_cli.clip.models import tokenizer
    from slsgu_cli.method.gradients import load_graded

    first = plans[0]
    device = first.options.device
    model, module = load_graded(first.manifest, first.pointer, device)
    manifests = [plan.manifest for plan in plans]
    shared = prepare_shared(store, manifests, module, tokenize=tokenizer(model), device=device)
    layers = [score for plan in plans for score in plan.layers]
    run_base_pass(shared, layers, first.options)
    return shared


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


def fresh_trials(plan: SearchPlan, evaluation: "Evaluation") -> Trials:
    """Return a record without trials, with what they will be made from."""
    manifest, pointer, options = plan.manifest, plan.pointer, plan.options
    return Trials(
        name=manifest.name,
        forget=pointer.forget,
        direction=options.direction or Direction.GRADIENT,
        retain_data=pointer.retain_data if options.direction is Direction.WHITENED else None,
        model_fingerprint=pointer.model_fingerprint,
        evals=evaluation_blocks(manifest),
        precision=options.precision,
        steer=options.steer,
        margin=options.margin if options.steer is Steer.MARGIN else None,
        baseline_forget=evaluation.forget.base_accuracy(),
        baseline_utility={n: g.base_accuracy() for n, g in evaluation.utility.items()},
        trials=(),
        version=slsgu_cli.__version__,
    )


def unmeasured_edit(
    manifest: SetManifest,
    pointer: GradientPointer,
    *,
    layer: str,
    tower: Tower,
    step: float,
    share: float,
    direction: Direction,
    ridge: float | None,
    retain_data: str | None,
    delta: "npt.NDArray[np.float32]",
    before: "npt.NDArray[np.floating]",
) -> Edit:
    """Return the edit that adds `delta` to a layer of a set's model, with no figures of it.

    `before` are the layer's values, `share` is the step's length over their norm.
    """
    header = EditHeader(
        name=manifest.name,
        concept=manifest.concept,
        layer=layer,
        tower=tower,
        step=step,
        share=share,
        model=pointer.model,
        model_fingerprint=pointer.model_fingerprint,
        digests=layer_digests(before),
        gradient=pointer.forget,
        direction=direction,
        ridge=ridge,
        retain_data=retain_data,
        steer=None,
        margin=None,
        forgotten=None,
        baseline_forget=None,
        baseline_utility=None,
        forget=None,
        utility=None,
        joint=None,
        version=slsgu_cli.__version__,
        layout=resolve(pointer.model).spelling,
    )
    return make_edit(header, delta=delta, before=before)


def searched_edit(
    plan: SearchPlan, probe: "Probe", trials: Trials, chosen: Trial, joint: JointRef | None = None
) -> Edit:
    """Return the edit that a chosen trial of a search amounts to."""
    edit = unmeasured_edit(
        plan.manifest,
        plan.pointer,
        layer=chosen.layer,
        tower=chosen.tower,
        step=chosen.step,
        share=chosen.share,
        direction=trials.direction,
        ridge=chosen.ridge,
        retain_data=trials.retain_data,
        delta=(chosen.step * probe.direction).cpu().numpy(),
        before=compact(probe.weight.cpu().numpy()),
    )
    measured = replace(
        edit.header,
        steer=trials.steer,
        margin=trials.margin,
        forgotten=left_to_forget(chosen, trials.steer, trials.margin) == 0,
        baseline_forget=trials.baseline_forget,
        baseline_utility=trials.baseline_utility,
        forget=chosen.forget,
        utility=chosen.utility,
        joint=joint,
    )
    return replace(edit, header=measured)


def compact(values: "npt.NDArray[np.float32]") -> "npt.NDArray[np.floating]":
    """Return values of a half-precision checkpoint in half precision, if that is exact."""
    half = values.astype("float16")
    return half if (half == values).all() else values
