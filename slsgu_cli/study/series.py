"""Series of searches: `slsgu sweep` and `slsgu trajectory`.

A sweep runs the whole job for each class of a list (the paper's Table 2). The retain set
excludes every class, so that all share one retain gradient; with folds, each fold has a retain
set without its own classes. All searches share one base pass. Each class is recorded as soon as
it is done, and an interrupted sweep resumes with the first missing class. Several processes
compute the shared artifacts together, and then one class each at a time.

A trajectory measures the accuracies on a fine grid of steps, layer by layer. The steps of a
layer share the base pass. They are recorded as trials and never measured twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from shlex import quote

import torch

import slsgu_cli
from slsgu_cli import processes, progress
from slsgu_cli.clip.memory import return_memory
from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.gradient_pass import arithmetic
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.plots import step_plots, write_plots
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import SearchResult, SetSearch, search_each
from slsgu_cli.engine.search_plan import read_plan, share_evaluation
from slsgu_cli.errors import NotForgottenError, SlsguError, UsageError
from slsgu_cli.figures.curves import trajectories_plot
from slsgu_cli.method.step_search import bisection
from slsgu_cli.records.codec import digest, encode
from slsgu_cli.records.sets import Split, check_name
from slsgu_cli.records.studies import (
    CLASS,
    Sweep,
    SweepRequest,
    SweepRow,
    Trajectory,
    TrajectoryOptions,
)
from slsgu_cli.sets.build import build_sets
from slsgu_cli.sets.context import file_recipe
from slsgu_cli.sources.opening import open_sources
from slsgu_cli.sources.prompts import read_classes, read_templates
from slsgu_cli.sources.reader import Columns
from slsgu_cli.store.artifacts import (
    SWEPT,
    Artifact,
    changed,
    digests_of,
    read_manifest,
    read_pointer,
    resume,
)
from slsgu_cli.store.store import Store


@dataclass(frozen=True, slots=True)
class SweepResult:
    """The rows of all classes in order, and how many come from earlier runs."""

    sweep: Sweep
    reused: int


def sweep(store: Store, request: SweepRequest) -> SweepResult:
    """Run the job for each missing class, and record it as soon as it is done.

    Raises the errors of the commands of the job; finished classes stay recorded.
    """
    _check(request)
    model = resolve(request.build.model)
    made = fingerprint(model)
    fresh = Sweep(
        name=request.name,
        recipe=_recipe(request, made),
        classes=request.classes,
        model=request.build.model,
        model_fingerprint=made,
        criterion=request.search.criterion,
        rows=(),
        version=slsgu_cli.__version__,
    )
    path = Artifact.SWEEP.path(request.name)

    def standing() -> dict[str, SweepRow]:
        recorded = resume(store, Artifact.SWEEP, request.name, fresh).rows
        return {row.name: row for row in recorded if _stands(store, row)}

    done = processes.from_first(standing)
    reused = len(done)
    pending = [name for name in request.classes if name not in done]
    for row in _rows(store, request, pending):
        done[row.name] = row
        rows = tuple(done[name] for name in request.classes if name in done)
        store.write_record(path, replace(fresh, rows=rows))
    rows = tuple(done[name] for name in request.classes)
    return SweepResult(replace(fresh, rows=rows), reused)


def _rows(store: Store, request: SweepRequest, pending: Sequence[str]) -> Iterator[SweepRow]:
    """Do the job for each pending class; yield its row on every rank, as soon as it is done."""
    mine = processes.split(pending)
    if pending and processes.world_size() > 1:
        # All ranks compute what the classes share, with the first class.
        first = pending[0]
        processes.from_first(lambda: build_sets(store, request.of(first)))
        compute_gradients(store, first, model=None, options=request.gradients)
        rank(store, first, options=request.ranking)
    with processes.alone():
        for place, name in enumerate(mine, start=1):
            progress.note(f"{place}/{len(mine)} {name}")
            build_sets(store, request.of(name))
            compute_gradients(store, name, model=None, options=request.gradients)
            rank(store, name, options=request.ranking)
            return_memory()
    results = search_each(store, mine, options=request.search)
    for _ in range(-(-len(pending) // processes.world_size())):
        with processes.alone():
            result = next(results, None)
            row = None if result is None else _row(store, result)
        yield from (each for each in processes.gathered(row) if each is not None)


def require_swept(result: SweepResult) -> None:
    """Raise NotForgottenError unless every class of a sweep is forgotten."""
    recognised = [row.name for row in result.sweep.rows if not row.forgotten]
    if recognised:
        raise NotForgottenError(
            f"no step forgets {', '.join(recognised)}",
            hint=f"the sweep is saved; try `slsgu search {quote(recognised[0])} --steps 20`",
        )


def _check(request: SweepRequest) -> None:
    check_name(request.name)
    for name in request.classes:
        check_name(name)
    if not request.classes:
        raise UsageError("there is no class to sweep over")
    build = request.build
    if not build.model.name:
        raise UsageError("sweep needs a model", hint="--model MODEL")
    if not build.evals:
        raise UsageError("a sweep needs an evaluation set", hint="--eval NAME=SOURCE")
    if request.folds > len(request.classes):
        raise UsageError(
            f"--folds {request.folds} exceeds the number of classes, {len(request.classes)}"
        )
    if not build.retain_sources and any(CLASS in source for source in build.sources):
        raise UsageError(
            "a --source with {} has rows of one class only, and none to retain",
            hint="add a source of other rows with --retain-source",
        )


def _recipe(request: SweepRequest, model_fingerprint: str) -> str:
    """Return a digest of all inputs of a sweep, files included."""
    build = request.build
    labelled = [*build.evals.values()]
    captioned = {s for name in request.classes for s in request.of(name).sources}
    columns = Columns(
        image=build.image_column, caption=build.caption_column, label=build.label_column
    )
    readers = open_sources(sorted({*captioned, *build.retain_sources, *labelled}), columns)
    made_from = {
        "model": model_fingerprint,
        "build": {key: value for key, value in encode(build).items() if key != "model"},
        "files": file_recipe(readers),
        "classes": list(request.classes),
        "eval classes": [encode(read_classes(name)) for _, name in sorted(build.classes.items())],
        "templates": [list(read_templates(name)) for _, name in sorted(build.templates.items())],
        "batch size": request.gradients.batch_size,
        "precision": request.gradients.precision,
        "directions": encode(request.ranking.specs),
        "search": encode(replace(request.search, device="", cache_budget=None)),
        "folds": request.folds,
    }
    return digest(made_from)


def _stands(store: Store, row: SweepRow) -> bool:
    """Return whether the row of a class was made from the current gradients of its set."""
    try:
        pointer = read_pointer(store, read_manifest(store, row.name))
    except SlsguError:
        return False
    return changed(SWEPT, row, digests_of(None, pointer)) is None


def _row(store: Store, result: SearchResult) -> SweepRow:
    trials, chosen = result.trials, result.chosen
    pointer = read_pointer(store, read_manifest(store, trials.name))
    return SweepRow(
        name=trials.name,
        gradient=pointer.forget,
        retain=pointer.retain,
        layer=chosen.layer,
        tower=chosen.tower,
        direction=chosen.direction,
        step=chosen.step,
        share=chosen.share,
        baseline_forget=result.report.before.forget,
        baseline_utility=result.report.before.utility,
        forget=result.report.after.forget,
        utility=result.report.after.utility,
        forgotten=result.forgotten,
    )


# A layer is followed up to this share of its norm if no shorter step forgets.
FARTHEST = 6.4


def trajectory(store: Store, name: str, *, options: TrajectoryOptions) -> Trajectory:
    """Follow the front layers of set `name` along their steps and record the trials.

    Raises MissingError, StaleError, InputError and UsageError.
    """
    plan = read_plan(store, name, options=options.search)
    followed = []
    with torch.no_grad(), arithmetic(plan.options.precision):
        shared = share_evaluation(store, [plan], Split.TEST)
        evaluation = plan.measured(shared, resumed=True)
        with SetSearch(store, Artifact.TRAJECTORY, plan, evaluation) as run:
            for evaluator in plan.evaluators(store, evaluation):
                with progress.bar(evaluator.layer, options.points) as ticker:
                    for step in _grid(evaluator, run, options):
                        followed.append(run.with_utility(evaluator, run.trial(evaluator, step)))
                        ticker.advance()
    trials = replace(run.record, trials=tuple(followed))
    return Trajectory(trials, len(run.trials) - run.reused)


def trajectory_and_plots(
    store: Store, name: str, *, options: TrajectoryOptions
) -> tuple[Trajectory, list[str]]:
    """Follow a set's layers, and draw each alone and all side by side."""
    result = trajectory(store, name, options=options)
    moves = result.moves()
    drawn = {"trajectories": trajectories_plot(result.trials, moves)}
    drawn |= step_plots(result.trials, moves, "trajectory")
    return result, write_plots(store, name, drawn)


def _grid(evaluator: Evaluator, run: SetSearch, options: TrajectoryOptions) -> list[float]:
    """Return evenly spaced steps, the last one at the end of the trajectory."""
    if options.until is not None:
        end = options.until / 0.1 * evaluator.first
    else:
        # The first forgetting step when doubling steps, or the last step to try.
        trials = bisection(evaluator.measure, run.residual, evaluator.first)
        end = next(t.step for t in trials if run.residual(t) == 0 or 2 * t.share > FARTHEST * 1.001)
    return [end * (index + 1) / options.points for index in range(options.points)]
