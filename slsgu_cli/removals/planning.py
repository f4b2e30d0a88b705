"""The plan of a job: its stages, which of them have to run, and which cannot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import slsgu_cli as slsgu
from slsgu_cli import Artifact, progress
from slsgu_cli.errors import InputError, SlsguError
from slsgu_cli.records.ledger import LedgerRow, RequestState, StageKind
from slsgu_cli.removals.job import Job, NotYetError
from slsgu_cli.removals.recipe import Together
from slsgu_cli.removals.stage import FileStage, Stage
from slsgu_cli.removals.stages import TYPES, fault, output_digest, require_possible, set_request


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage and why it has to run: None if it is done.

    `trouble` says why it cannot succeed. `seconds` is the median time of such stages in earlier
    runs of the recipe, None if there was none.
    """

    stage: Stage
    reason: str | None
    trouble: str | None = None
    seconds: float | None = None


def stages_of(job: Job) -> list[Stage]:
    """Return all stages of a job in the order of a run."""
    recipe, names, out = job.recipe, job.recipe.names, job.recipe.outputs
    stages = [Stage(StageKind.SET, (name,)) for name in names]
    for name in names:
        stages += [Stage(StageKind.GRADIENTS, (name,)), Stage(StageKind.RANKING, (name,))]
    searches = [names] if recipe.together is Together.JOINT else [(name,) for name in names]
    stages += [Stage(StageKind.SEARCH, each) for each in searches if each]
    if out.checkpoint:
        stages.append(FileStage(StageKind.CHECKPOINT, names, out.checkpoint))
    stages += _target_stages(job)
    if out.edits:
        stages.append(FileStage(StageKind.EDITS, names, out.edits))
    if out.lora:
        lora = FileStage(StageKind.LORA, names, out.lora)
        stages += [lora] if names or job.ledger.stage(lora.key) else []
    if not names:
        return stages
    stages.append(Stage(StageKind.FIGURES, names))
    verified = [request.name for request in recipe.requests if recipe.checks_of(request)]
    stages += [Stage(StageKind.VERIFICATION, (name,)) for name in verified]
    for kind, place in ((StageKind.REPORT, out.report), (StageKind.EVIDENCE, out.evidence)):
        stages += [FileStage(kind, names, place)] if place else []
    return stages


def _target_stages(job: Job) -> list[Stage]:
    """Return the copies of targets, those that an earlier run wrote included."""
    copies: dict[Path, Stage] = {
        Path(each.place): FileStage(each.kind, (), Path(each.place), Path(each.origin))
        for each in job.ledger.stages
        if each.origin and each.place
    }
    for target in job.recipe.targets():
        place = (job.recipe.outputs.targets or Path()) / target.resolve().name
        names = tuple(each.name for each in job.recipe.requests if target in each.targets)
        copies[place] = FileStage(StageKind.TARGET, names, place, target)
    return [copies[place] for place in sorted(copies)]


def reason_to_run(job: Job, stage: Stage) -> str | None:
    """Return why a stage has to run; None if its output is there and up to date."""
    record = job.ledger.stage(stage.key)
    try:
        inputs = TYPES[stage.kind].inputs(job, stage)
        if record is None or not record.output:
            return "not done yet"
        if changed := [what for what, now in inputs.items() if record.inputs.get(what) != now]:
            return f"changed: {', '.join(changed)}"
        if flaw := fault(job, stage):
            return flaw
        if output_digest(job, stage) != record.output:
            return "the output has changed since the last run"
    except NotYetError as missing:
        return f"waits for the {missing}" if record is None else f"no {missing}"
    except SlsguError as error:
        return error.message
    except OSError as error:
        return f"cannot read the output: {error.strerror or error}"
    return None


def reasons(job: Job) -> dict[Stage, str | None]:
    """Return all stages with why they have to run."""
    stages = stages_of(job)
    to_run = {}
    with progress.bar("checking what is done", len(stages)) as ticker:
        for stage in stages:
            to_run[stage] = reason_to_run(job, stage)
            ticker.advance()
    return to_run


def request_rows(job: Job) -> list[LedgerRow]:
    """Return all requests in a job's ledger. Those with a stage to run are open."""
    return job.current_rows(
        {name for stage, why in reasons(job).items() if why for name in stage.names}
    )


def plan(job: Job) -> list[PlannedStage]:
    """Return all stages with why they have to run, what prevents it, and the time they take.

    Raises InputError if another recipe has one of the requests.
    """
    _require_own_names(job)
    to_run = reasons(job)
    set_errors = _set_errors(job, [stage for stage, reason in to_run.items() if reason])
    planned = []
    pending: dict[str, str] = {}
    for stage, reason in to_run.items():
        earlier = [f"after {pending[name]} of {name}" for name in stage.names if name in pending]
        trouble = _trouble(job, stage, set_errors) if reason else None
        reason = reason or next(iter(earlier), None)
        if reason and not isinstance(stage, FileStage):
            pending |= {name: stage.kind for name in stage.names if name not in pending}
        seconds = _typical_seconds(job, stage) if reason else 0.0
        planned.append(PlannedStage(stage, reason, trouble, seconds))
    return planned


def require_all_possible(job: Job, planned: Sequence[PlannedStage]) -> None:
    """Raise InputError if a stage cannot succeed. The same trouble is named once."""
    troubles: dict[str, str] = {}
    for each in planned:
        if each.trouble:
            message = f"{each.stage.kind} {each.stage.about}: {each.trouble}"
            troubles.setdefault(each.trouble, message)
    if troubles:
        raise InputError(
            "nothing was started, because these stages cannot succeed: "
            + "; ".join(troubles.values()),
            hint=f"correct the recipe {job.recipe.name}; --plan shows every stage",
        )


def _require_own_names(job: Job) -> None:
    """Refuse requests of other recipes, because the two would replace each other's set and edit."""
    for recipe, ledger in job.catalog.readable(Artifact.LEDGER).items():
        for row in ledger.rows:
            withdrawn = row.state is RequestState.WITHDRAWN
            if recipe != job.recipe.name and row.name in job.recipe.names and not withdrawn:
                raise InputError(
                    f"{row.name} is a request of the recipe {recipe} in this store",
                    hint=f'another name and concept = "{job.recipe.request(row.name).concept}", '
                    f'another --store, or name = "{recipe}" if the recipe is the same',
                )


def _trouble(job: Job, stage: Stage, set_errors: Mapping[str, SlsguError]) -> str | None:
    """Return why a stage cannot succeed; None as far as can be known."""
    if stage.kind is StageKind.SET and stage.names[0] in set_errors:
        return set_errors[stage.names[0]].message
    try:
        require_possible(job, stage)
    except SlsguError as error:
        return error.message
    return None


def _set_errors(job: Job, stages: Sequence[Stage]) -> dict[str, SlsguError]:
    """Return what prevents sets from being built, by name. Captions and labels are read."""
    requests = [set_request(job, stage) for stage in stages if stage.kind is StageKind.SET]
    if not requests:
        return {}
    try:
        slsgu.require_weights(slsgu.resolve(job.recipe.model))
    except SlsguError as error:
        return {request.name: error for request in requests}
    with progress.bars_only():
        return slsgu.Preview(job.store, requests).errors()


def _typical_seconds(job: Job, stage: Stage) -> float | None:
    """Return the median seconds of such a stage, for as many requests; None if none ran."""
    took = [
        each.took.seconds / max(len(each.names), 1)
        for each in job.ledger.stages
        if each.output and each.kind is stage.kind
    ]
    return median(took) * max(len(stage.names), 1) if took else None
