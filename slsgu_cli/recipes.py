"""What `slsgu run` does: the stages of a recipe that are not done yet, their outputs, a ledger.

A stage is done where the ledger has it as it is asked for now, and what it made still stands
in the store. It is looked at again just before it would be run, so what a stage before it made
to the same bytes is not made of anew.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.apply import copy_model
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.clip.inputs import peak_memory, reset_peak
from slsgu_cli.clip.models import fingerprint, pick_device, resolve
from slsgu_cli.errors import AssertionsError, InputError, NotForgottenError, listed
from slsgu_cli.method.edit import apply, copy_original, draw_steps, rank_and_plot
from slsgu_cli.method.evaluate import EvalResult, evaluate
from slsgu_cli.method.export import export
from slsgu_cli.method.gradients import compute_gradients
from slsgu_cli.method.search import search_each
from slsgu_cli.records.codec import decode
from slsgu_cli.records.figures import PassTime
from slsgu_cli.records.method import LoraLayout
from slsgu_cli.records.options import (
    ApplyOptions,
    ApplyRequest,
    BuildRequest,
    ExportRequest,
    ReportRequest,
)
from slsgu_cli.records.recipe import (
    FIELDS_OF_ROW,
    BoundCheck,
    EvidenceRequest,
    Ledger,
    LedgerRow,
    Outputs,
    Recipe,
    RemovalRequest,
    RequestEvent,
    RequestState,
    Stage,
    StageRecord,
    Together,
    figure_of,
)
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.verification import ATTACK, ATTACKED, Verification
from slsgu_cli.report.evidence import write_evidence
from slsgu_cli.report.page import write_report
from slsgu_cli.report.study_sections import verified_pair
from slsgu_cli.sets.build import build_sets
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.catalog import Catalog
from slsgu_cli.store.files import remove, replacing
from slsgu_cli.store.sharing import held
from slsgu_cli.store.store import Store
from slsgu_cli.study.joint import joint_search
from slsgu_cli.study.recipe import PlannedStep, RecipePlan, Step
from slsgu_cli.verification.results import rows as verdicts
from slsgu_cli.verification.verify import verify


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that a run tells a program: a step that begins or ends, or the end."""

    event: str
    stage: str | None
    requests: tuple[str, ...]
    place: str | None = None
    why: str | None = None
    seconds: float | None = None
    left: float | None = None


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a recipe has come to: its ledger, and the steps that this run did."""

    recipe: Recipe
    ledger: Ledger
    done: tuple[Step, ...]

    @property
    def rows(self) -> list[LedgerRow]:
        """The ledger's rows of requests that are not withdrawn."""
        return [row for row in self.ledger.rows if row.state is not RequestState.WITHDRAWN]

    @property
    def figures(self) -> dict[str, float]:
        """Figures of the last evaluation by name, as `fa1.NAME` and `loss.SET`."""
        return self.ledger.figures

    @property
    def checkpoint(self) -> Path | None:
        """Where the model without the requests is."""
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
    """Make a model forget a concept, from its rows to the checkpoint at `out`.

    `evaluation` has sources of labelled images by name; `options` are fields of `BuildRequest`,
    such as `templates`. Figures and the path are in the result. Raises what the commands
    raise, and NotForgottenError.
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
    tell: Callable[[RunEvent], None] = lambda event: None,
) -> RunResult:
    """Do what is not done yet of a recipe, or of that in a file, and keep its ledger.

    What it is at goes to `tell`. Raises InputError before the first step where one cannot
    succeed, and what the commands raise.
    """
    job = Job.of(recipe, store)
    with held(job.store, job.path, what=f"the run of {job.recipe.name}"):
        job.ledger = job.read_ledger()
        return job.run(tell)


def plan(recipe: Recipe | str | Path, *, store: Store | str = "slsgu-store") -> list[PlannedStep]:
    """Return the steps of a recipe: which are done, which are to be done and why."""
    return Job.of(recipe, store).plan()


def requests_of(
    recipe: Recipe | str | Path, *, store: Store | str = "slsgu-store"
) -> list[LedgerRow]:
    """Return the requests of a recipe's ledger; those whose steps do not stand are open."""
    return Job.of(recipe, store).rows()


def require_met(result: RunResult) -> None:
    """Raise AssertionsError or NotForgottenError unless every request is within its bounds."""
    failed = [
        f"{check.bound} of {row.name} is {_figure(check.figure)}"
        for row in result.rows
        for check in row.checks
        if not check.holds
    ]
    if failed:
        raise AssertionsError(f"{len(failed)} bounds are not met: {listed(failed, separator='; ')}")
    left = [row.name for row in result.rows if row.state is not RequestState.FORGOTTEN]
    if left:
        raise NotForgottenError(
            f"no step forgets {listed(left)}", hint="give [search] more steps, or other layers"
        )


class Job(RecipePlan):
    """A recipe while it is run: its steps are done, and its ledger kept."""

    def run(self, tell: Callable[[RunEvent], None]) -> RunResult:
        """Do every step that is to be done, and keep the ledger."""
        planned = self.plan()
        self._refuse_troubles(planned)
        self._withdraw()
        with progress.board(_progress_of(planned), len(self.recipe.requests)) as board:
            done = self._do_all([each for each in planned if each.why], board, tell)
        self._settle()
        tell(RunEvent("finished", None, self.recipe.names))
        return RunResult(self.recipe, self.ledger, tuple(done))

    def _do_all(
        self,
        pending: Sequence[PlannedStep],
        board: progress.Board,
        tell: Callable[[RunEvent], None],
    ) -> list[Step]:
        """Do steps in turn, those that turn out to be done aside; return them."""
        done: dict[Step, None] = {}
        for number, each in enumerate(pending, 1):
            self.catalog = Catalog(self.store)
            step, rest = each.step, [p for p in pending[number:] if p.step not in done]
            if step in done:
                continue
            if (why := self.why(step)) is None:
                board.end(step.stage, requests=self._finished(rest))
                continue
            left = sum(p.seconds or 0.0 for p in (each, *rest))
            known = f" (about {_duration(left)} left)" if left > 0 else ""
            progress.note(f"[{number}/{len(pending)}] {step.stage} {step.about}{known}")
            tell(_event("begin", step, why=why, left=left or None))
            seconds_left, at_least = self._seconds_left([each, *rest])
            board.begin(step.stage, step.about, left=seconds_left, at_least=at_least)
            for finished, seconds in self._do(step, [p.step for p in pending]):
                done[finished] = None
                rest = [p for p in rest if p.step != finished]
                board.end(finished.stage, requests=self._finished(rest))
                tell(_event("end", finished, seconds=seconds))
        return [*done]

    def _finished(self, rest: Sequence[PlannedStep]) -> int:
        """Return how many requests none of the rest of the steps is for."""
        waiting = {name for each in rest for name in each.step.names}
        return len(set(self.recipe.names) - waiting)

    def _seconds_left(self, rest: Sequence[PlannedStep]) -> tuple[float, bool]:
        """Return what steps take, by the plan or what this recipe's took, and if more is left.

        More is left where nothing is known of one of them.
        """
        took = self.seconds_of([self.ledger])
        known = [
            each.seconds if each.seconds is not None else self.typical(took, each.step)
            for each in rest
        ]
        return sum(filter(None, known)), None in known

    def _refuse_troubles(self, planned: Sequence[PlannedStep]) -> None:
        # What stands in the way of several steps is told of the first.
        reasons: dict[str, str] = {}
        for each in planned:
            if each.trouble:
                place = f"{each.step.stage} {each.step.about}"
                reasons.setdefault(each.trouble, f"{place}: {each.trouble}")
        if reasons:
            raise InputError(
                f"nothing was begun, for it cannot end: {'; '.join(reasons.values())}",
                hint=f"correct the recipe {self.recipe.name}; --plan shows all of it",
            )

    def _do(self, step: Step, pending: Sequence[Step]) -> Iterator[tuple[Step, float]]:
        """Do a step, and further searches where they share its model; record and yield each."""
        started = perf_counter()
        reset_peak(pick_device(self.recipe.search.device))
        if step.stage is Stage.SEARCH and self.recipe.together is Together.SUM:
            searches = [p for p in pending if p.stage is Stage.SEARCH and self.why(p)]
            names = [p.names[0] for p in searches]
            results = search_each(self.store, names, options=self.recipe.search)
            for each, result in zip(searches, results, strict=True):
                draw_steps(self.store, result)
                yield each, self._recorded(each, started)
                started = perf_counter()
            return
        if step.place is not None:
            # What is there from now on is this recipe's, and may be replaced by a later run.
            self._keep(step, {}, "", 0.0)
        _DO[step.stage](self, step)
        yield step, self._recorded(step, started)

    def _recorded(self, step: Step, started: float) -> float:
        seconds = perf_counter() - started
        self.catalog = Catalog(self.store)
        self._keep(step, self.asked(step), self.made(step), seconds)
        return seconds

    def _keep(self, step: Step, asked: dict[str, str], made: str, seconds: float) -> None:
        took = PassTime(seconds, self.device)
        place = str(step.place) if step.place else None
        origin = str(self.target(step)) if step.stage is Stage.TARGET else None
        memory = peak_memory(pick_device(self.recipe.search.device)) if made else None
        record = StageRecord(step.stage, step.names, place, asked, made, took, origin, memory)
        self.ledger = self.ledger.with_stage(record)
        self._write()

    def _write(self) -> None:
        self.store.write_record(self.path, replace(self.ledger, version=slsgu_cli.__version__))

    def _build(self, step: Step) -> None:
        request = self.recipe.set_of(self.recipe.request(step.names[0]))
        manifest = self.catalog.get(Artifact.SET, request.name)
        if manifest is not None and manifest.concept == request.concept and manifest.request:
            # Rows that a person took out stay out.
            dropped = decode(BuildRequest, manifest.request).dropped
            request = replace(request, dropped=dropped)
        build_sets(self.store, request)

    def _grade(self, step: Step) -> None:
        compute_gradients(self.store, step.names[0], options=self.recipe.grad)

    def _rank(self, step: Step) -> None:
        rank_and_plot(self.store, step.names[0], options=self.recipe.rank)

    def _search(self, step: Step) -> None:
        options = self.recipe.search
        if len(step.names) > 1:
            joint_search(self.store, step.names, options=options)
            return
        options = replace(options, after=self.before(step))
        for result in search_each(self.store, step.names, options=options):
            draw_steps(self.store, result)

    def _apply(self, step: Step) -> None:
        target = self.target(step) if step.stage is Stage.TARGET else None
        out = step.place or Path()
        out.parent.mkdir(parents=True, exist_ok=True)
        if not step.names:
            options = ApplyOptions(overwrite=True)
            if target is None:
                copy_original(self.recipe.model, out, options=options)
            else:
                copy_model(read_target(target), out, options=options)
            return
        request = ApplyRequest(names=step.names, out=out, target=target, overwrite=True)
        apply(self.store, request)

    def _copy_edits(self, step: Step) -> None:
        folder = step.place or Path()
        folder.mkdir(parents=True, exist_ok=True)
        for name in step.names:
            with replacing(folder / f"{name}.safetensors") as partial:
                partial.write_bytes(self.store.read_bytes(Artifact.EDIT.path(name)))
        for row in self.ledger.rows:
            if row.state is RequestState.WITHDRAWN and row.name not in step.names:
                with suppress(FileNotFoundError):
                    (folder / f"{row.name}.safetensors").unlink()

    def _export(self, step: Step) -> None:
        out = step.place or Path()
        if not step.names:
            remove(out)
            return
        layout = LoraLayout.LORA if out.suffix == ".safetensors" else LoraLayout.PEFT
        device = self.recipe.search.device
        request = ExportRequest(
            names=step.names, out=out, layout=layout, overwrite=True, device=device
        )
        export(self.store, request)

    def _measure(self, step: Step) -> None:
        device = self.recipe.search.device
        result = evaluate(self.store, step.names, model=self.recipe.written, device=device)
        before, after = result.models[0].forget, result.models[-1].forget
        figures = result.figures()
        measured = [
            replace(
                self._row(name),
                before=before[name],
                after=after[name],
                layer=self.record(Artifact.EDIT, name).layer,
            )
            for name in step.names
        ]
        original = EvalResult(result.names, result.models[:1], None).figures()
        self.ledger = replace(
            self.ledger.with_rows(measured),
            figures=figures,
            original=original,
            kept_before=result.models[0].utility,
            kept=result.models[-1].utility,
        )

    def _verify(self, step: Step) -> None:
        (name,) = step.names
        verify(self.store, name, self.recipe.verification_of(name))

    def _report(self, step: Step) -> None:
        out = step.place or Path()
        out.parent.mkdir(parents=True, exist_ok=True)
        device = self.recipe.search.device
        request = ReportRequest(names=step.names, out=out, overwrite=True, device=device)
        write_report(self.store, request)

    def _file_evidence(self, step: Step) -> None:
        # It tells the state of each request, which is known now that all else is done.
        self._settle()
        out = step.place or Path()
        request = EvidenceRequest(names=step.names, out=out, overwrite=True)
        write_evidence(self.store, request, self.recipe)

    def _row(self, name: str) -> LedgerRow:
        """Return the ledger's row of a request as the recipe describes it now."""
        request = self.recipe.request(name)
        said = {key: getattr(request, key) for key in FIELDS_OF_ROW}
        known = next((row for row in self.ledger.rows if row.name == name), None)
        if known is not None:
            return replace(known, **said)
        return LedgerRow(**said, state=RequestState.OPEN, events=())

    def rows(self) -> list[LedgerRow]:
        """Return the ledger's rows with the states that they have now."""
        undone = {name for step, why in self.whys().items() if why for name in step.names}
        rows = [replace(row, state=RequestState.WITHDRAWN) for row in self._rows_without_request()]
        for name in self.recipe.names:
            row = self._row(name)
            rows.append(replace(row, state=RequestState.OPEN) if name in undone else row)
        return [*self.ledger.with_rows(rows).rows]

    def _rows_without_request(self) -> list[LedgerRow]:
        return [row for row in self.ledger.rows if row.name not in self.recipe.names]

    def _withdraw(self) -> None:
        """Enter requests that are new as open, and those that are gone as withdrawn."""
        rows = []
        for name in self.recipe.names:
            row = self._row(name)
            is_new = not row.events or row.state is RequestState.WITHDRAWN
            rows.append(_entered(row, RequestState.OPEN, {}) if is_new else row)
        for row in self._rows_without_request():
            if row.state is not RequestState.WITHDRAWN:
                rows.append(_entered(row, RequestState.WITHDRAWN, {}))
        by_reference = self.recipe.by_reference
        self.ledger = replace(self.ledger.with_rows(rows), by_reference=by_reference)
        self._write()

    def _settle(self) -> None:
        """Enter what became of each request, with digests of its edit and of the outputs."""
        current = {step.key for step in self.steps()}
        kept = tuple(
            each
            for each in self.ledger.stages
            if each.key in current or (each.place is None and len(each.names) == 1)
        )
        self.ledger = replace(self.ledger, stages=kept)
        # Not of the evidence, which tells of this.
        outputs = {
            s.place: s.made
            for s in self.ledger.stages
            if s.place and s.made and s.stage is not Stage.EVIDENCE
        }
        rows = []
        written = self._written_fingerprints()
        for request in self.recipe.requests:
            row = self._row(request.name)
            header = self.record(Artifact.EDIT, row.name)
            checks = tuple(self._checks(request, written))
            met = all(check.holds for check in checks) if checks else bool(header.forgotten)
            state = RequestState.FORGOTTEN if met else RequestState.OUT_OF_BOUNDS
            digests = {"edit": self.catalog.digest(Artifact.EDIT, row.name), **outputs}
            rows.append(_entered(replace(row, checks=checks), state, digests))
        self.ledger = self.ledger.with_rows(rows)
        self._write()

    def _written_fingerprints(self) -> set[str]:
        """Return the fingerprint of the written model, if bounds are about attacks on it."""
        attacked = any(map(self._is_attacked, self.recipe.requests))
        written = self.recipe.written if attacked else None
        return {fingerprint(resolve(written))} if written else set()

    def _is_attacked(self, request: RemovalRequest) -> bool:
        bounds = self.recipe.bounds_of(request)
        return any(bound.figure.startswith(ATTACK) for bound in bounds)

    def _checks(self, request: RemovalRequest, written: Collection[str]) -> Iterator[BoundCheck]:
        figures = self.ledger.figures
        if self._is_attacked(request):
            figures = figures | self._attacks(request.name, written)
        for bound in self.recipe.bounds_of(request):
            value = figures.get(figure_of(bound, request.name))
            yield BoundCheck(str(bound), value, value is not None and bound.holds(value))

    def _attacks(self, name: str, written: Collection[str]) -> dict[str, float]:
        """Return by how many points of FA@1 each attack exceeds its control, as bounds name it."""
        record: Verification = self.record(Artifact.VERIFICATION, name)
        pair = verified_pair(record, self.record(Artifact.EDIT, name), written)
        rows = verdicts(*pair) if pair else []
        return {f"{ATTACK}{row.check}": row.gain for row in rows if row.check in ATTACKED}


_DO: dict[Stage, Callable[[Job, Step], None]] = {
    Stage.SET: Job._build,
    Stage.GRADIENTS: Job._grade,
    Stage.RANKING: Job._rank,
    Stage.SEARCH: Job._search,
    Stage.CHECKPOINT: Job._apply,
    Stage.TARGET: Job._apply,
    Stage.EDITS: Job._copy_edits,
    Stage.LORA: Job._export,
    Stage.FIGURES: Job._measure,
    Stage.VERIFICATION: Job._verify,
    Stage.REPORT: Job._report,
    Stage.EVIDENCE: Job._file_evidence,
}


def _entered(row: LedgerRow, state: RequestState, digests: dict[str, str]) -> LedgerRow:
    """Return a row with an event of today, unless its last one says the same."""
    last = row.events[-1] if row.events else None
    if last is not None and (last.state, last.digests) == (state, digests):
        return replace(row, state=state)
    event = RequestEvent(datetime.now(UTC).date().isoformat(), state, digests)
    return replace(row, state=state, events=(*row.events, event))


def _progress_of(planned: Sequence[PlannedStep]) -> dict[str, tuple[int, int]]:
    """Return of each stage, in order, how many steps are done and how many there are."""
    counts: dict[str, tuple[int, int]] = {}
    for each in planned:
        done, total = counts.get(each.step.stage, (0, 0))
        counts[each.step.stage] = done + (each.why is None), total + 1
    return counts


def _event(event: str, step: Step, **more: Any) -> RunEvent:
    place = str(step.place) if step.place else None
    return RunEvent(event, step.stage, step.names, place, **more)


def _figure(value: float | None) -> str:
    return "not known, for it could not be tried" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
