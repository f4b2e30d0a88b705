"""`search`: a step size for each layer of the fronts, and the best of them.

A search tries steps of moves, each one layer in one direction, by doubling and bisection, or
where these would end by what steps lack.
What a step leaves to forget is measured on the CLIP here, and in `downstream.search` on a
model that is built on it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from shlex import quote
from time import perf_counter
from typing import TYPE_CHECKING

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, by_layer, original_values, write_edit
from slsgu_cli.clip.devices import device_name
from slsgu_cli.engine.choice import residual
from slsgu_cli.engine.layer_search import LayerSearch
from slsgu_cli.engine.layer_steps import LayerStep, unmeasured_edit
from slsgu_cli.engine.search_plan import (
    SearchPlan,
    grouped,
    read_plan,
    read_plans,
    report_evaluation,
    share_evaluation,
)
from slsgu_cli.engine.step_trials import Candidate
from slsgu_cli.errors import NotForgottenError, SlsguError
from slsgu_cli.records.figures import PassTime, Report
from slsgu_cli.records.method import (
    Criterion,
    JointRef,
    LayerScore,
    Trial,
    TrialKey,
    Trials,
)
from slsgu_cli.records.options import NO_BOUND, SearchOptions
from slsgu_cli.store.artifacts import Artifact, resume
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from slsgu_cli.clip.evaluation import Evaluation, SharedEvaluation
    from slsgu_cli.engine.effect import EarlierConcepts
    from slsgu_cli.engine.evaluator import Evaluator
    from slsgu_cli.engine.utility import Bar


# Seconds between two writes of the trials, and how often as long as the last one took: to write
# all of them takes as long as to try one.
WRITE_SECONDS, WRITE_TIMES = 1.0, 50


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Every trial, the chosen one, whether it forgets, and what it does to test images.

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
        """Return a trial with its utility, measured now unless it is known or below a bar."""
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
        from slsgu_cli.engine.effect import report

        for evaluator in evaluators:
            self.along(evaluator)
        chosen = self.choose_standing()
        if self.residual(chosen) == 0 and self.options.max_class_loss < NO_BOUND:
            warn_of_harm(chosen, self.options.max_class_loss)
        evaluator = self.evaluators[chosen.move]
        opened = reported(evaluator.score)
        earlier = self.plan.guard(opened) if self.plan.earlier else None
        effect = report(self.plan.measured(opened), [(evaluator, chosen.step)], earlier)
        write_edit(self.records, searched_edit(self.plan, evaluator, self.record, chosen, effect))
        if started is not None and not self.reused:
            self._took = PassTime(perf_counter() - started, device_name(self.options.device))
        self.write()
        return SearchResult(self.record, chosen, self.residual(chosen) == 0, self.reused, effect)


def warn_of_harm(chosen: Trial, bound: float) -> None:
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
        base_edits=effect.base_edits,
    )
    return replace(edit, header=measured)
