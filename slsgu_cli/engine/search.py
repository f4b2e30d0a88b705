"""`search`: a step size for each layer of the fronts, and the best of them.

A search tries steps of layers along directions, finds the shortest step of each that forgets,
and chooses among these by utility. `targets.search` measures the residual of a step on a model
that is built on CLIP instead.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from shlex import quote
from time import perf_counter
from typing import Self

from torch import no_grad

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, by_layer, edit_digests, original_values, write_edit
from slsgu_cli.clip.devices import device_name
from slsgu_cli.clip.evaluation import Evaluation, SharedEvaluation
from slsgu_cli.clip.memory import return_memory
from slsgu_cli.engine.choice import residual
from slsgu_cli.engine.effect import EarlierConcepts, report
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.gradient_pass import arithmetic
from slsgu_cli.engine.layer_search import LayerSearch
from slsgu_cli.engine.search_plan import (
    SearchPlan,
    grouped,
    read_plan,
    read_plans,
    report_evaluation,
    share_evaluation,
)
from slsgu_cli.engine.step_edit import step_edit
from slsgu_cli.errors import NotForgottenError, SlsguError
from slsgu_cli.records.figures import PassTime, Report
from slsgu_cli.records.method import Criterion, JointRef, Trial, TrialKey, Trials
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.store.artifacts import Artifact, resume
from slsgu_cli.store.store import Store

# Trials are written at most so often, in seconds, and in multiples of the time of the last write.
WRITE_SECONDS, WRITE_TIMES = 1.0, 50


@dataclass(frozen=True, slots=True)
class SearchResult:
    """All trials on validation rows, the chosen one, and its effect on test rows."""

    trials: Trials
    chosen: Trial
    forgotten: bool
    reused: int
    report: Report


class SetSearch(LayerSearch):
    """The search of one set's layers, recorded in a file of a store.

    Used as a context: it writes new trials at the end, also after an interruption.
    """

    def __init__(
        self, records: Store, kind: Artifact, plan: SearchPlan, evaluation: Evaluation
    ) -> None:
        self._header = resume(records, kind, plan.name, _fresh_trials(plan, evaluation))
        super().__init__(self._header.trials, evaluation, plan.options)
        self.records, self.file, self.plan = records, kind.path(plan.name), plan
        self.reused = len(self.trials)
        self.took: PassTime | None = None
        self._next_write, self._unwritten = perf_counter() + WRITE_SECONDS, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with suppress(SlsguError) if error else nullcontext():
            if self._unwritten or not error:
                self.write()

    @property
    def record(self) -> Trials:
        """The trials so far; without a new one, the time of the earlier search remains."""
        took = self._header.took if len(self.trials) == self.reused else self.took
        return replace(self._header, trials=tuple(self.trials.values()), took=took)

    def write(self) -> None:
        """Write the trials so far."""
        start = perf_counter()
        self.records.write_record(self.file, self.record)
        now = perf_counter()
        self._next_write = now + max(WRITE_SECONDS, WRITE_TIMES * (now - start))
        self._unwritten = False

    def keep(self, key: TrialKey, trial: Trial) -> None:
        """Record a trial; a killed search loses those of the last seconds."""
        super().keep(key, trial)
        self._unwritten = True
        if perf_counter() >= self._next_write:
            self.write()


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
    plan = read_plan(store, name, options=options)
    (result,) = _search_plans(store, [plan], records or store)
    return result


def search_each(
    store: Store, names: Sequence[str], *, options: SearchOptions
) -> Iterator[SearchResult]:
    """Search the sets one after another, those that can on one model and one base pass."""
    for plans in grouped(read_plans(store, names, options=options)):
        yield from _search_plans(store, plans, store)


def _search_plans(
    store: Store, plans: Sequence[SearchPlan], records: Store
) -> Iterator[SearchResult]:
    """Search plans one after another on one base pass, whose time counts for each."""
    start = perf_counter()
    with no_grad(), arithmetic(plans[0].options.precision):
        shared = share_evaluation(store, plans)
    loading = perf_counter() - start
    opened = cache(partial(report_evaluation, store, plans, shared))

    def reported(layer: str) -> SharedEvaluation:
        # With one plan, its edit resumes from cached activations of the test rows.
        return opened((layer,)) if len(plans) == 1 else opened()

    for plan in plans:
        start = perf_counter() - loading
        with no_grad(), arithmetic(plan.options.precision):
            result = _search_set(store, plan, records, shared, reported, start)
        return_memory()
        yield result


def _search_set(
    store: Store,
    plan: SearchPlan,
    records: Store,
    shared: SharedEvaluation,
    reported: Callable[[str], SharedEvaluation],
    start: float,
) -> SearchResult:
    """Search one set; write the trials, and the best one as an edit."""
    evaluation = plan.measured(shared, resumed=True)
    with SetSearch(records, Artifact.TRIALS, plan, evaluation) as run:
        for evaluator in plan.evaluators(store, evaluation):
            run.along(evaluator)
        chosen = _choose(run, EarlierConcepts(shared, plan.earlier))
        forgotten, worst = run.residual(chosen) == 0, chosen.worst
        if forgotten and worst and worst.lost > plan.options.max_class_loss:
            progress.warn(
                f"no step with comparable utility spares every class: {worst.name} loses "
                f"{worst.lost:.0f} points, more than --max-class-loss "
                f"{plan.options.max_class_loss:g}"
            )
        evaluator = run.evaluators[chosen.move]
        opened = reported(evaluator.layer)
        earlier = EarlierConcepts(opened, plan.earlier) if plan.earlier else None
        effect = report(plan.measured(opened), [evaluator.change(chosen.step)], earlier)
        write_edit(records, searched_edit(plan, evaluator, run.record, chosen, effect))
        if not run.reused:
            run.took = PassTime(perf_counter() - start, device_name(plan.options.device))
    return SearchResult(run.record, chosen, forgotten, run.reused, effect)


def _choose(run: SetSearch, earlier: EarlierConcepts) -> Trial:
    """Return the best step that brings back no concept of earlier edits.

    Raises NotForgottenError if every step does.
    """
    back: set[str] = set()
    while len(run.refused) < len(set(run.path)):
        chosen = run.choose()
        change = run.evaluators[chosen.move].change(chosen.step)
        returned = earlier.returned(change) if earlier.edits else []
        if not returned:
            if back:
                progress.note(
                    f"of the best steps {len(run.refused)} would bring back "
                    f"{', '.join(sorted(back))} and were not chosen"
                )
            return chosen
        back.update(returned)
        run.refused.add((chosen.move, chosen.step))
    name = run.plan.name
    raise NotForgottenError(
        f"every step of {name} brings back what earlier edits forget",
        hint=f"search all of them together: `slsgu search ... {quote(name)} --joint`",
    )


def require_forgotten(result: SearchResult) -> None:
    """Raise NotForgottenError unless the chosen step meets the criterion."""
    if result.forgotten:
        return
    chosen, trials = result.chosen, result.trials
    margin = "" if trials.margin is None else f", and a gap of {chosen.gap:.3f}"
    raise NotForgottenError(
        f"no step forgets {trials.name}: the best, {chosen.layer} at {chosen.step:.4g}, leaves "
        f"FA@1 {chosen.forget.top1:.1f} and FA@5 {chosen.forget.top5:.1f} "
        f"of {trials.baseline_forget.top1:.1f} and {trials.baseline_forget.top5:.1f}{margin}",
        hint="the trials and this edit are saved; try --steps 20, or another --layer",
    )


def _fresh_trials(plan: SearchPlan, evaluation: Evaluation) -> Trials:
    """Return a record of the inputs of a search, without trials."""
    manifest, pointer, options = plan.manifest, plan.pointer, plan.options
    uses_retain = any(each.needs for each in plan.directions)
    return Trials(
        name=manifest.name,
        forget=pointer.forget,
        directions=tuple(each.kind for each in plan.directions),
        retain_data=pointer.retain_data if uses_retain else None,
        model_fingerprint=pointer.model_fingerprint,
        evals=manifest.evaluation_blocks(),
        precision=options.precision,
        criterion=options.criterion,
        margin=options.margin if options.criterion is Criterion.MARGIN else None,
        baseline_forget=evaluation.forget.base_accuracy(),
        baseline_utility={n: g.base_accuracy() for n, g in evaluation.utility.items()},
        trials=(),
        version=slsgu_cli.__version__,
        after=edit_digests(plan.earlier),
    )


def searched_edit(
    plan: SearchPlan,
    evaluator: Evaluator,
    trials: Trials,
    chosen: Trial,
    effect: Report,
    joint: JointRef | None = None,
) -> Edit:
    """Return the edit of a chosen trial, with its effect."""
    earlier = by_layer(plan.earlier).get(chosen.layer)
    return step_edit(
        plan.manifest,
        plan.pointer,
        chosen.layer,
        step=chosen.step,
        share=chosen.share,
        direction=chosen.direction,
        along=evaluator.along.cpu().numpy(),
        before=original_values(earlier) if earlier else evaluator.weight.cpu().numpy(),
        criterion=trials.criterion,
        margin=trials.margin,
        forgotten=residual(chosen.forget, chosen.gap, trials.criterion, trials.margin) == 0,
        baseline_forget=effect.before.forget,
        baseline_utility=effect.before.utility,
        forget=effect.after.forget,
        utility=effect.after.utility,
        joint=joint,
        harmed=effect.harmed,
        nearest=effect.nearest,
        words=effect.words,
        base_edits=effect.base_edits,
    )
