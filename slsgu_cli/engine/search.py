"""`search`: a step size for each layer of the fronts, and the best of them.

A search tries steps of moves, each one layer in one direction, by doubling and bisection, or
where these would end by what steps lack.
What a step leaves to forget is measured on the CLIP here, and in `downstream.search` on a
model that is built on it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from math import inf, isclose
from shlex import quote
from time import perf_counter
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import slsgu_cli
from slsgu_cli import processes, progress
from slsgu_cli.checkpoints.edits import Edit, by_layer, original_values, write_edit
from slsgu_cli.clip.devices import device_name
from slsgu_cli.engine.choice import residual, utility_of
from slsgu_cli.engine.layer_steps import LayerStep, unmeasured_edit
from slsgu_cli.engine.search_plan import (
    SearchPlan,
    grouped,
    read_plan,
    read_plans,
    report_evaluation,
    share_evaluation,
)
from slsgu_cli.engine.shortest_step import ShortestStep
from slsgu_cli.errors import NotForgottenError, SlsguError
from slsgu_cli.method.step_search import best, bisection
from slsgu_cli.records.figures import PassTime, Report
from slsgu_cli.records.method import (
    Criterion,
    JointRef,
    LayerScore,
    Move,
    Settled,
    Tower,
    Trial,
    TrialKey,
    Trials,
    UtilityMetric,
)
from slsgu_cli.records.options import NO_BOUND, SearchOptions
from slsgu_cli.records.targets import TargetTrial
from slsgu_cli.store.artifacts import Artifact, resume
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from slsgu_cli.clip.evaluation import Evaluation, SharedEvaluation
    from slsgu_cli.engine.trial import Bar, EarlierConcepts, Evaluator

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T", Trial, TargetTrial)

NOTHING_KEPT = float("-inf")

# With this chance in all, a step that keeps more than the tolerance beyond those that may win
# is taken for one that does not.
RISK = 0.01

# Seconds between two writes of the trials, and how often as long as the last one took: to write
# all of them takes as long as to try one.
WRITE_SECONDS, WRITE_TIMES = 1.0, 50

# Points of mean TA@1 that sparing a class may cost: its few rows say less than all of them.
PRICE_OF_SPARING = 0.25


class Candidate(Protocol[T_co]):
    """One layer and the direction it moves in: each step along it can be measured."""

    @property
    def move(self) -> Move:
        """The layer and the direction that it moves in."""

    @property
    def first(self) -> float:
        """The first step to try."""

    def measure(self, step: float) -> T_co:
        """Return the trial of a step: what it leaves to forget."""


class StepSearch(Generic[T]):
    """The trials of a search by move and step, those on file before among them.

    `left` says what a trial leaves to forget. `path` has the steps that this search went
    through, in order: trials on file may be of others.
    """

    def __init__(self, trials: Mapping[TrialKey, T], left: Callable[[T], float]) -> None:
        self.trials: dict[TrialKey, T] = dict(trials)
        self.left: Callable[[T], float] = left
        self.path: list[TrialKey] = []

    def trial(self, candidate: Candidate[T], step: float) -> T:
        """Return the trial of a step: the one on file, else measured now."""
        key = self.key(candidate.move, step)
        if key not in self.trials:
            self.keep(key, processes.agreed(candidate.measure(step)))
        return self.trials[key]

    def key(self, move: Move, step: float) -> TrialKey:
        """Return what a step's trial is found by: on file it may be of another machine's digits."""
        if (move, step) not in self.trials:
            known = (key for key in self.trials if key[0] == move)
            return next((key for key in known if isclose(key[1], step)), (move, step))
        return move, step

    def keep(self, key: TrialKey, trial: T) -> None:
        """Keep a trial that was measured now, in place of what was known of its step."""
        self.trials[key] = trial

    def bisect(
        self, candidate: Candidate[T], steps: int, first: float | None = None, *, close: float = 0.0
    ) -> None:
        """Try at most `steps` steps along a candidate, from `first` (default: its own) on.

        They end once the shortest that leaves nothing is known to a share `close` of it.
        """
        trials = bisection(partial(self.trial, candidate), self.left, first or candidate.first)
        with progress.bar(candidate.move[0], steps) as ticker:
            for trial in islice(trials, steps):
                self.path.append((candidate.move, trial.step))
                ticker.advance()
                if close and self.gap(candidate.move) <= close:
                    break

    def shortest(self, move: Move) -> float | None:
        """Return the shortest step of the path of a move that leaves nothing to forget."""
        return min(self._along(move, enough=True), default=None)

    def gap(self, move: Move) -> float:
        """Return what lies between the shortest step known to be enough and the next shorter one.

        As a share of the former; infinite where none is enough.
        """
        enough = self.shortest(move)
        if enough is None:
            return inf
        shorter = [step for step in self._along(move, enough=False) if step < enough]
        return 1 - max(shorter, default=0.0) / enough

    def _along(self, move: Move, *, enough: bool) -> list[float]:
        steps = [key for key in self.path if key[0] == move]
        return [key[1] for key in steps if (self.left(self.trials[key]) == 0) is enough]


class LayerSearch(StepSearch[Trial]):
    """The search of some layers on a CLIP, and the choice among all steps that were tried."""

    def __init__(
        self, trials: Iterable[Trial], evaluation: "Evaluation", options: SearchOptions
    ) -> None:
        from slsgu_cli.engine.trial import UtilityMeter

        criterion, margin = options.criterion, options.margin
        known = {(trial.move, trial.step): trial for trial in trials}
        super().__init__(known, lambda trial: residual(trial, criterion, margin))
        self.options = options
        self.evaluators: dict[Move, Evaluator] = {}
        self.lengthened: list[TrialKey] = []
        # Steps that bring back what earlier edits forget.
        self.refused: set[TrialKey] = set()
        self._meter = UtilityMeter(evaluation, options.utility)
        self._base_gap = evaluation.base_gap()

    def along(self, evaluator: "Evaluator", first: float | None = None) -> None:
        """Try steps along an evaluator, from `first` (default: its own first step) on."""
        self.evaluators[evaluator.move] = evaluator
        # How much is wanting is on record of the fifth place, and of no other.
        if self.options.exact or self.options.criterion is Criterion.FA1:
            self.bisect(evaluator, self.options.steps, first)
        else:
            self.approach(evaluator, self.options.steps, first)
        self.lengthen(evaluator)

    def approach(self, evaluator: "Evaluator", steps: int, first: float | None = None) -> None:
        """Try steps along a move until the shortest one that bisection finds is known."""
        wanted = self.options.margin if self.options.criterion is Criterion.MARGIN else 0.0
        sought = ShortestStep(first or evaluator.first, steps, self._base_gap - wanted)
        with progress.bar(evaluator.move[0], steps) as ticker:
            while (step := sought.next()) is not None:
                trial = self.trial(evaluator, step)
                self.path.append((evaluator.move, trial.step))
                sought.observe(trial.gap - wanted, enough=self.left(trial) == 0)
                ticker.advance()

    def lengthen(self, evaluator: "Evaluator") -> None:
        """Go on from the shortest step of a move that forgets by the overshoot."""
        enough = self.shortest(evaluator.move)
        if enough is not None and self.options.overshoot > 1:
            key = evaluator.move, self.trial(evaluator, self.options.overshoot * enough).step
            self.path.append(key)
            self.lengthened.append(key)

    def choose(self) -> Trial:
        """Measure the utility of the steps that may win, and return the best (Algorithm 1).

        With an overshoot, of each move that forgets its lengthened step may win. A step within
        the bound of what any class may lose wins over the best one that is not, if it keeps
        nearly as much.
        """
        path = [key for key in self.path if key not in self.refused]
        price = PRICE_OF_SPARING if self.options.max_class_loss < NO_BOUND else 0.0
        fewest = min(self.left(self.trials[key]) for key in path)
        may_win = {key for key in path if self.left(self.trials[key]) == fewest}
        if fewest == 0:
            may_win = may_win.intersection(self.lengthened) or may_win
        best_kept = self._measure(path, may_win, price)
        measured = {
            key: trial
            for key in path
            if key in may_win and (trial := self.trials[key]).utility is not None
        }
        keeps = {key: utility_of(trial, self.options.utility) for key, trial in measured.items()}
        figures = [
            (not (self._spares(trial) and keeps[key] >= best_kept - price), keeps[key])
            for key, trial in measured.items()
        ]
        return list(measured.values())[best(figures)]

    def _measure(self, path: Sequence[TrialKey], may_win: set[TrialKey], price: float) -> float:
        """Measure the utility of steps, those that may win against the best so far.

        Returns the most that any of these keeps. A step may keep `price` less and win all the
        same, but not less than one that spares every class. A step that keeps clearly more than
        the rival is always measured, but for the risk, and is the next one: rivals do not depend
        on which others were left.
        """
        from slsgu_cli.engine.trial import TOLERANCE, Bar

        full, best_kept = self.options.full, NOTHING_KEPT
        sparing, least = NOTHING_KEPT, NOTHING_KEPT
        raced = [key for key in may_win if self.evaluators[key[0]].score.tower is Tower.VISION]
        risk = RISK / len(raced) if raced and not self.options.exact else 0.0
        # Before there is a rival, it is a step of a text layer that keeps so much.
        rival, rival_keeps = None, NOTHING_KEPT
        for key in sorted(dict.fromkeys(path), key=self._cost):
            trial = self.trials[key]
            if self.options.utility is UtilityMetric.EXPECTED and trial.expected is None:
                trial = replace(trial, utility=None)  # Recorded when only TA@1 was.
            if key in may_win or full:
                beat = max(best_kept - price, sparing)
                if risk:
                    beat = min(beat, rival_keeps)
                if key in raced and least == NOTHING_KEPT:
                    least = beat
                bar = Bar(beat, least, risk if key in raced else 0.0, rival)
                trial = self.with_utility(self.evaluators[key[0]], trial, None if full else bar)
            if key in may_win and trial.utility is not None:
                keeps = utility_of(trial, self.options.utility)
                best_kept = max(best_kept, keeps)
                if keeps > rival_keeps + TOLERANCE:
                    rival = (self.evaluators[key[0]], trial.step) if key in raced else None
                    rival_keeps = keeps
                sparing = max(sparing, keeps) if self._spares(trial) else sparing
        return best_kept

    def _spares(self, trial: Trial) -> bool:
        """Return whether no class is known to lose more than it may."""
        return trial.worst is None or trial.worst.lost <= self.options.max_class_loss

    def with_utility(self, evaluator: "Evaluator", trial: Trial, bar: "Bar | None" = None) -> Trial:
        """Return a trial with its utility, measured now unless it was, or is below a bar."""
        if trial.utility is None:
            found = processes.agreed(self._meter.measure(evaluator, trial.step, bar=bar))
            if isinstance(found, Settled):
                trial = replace(trial, worst=None, expected=None, settled=found)
            else:
                trial = replace(
                    trial,
                    utility=found.utility,
                    worst=found.worst,
                    expected=found.expected,
                    moved=found.moved,
                    settled=Settled.MEASURED,
                )
            self.keep((evaluator.move, trial.step), trial)
        return trial

    def _cost(self, key: TrialKey) -> tuple[bool, int, float]:
        """Order trials so that the cheap ones set the mark that dear ones must reach."""
        evaluator = self.evaluators[key[0]]
        return (evaluator.score.tower == "vision", -evaluator.stage, self.trials[key].share)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Every trial, the chosen one, whether it forgets, and what it does to unseen images.

    Trials are measured on the images to choose by.
    """

    trials: Trials
    chosen: Trial
    forgotten: bool
    reused: int
    report: Report


class SetSearch(LayerSearch):
    """The search of one set's layers, with its record in a file of a store."""

    def __init__(
        self,
        records: Store,
        kind: Artifact,
        plan: SearchPlan,
        evaluation: "Evaluation",
        earlier: "EarlierConcepts | None" = None,
    ) -> None:
        self._header = resume(records, kind, plan.name, fresh_trials(plan, evaluation))
        super().__init__(self._header.trials, evaluation, plan.options)
        self.records, self.file, self.plan = records, kind.path(plan.name), plan
        self.earlier = earlier
        self.reused = len(self.trials)
        self._took: PassTime | None = None
        self._next_write, self._on_file = perf_counter() + WRITE_SECONDS, True

    @property
    def record(self) -> Trials:
        """The trials so far, as an artifact; the time of an earlier search stands for its own."""
        took = self._header.took if len(self.trials) == self.reused else self._took
        return replace(self._header, trials=tuple(self.trials.values()), took=took)

    def write(self) -> None:
        """Put the trials so far on file."""
        began = perf_counter()
        self.records.write_record(self.file, self.record)
        now = perf_counter()
        self._next_write = now + max(WRITE_SECONDS, WRITE_TIMES * (now - began))
        self._on_file = True

    def keep(self, key: TrialKey, trial: Trial) -> None:
        """Keep a trial; a killed search loses those of seconds, an interrupted one none."""
        super().keep(key, trial)
        self._on_file = False
        if perf_counter() >= self._next_write:
            self.write()

    def trial(self, candidate: Candidate[Trial], step: float) -> Trial:
        """Return the trial of a step: the one on file, else measured now."""
        with self._kept():
            return super().trial(candidate, step)

    def with_utility(self, evaluator: "Evaluator", trial: Trial, bar: "Bar | None" = None) -> Trial:
        """Return a trial with its utility, measured now unless it was, or is below a bar."""
        with self._kept():
            return super().with_utility(evaluator, trial, bar)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Put the trials on file that are not, where a block is left by an exception."""
        try:
            yield
        except BaseException:
            if not self._on_file:
                with suppress(SlsguError):
                    self.write()
            raise

    def choose_standing(self) -> Trial:
        """Return the best step that brings back nothing of what earlier edits forget.

        Only steps that win are looked at. Raises NotForgottenError where none is left.
        """
        if self.earlier is None:
            return self.choose()
        back: set[str] = set()
        while len(self.refused) < len(set(self.path)):
            chosen = self.choose()
            move = chosen.move
            returned = self.earlier.returned([(self.evaluators[move], chosen.step)])
            if not returned:
                if back:
                    progress.note(
                        f"of the best steps {len(self.refused)} would bring back "
                        f"{', '.join(sorted(back))} and were not chosen"
                    )
                return chosen
            back.update(returned)
            self.refused.add((move, chosen.step))
        raise NotForgottenError(
            f"every step of {self.plan.name} brings back what earlier edits forget",
            hint=f"search all of them together: `slsgu search ... {quote(self.plan.name)} --joint`",
        )

    def run(
        self,
        evaluators: "Iterable[Evaluator]",
        reported: "Callable[[LayerScore], SharedEvaluation]",
        started: float | None = None,
    ) -> SearchResult:
        """Search along every evaluator; write the trials, and the best one as an edit.

        `reported` opens the rows that an edit of a layer is reported on, once it is chosen.
        `started` is when the search began, by `perf_counter`, if all that it took is to be on
        record.
        """
        with self._kept():
            return self._run(evaluators, reported, started)

    def _run(
        self,
        evaluators: "Iterable[Evaluator]",
        reported: "Callable[[LayerScore], SharedEvaluation]",
        started: float | None,
    ) -> SearchResult:
        from slsgu_cli.engine.trial import report

        for evaluator in evaluators:
            self.along(evaluator)
        chosen = self.choose_standing()
        if self.left(chosen) == 0 and self.options.max_class_loss < NO_BOUND:
            tell_of_harm(chosen, self.options.max_class_loss)
        evaluator = self.evaluators[chosen.move]
        opened = reported(evaluator.score)
        earlier = self.plan.guard(opened) if self.plan.earlier else None
        effect = report(self.plan.measured(opened), [(evaluator, chosen.step)], earlier)
        write_edit(self.records, searched_edit(self.plan, evaluator, self.record, chosen, effect))
        if started is not None and not self.reused:
            self._took = PassTime(perf_counter() - started, device_name(self.options.device))
        self.write()
        return SearchResult(self.record, chosen, self.left(chosen) == 0, self.reused, effect)


def tell_of_harm(chosen: Trial, bound: float) -> None:
    """Warn where every step that forgets takes more from a class than it may lose."""
    if chosen.worst is not None and chosen.worst.lost > bound:
        progress.warn(
            f"no step that keeps as much spares every class: {chosen.worst.name} loses "
            f"{chosen.worst.lost:.0f} points, more than --max-class-loss {bound:g}"
        )


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

    from slsgu_cli.engine.gradient_pass import arithmetic

    started = perf_counter()
    plan = read_plan(store, name, options=options)
    with no_grad(), arithmetic(plan.options.precision):
        shared = share_evaluation(store, [plan])
        reported = _reporting(store, [plan], shared)
        return _searched(store, records or store, plan, shared, reported, started)


def search_each(
    store: Store, names: Sequence[str], *, options: SearchOptions
) -> Iterator[SearchResult]:
    """Search the sets one after another, those that can on one model and one base pass."""
    from torch import no_grad

    from slsgu_cli.clip.memory import return_memory
    from slsgu_cli.engine.gradient_pass import arithmetic

    for group in grouped(read_plans(store, names, options=options)):
        began = perf_counter()
        with no_grad(), arithmetic(options.precision):
            shared = share_evaluation(store, group)
        loading = perf_counter() - began
        reported = _reporting(store, group, shared)
        for plan in group:
            started = perf_counter() - loading
            with no_grad(), arithmetic(options.precision):
                result = _searched(store, store, plan, shared, reported, started)
            return_memory()
            yield result


def _reporting(
    store: Store, plans: Sequence[SearchPlan], shared: "SharedEvaluation"
) -> "Callable[[LayerScore], SharedEvaluation]":
    """Return what opens the rows to report the edit of a layer on: once, of several plans."""
    if len(plans) == 1:
        return lambda score: report_evaluation(store, plans, shared, [score])
    opened = cache(partial(report_evaluation, store, plans, shared))
    return lambda _: opened()


def _searched(
    store: Store,
    records: Store,
    plan: SearchPlan,
    shared: "SharedEvaluation",
    reported: "Callable[[LayerScore], SharedEvaluation]",
    started: float,
) -> SearchResult:
    """Search one plan on a base pass that others may share."""
    evaluation = plan.measured(shared, resumed=True)
    earlier = plan.guard(shared) if plan.earlier else None
    run = SetSearch(records, Artifact.TRIALS, plan, evaluation, earlier)
    return run.run(plan.evaluators(store, evaluation), reported, started)


def fresh_trials(plan: SearchPlan, evaluation: "Evaluation") -> Trials:
    """Return a record without trials, with what they will be made from."""
    manifest, pointer, options = plan.manifest, plan.pointer, plan.options
    return Trials(
        name=manifest.name,
        forget=pointer.forget,
        directions=tuple(each.kind for each in plan.directions),
        retain_data=pointer.retain_data
        if any(each.needs_inputs for each in plan.directions)
        else None,
        model_fingerprint=pointer.model_fingerprint,
        evals=manifest.evaluation_blocks(),
        precision=options.precision,
        criterion=options.criterion,
        margin=options.margin if options.criterion is Criterion.MARGIN else None,
        baseline_forget=evaluation.forget.base_accuracy(),
        baseline_utility={n: g.base_accuracy() for n, g in evaluation.utility.items()},
        trials=(),
        version=slsgu_cli.__version__,
        after=plan.after,
    )


def searched_edit(
    plan: SearchPlan,
    evaluator: "Evaluator",
    trials: Trials,
    chosen: Trial,
    effect: Report,
    joint: JointRef | None = None,
) -> Edit:
    """Return the edit that a chosen trial of a search amounts to, with what it does."""
    step = LayerStep.of(
        chosen, direction=chosen.direction, along=evaluator.along, weight=evaluator.weight
    )
    if below := by_layer(plan.earlier).get(chosen.layer):
        step = replace(step, before=original_values(below))
    edit = unmeasured_edit(plan.manifest, plan.pointer, step)
    measured = replace(
        edit.header,
        criterion=trials.criterion,
        margin=trials.margin,
        forgotten=residual(chosen, trials.criterion, trials.margin) == 0,
        baseline_forget=effect.before.forget,
        baseline_utility=effect.before.utility,
        forget=effect.after.forget,
        utility=effect.after.utility,
        joint=joint,
        harmed=effect.harmed,
        nearest=effect.nearest,
        ground=effect.ground,
    )
    return replace(edit, header=measured)
