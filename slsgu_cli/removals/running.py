"""Running a job: the stages that have to run, one after another, with a ledger of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import slsgu_cli as slsgu
from slsgu_cli import Store, progress
from slsgu_cli.errors import AssertionsError, NotForgottenError
from slsgu_cli.records.figures import PassTime
from slsgu_cli.records.ledger import Ledger, LedgerRow, RequestState, StageKind, StageRecord
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.removals import planning
from slsgu_cli.removals.job import Job
from slsgu_cli.removals.recipe import Outputs, Recipe, RemovalRequest, Together
from slsgu_cli.removals.stage import FileStage, Stage
from slsgu_cli.removals.stages import TYPES, output_digest
from slsgu_cli.text import listed


@dataclass(frozen=True, slots=True)
class RunEvent:
    """The start or end of a stage, or the end of the run."""

    event: str
    stage: str | None
    requests: tuple[str, ...]
    place: str | None = None
    why: str | None = None
    seconds: float | None = None
    left: float | None = None


@dataclass(frozen=True, slots=True)
class RunResult:
    """The ledger of a recipe after a run, and the stages that ran."""

    recipe: Recipe
    ledger: Ledger
    done: tuple[Stage, ...]

    @property
    def rows(self) -> list[LedgerRow]:
        """The ledger's rows of current requests."""
        return [row for row in self.ledger.rows if row.state is not RequestState.WITHDRAWN]

    @property
    def figures(self) -> dict[str, float]:
        """The figures of the last evaluation, such as `fa1.NAME` and `loss.SET`."""
        return self.ledger.written.figures if self.ledger.written else {}

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint without the requested concepts."""
        return self.recipe.outputs.checkpoint


def forget(
    *,
    model: str | ModelSpec,
    concept: str,
    source: str | Sequence[str],
    evaluation: dict[str, str],
    out: str | Path,
    store: Store | str = "slsgu-store",
    **options: Any,
) -> RunResult:
    """Make a model forget a concept, from its data to the checkpoint at `out`.

    `evaluation` maps names to sources of labelled images; `options` are fields of
    `BuildRequest`, such as `templates`. Raises what the commands raise, and NotForgottenError.
    """
    sources = (source,) if isinstance(source, str) else tuple(source)
    recipe = Recipe(
        name=concept,
        model=ModelSpec(model) if isinstance(model, str) else model,
        sets=BuildRequest(sources=sources, evals=evaluation, **options),
        requests=(RemovalRequest(name=concept),),
        outputs=Outputs(checkpoint=Path(out)),
    )
    result = run(recipe, store=store)
    require_met(result)
    return result


def run(
    recipe: Recipe | str | Path,
    *,
    store: Store | str = "slsgu-store",
    on_event: Callable[[RunEvent], None] = lambda event: None,
) -> RunResult:
    """Run the stages of a recipe, or of a recipe file, that are not done yet.

    Raises InputError before the first stage if one of them cannot succeed, and what the
    commands raise.
    """
    job = Job(recipe, store)
    with slsgu.held(job.store, job.path, what=f"the run of {job.recipe.name}"):
        job.load()
        planned = planning.plan(job)
        planning.require_all_possible(job, planned)
        _drop_obsolete(job)
        job.enter()
        done = _run_all(job, [each for each in planned if each.reason], on_event)
        job.settle()
    on_event(RunEvent("finished", None, job.recipe.names))
    return RunResult(job.recipe, job.ledger, tuple(done))


def require_met(result: RunResult) -> None:
    """Raise AssertionsError or NotForgottenError unless every request is within its bounds."""
    failed = [
        f"{check.bound} of {row.name} is "
        + (
            "unknown, because its check could not run"
            if check.figure is None
            else f"{check.figure:.4g}"
        )
        for row in result.rows
        for check in row.checks
        if not check.holds
    ]
    if failed:
        raise AssertionsError(f"{len(failed)} bounds are not met: {listed(failed, separator='; ')}")
    remembered = [row.name for row in result.rows if row.state is not RequestState.FORGOTTEN]
    if remembered:
        raise NotForgottenError(
            f"no step forgets {listed(remembered)}",
            hint="give [search] more steps, or other layers",
        )


def _drop_obsolete(job: Job) -> None:
    """Drop the records of outputs and joint stages that are no longer in the recipe."""
    current = {stage.key for stage in planning.stages_of(job)}
    stages = tuple(
        each
        for each in job.ledger.stages
        if each.key in current or (each.place is None and len(each.names) == 1)
    )
    job.ledger = replace(job.ledger, stages=stages)


def _run_all(
    job: Job, pending: Sequence[planning.PlannedStage], on_event: Callable[[RunEvent], None]
) -> list[Stage]:
    """Run stages in order, and skip those that turn out to be done; return those that ran."""
    done: dict[Stage, None] = {}
    for number, each in enumerate(pending, 1):
        job.catalog = slsgu.Catalog(job.store)
        stage = each.stage
        if stage in done or (reason := planning.reason_to_run(job, stage)) is None:
            continue
        rest = [other for other in pending[number:] if other.stage not in done]
        left = sum(other.seconds or 0.0 for other in (each, *rest)) or None
        progress.note(f"[{number}/{len(pending)}] {stage.kind} {stage.about}")
        on_event(_event("begin", stage, why=reason, left=left))
        for finished, seconds in _run_stage(job, stage, [other.stage for other in rest]):
            done[finished] = None
            on_event(_event("end", finished, seconds=seconds))
    return [*done]


def _run_stage(job: Job, stage: Stage, rest: Sequence[Stage]) -> Iterator[tuple[Stage, float]]:
    """Run a stage and enter it in the ledger; yield it with its seconds.

    Searches that are summed share one model, so those of the rest run with it.
    """
    started = perf_counter()
    if stage.kind is StageKind.SEARCH and job.recipe.together is Together.SUM:
        others = [each for each in rest if each.kind is StageKind.SEARCH]
        waiting = [stage, *(each for each in others if planning.reason_to_run(job, each))]
        names = [each.names[0] for each in waiting]
        results = slsgu.search_each(job.store, names, options=job.recipe.search)
        for each, _ in zip(waiting, results, strict=True):
            yield each, _record(job, each, started)
            started = perf_counter()
        return
    if isinstance(stage, FileStage):
        # From now on the recipe owns what is at this place, so a later run may replace it.
        _save(job, stage, {}, "", 0.0)
    TYPES[stage.kind].run(job, stage)
    yield stage, _record(job, stage, started)


def _record(job: Job, stage: Stage, started: float) -> float:
    seconds = perf_counter() - started
    job.catalog = slsgu.Catalog(job.store)
    _save(job, stage, TYPES[stage.kind].inputs(job, stage), output_digest(job, stage), seconds)
    return seconds


def _save(job: Job, stage: Stage, inputs: dict[str, str], output: str, seconds: float) -> None:
    took = PassTime(seconds, slsgu.device_name(slsgu.pick_device(job.recipe.search.device)))
    _, _, place = stage.key
    origin = str(stage.origin) if isinstance(stage, FileStage) and stage.origin else None
    record = StageRecord(stage.kind, stage.names, place, inputs, output, took, origin)
    job.save(replace(job.ledger.with_stage(record), version=slsgu.__version__))


def _event(event: str, stage: Stage, **more: Any) -> RunEvent:
    _, _, place = stage.key
    return RunEvent(event, stage.kind, stage.names, place, **more)
