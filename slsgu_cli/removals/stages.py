"""What the stages of each kind read, write and do."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import slsgu_cli as slsgu
from slsgu_cli import Artifact, Standing
from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import decode, digest, encode
from slsgu_cli.records.ledger import MeasuredModel, StageKind
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.removals import outputs
from slsgu_cli.removals.job import Job, options_digest
from slsgu_cli.removals.recipe import Together
from slsgu_cli.removals.stage import FileStage, Stage, file_sha256


def set_request(job: Job, stage: Stage) -> BuildRequest:
    """Return how to build the set of a request."""
    return job.recipe.set_of(job.recipe.request(stage.names[0]))


def _set_inputs(job: Job, stage: Stage) -> dict[str, str]:
    request = set_request(job, stage)
    return {
        "options": digest(encode(request)),
        "sources": slsgu.source_digest(request, job.identities),
        "weights": job.weights,
    }


def _build_set(job: Job, stage: Stage) -> None:
    """Build the set. Rows that were dropped by hand stay out."""
    request = set_request(job, stage)
    manifest = job.catalog.get(Artifact.SET, request.name)
    if manifest is not None and manifest.concept == request.concept and manifest.request:
        dropped = decode(BuildRequest, manifest.request).dropped
        request = replace(request, dropped=dropped)
    slsgu.build_sets(job.store, request)


def _gradient_inputs(job: Job, stage: Stage) -> dict[str, str]:
    manifest = job.record(Artifact.SET, stage.names[0])
    return {
        "options": options_digest(job.recipe.grad),
        "rows": digest([manifest.forget.fingerprint, manifest.retain.fingerprint]),
        "weights": job.weights,
    }


def _compute_gradients(job: Job, stage: Stage) -> None:
    slsgu.compute_gradients(job.store, stage.names[0], options=job.recipe.grad)


def _ranking_inputs(job: Job, stage: Stage) -> dict[str, str]:
    pointer = job.record(Artifact.POINTER, stage.names[0])
    return {
        "options": options_digest(job.recipe.rank),
        "gradients": digest([pointer.forget, pointer.retain, pointer.retain_data]),
    }


def _rank(job: Job, stage: Stage) -> None:
    slsgu.rank(job.store, stage.names[0], options=job.recipe.rank)


def _earlier(job: Job, stage: Stage) -> tuple[str, ...]:
    """Return the requests whose edits are in place during a search."""
    names = job.recipe.names
    return names[: names.index(stage.names[0])] if job.recipe.together is Together.AFTER else ()


def _search_inputs(job: Job, stage: Stage) -> dict[str, str]:
    return {
        "requests": digest(stage.names),
        "options": digest([job.recipe.together, options_digest(job.recipe.search)]),
        "ranking": digest([job.digest(Artifact.RANKING, name) for name in stage.names]),
        "evaluation rows": job.evaluation_rows(stage.names),
        "earlier edits": job.edits(_earlier(job, stage)),
    }


def _search(job: Job, stage: Stage) -> None:
    """Search for the edit of a request, or jointly for those of several."""
    options = job.recipe.search
    if len(stage.names) > 1:
        slsgu.joint_search(job.store, stage.names, options=options)
    else:
        after = _earlier(job, stage)
        slsgu.search(job.store, stage.names[0], options=replace(options, after=after))


# Counted up when `eval` has other figures, so that ledgers get them.
FIGURES_REVISION = "2"


def _measured_inputs(job: Job, stage: Stage) -> dict[str, str]:
    return {"revision of figures": FIGURES_REVISION, **job.measured_inputs(stage.names)}


def _evaluate(job: Job, stage: Stage) -> None:
    """Measure the written model, or the original with all edits in place."""
    device = job.recipe.search.device
    result = slsgu.evaluate(job.store, stage.names, model=job.recipe.written, device=device)
    original, written = result.models[0], result.models[-1]
    rows = [
        replace(
            job.row(name),
            before=original.forget[name],
            after=written.forget[name],
            layer=job.record(Artifact.EDIT, name).layer,
        )
        for name in stage.names
    ]
    figures_before = replace(result, models=result.models[:1]).figures()
    job.ledger = replace(
        job.ledger.with_rows(rows),
        original=MeasuredModel(figures_before, original.utility),
        written=MeasuredModel(result.figures(), written.utility),
    )


def _verification_inputs(job: Job, stage: Stage) -> dict[str, str]:
    request = job.recipe.verification_of(stage.names[0])
    given = (request.templates, request.spellings, request.descriptions, request.look_alikes)
    files = {text: file_sha256(Path(text)) for text in given if text and Path(text).is_file()}
    return {
        "options": options_digest(request),
        "files": digest(files),
        **job.measured_inputs(stage.names),
    }


def _verify(job: Job, stage: Stage) -> None:
    """Run the checks on the written model, and enter the figures of bounds in the ledger."""
    (name,) = stage.names
    verified = slsgu.verify(job.store, name, job.recipe.verification_of(name))
    figures = slsgu.bounded_figures(*verified.models[:2])
    job.ledger = job.ledger.with_rows([replace(job.row(name), verified=figures)])


@dataclass(frozen=True, slots=True)
class StageType:
    """The inputs of the stages of a kind, how they run, and the artifact that they write.

    `inputs` returns digests of the options and of everything that a stage reads. It raises
    NotYetError if an earlier stage has not run.
    """

    inputs: Callable[[Job, Any], dict[str, str]]
    run: Callable[[Job, Any], None]
    artifact: Artifact | None = None


TYPES = {
    StageKind.SET: StageType(_set_inputs, _build_set, Artifact.SET),
    StageKind.GRADIENTS: StageType(_gradient_inputs, _compute_gradients, Artifact.POINTER),
    StageKind.RANKING: StageType(_ranking_inputs, _rank, Artifact.RANKING),
    StageKind.SEARCH: StageType(_search_inputs, _search, Artifact.EDIT),
    StageKind.CHECKPOINT: StageType(outputs.edit_inputs, outputs.write_checkpoint),
    StageKind.TARGET: StageType(outputs.edit_inputs, outputs.write_target),
    StageKind.EDITS: StageType(outputs.edit_inputs, outputs.write_edits),
    StageKind.LORA: StageType(outputs.edit_inputs, outputs.write_lora),
    StageKind.FIGURES: StageType(_measured_inputs, _evaluate),
    StageKind.VERIFICATION: StageType(_verification_inputs, _verify, Artifact.VERIFICATION),
    StageKind.REPORT: StageType(outputs.report_inputs, outputs.write_report),
    StageKind.EVIDENCE: StageType(outputs.evidence_inputs, outputs.write_all_evidence),
}


def output_digest(job: Job, stage: Stage) -> str:
    """Return a digest of the output of a stage as it is now. Raises NotYetError, OSError."""
    artifact = TYPES[stage.kind].artifact
    if isinstance(stage, FileStage):
        return digest({name: file_sha256(path) for name, path in stage.files.items()})
    if artifact is None:
        return digest(job.ledger.written.figures if job.ledger.written else None)
    if artifact is Artifact.SET:
        # Rows may be dropped by hand.
        built = job.record(artifact, stage.names[0]).request
        return digest(encode(replace(decode(BuildRequest, built), dropped={})) if built else None)
    return digest([job.digest(artifact, name) for name in stage.names])


def fault(job: Job, stage: Stage) -> str | None:
    """Return why an artifact of a stage is damaged or stale; None if it is neither."""
    if artifact := TYPES[stage.kind].artifact:
        for name in stage.names:
            state, reason = job.catalog.standing(artifact, name, job.record(artifact, name))
            if state is not Standing.OK:
                return reason
    return None


def require_possible(job: Job, stage: Stage) -> None:
    """Refuse targets that cannot be read, and files that no run of the recipe wrote.

    Raises SlsguError.
    """
    if not isinstance(stage, FileStage):
        return
    if stage.origin is not None:
        slsgu.read_target(stage.origin)
    if job.ledger.stage(stage.key) is None:
        # Other files in the folder of the edits stay.
        places = stage.files.values() if stage.kind is StageKind.EDITS else [stage.place]
        for path in places:
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                raise InputError(f"{path} exists already, and this recipe did not write it")
