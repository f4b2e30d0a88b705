"""The inputs of outputs outside the store, and how each is written."""

import shutil
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import slsgu_cli as slsgu
from slsgu_cli import Artifact
from slsgu_cli.records.codec import digest
from slsgu_cli.records.ledger import RequestState
from slsgu_cli.records.method import LoraLayout
from slsgu_cli.records.options import ApplyOptions, ApplyRequest, ExportRequest, ReportRequest
from slsgu_cli.removals.evidence import write_evidence
from slsgu_cli.removals.job import Job
from slsgu_cli.removals.recipe import EvidenceRequest
from slsgu_cli.removals.stage import FileStage, files_of


def edit_inputs(job: Job, stage: FileStage) -> dict[str, str]:
    """Return digests of the edits, of the original weights, and of the state of a target's files.

    A target's files may be large, so their sizes and times stand for them.
    """
    inputs = {"edits": job.edits(stage.names), "weights": job.weights}
    if stage.origin is None:
        return inputs
    states = {name: path.stat() for name, path in files_of(stage.origin).items()}
    stamps = {name: [s.st_size, s.st_mtime_ns] for name, s in states.items()}
    return {**inputs, "target": digest(stamps)}


def write_checkpoint(job: Job, stage: FileStage) -> None:
    """Write the checkpoint with all edits. Without requests, it is a copy of the original."""
    stage.place.parent.mkdir(parents=True, exist_ok=True)
    if stage.names:
        slsgu.apply(job.store, ApplyRequest(names=stage.names, out=stage.place, overwrite=True))
    else:
        slsgu.copy_original(job.recipe.model, stage.place, options=ApplyOptions(overwrite=True))


def write_target(job: Job, stage: FileStage) -> None:
    """Write a copy of a target with the edits of the requests that name it, or without edits."""
    origin = stage.origin or Path()
    stage.place.parent.mkdir(parents=True, exist_ok=True)
    if stage.names:
        request = ApplyRequest(names=stage.names, out=stage.place, target=origin, overwrite=True)
        slsgu.apply(job.store, request)
        return
    with slsgu.replacing(stage.place) as partial:
        copy = shutil.copytree if origin.is_dir() else shutil.copy2
        copy(origin, partial)


def write_edits(job: Job, stage: FileStage) -> None:
    """Copy the edits to a folder, and remove those of withdrawn requests."""
    stage.place.mkdir(parents=True, exist_ok=True)
    for name, path in stage.files.items():
        with slsgu.replacing(path) as partial:
            partial.write_bytes(job.store.read_bytes(Artifact.EDIT.path(name)))
    for row in job.ledger.rows:
        if row.state is RequestState.WITHDRAWN and row.name not in stage.names:
            with suppress(FileNotFoundError):
                (stage.place / f"{row.name}.safetensors").unlink()


def write_lora(job: Job, stage: FileStage) -> None:
    """Write one LoRA of all edits. Without requests, remove it."""
    place = stage.place
    if not stage.names:
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        return
    layout = LoraLayout.LORA if place.suffix == ".safetensors" else LoraLayout.PEFT
    device = job.recipe.search.device
    request = ExportRequest(
        names=stage.names, out=place, layout=layout, overwrite=True, device=device
    )
    slsgu.export(job.store, request)


def report_inputs(job: Job, stage: FileStage) -> dict[str, str]:
    """Return digests of the written model, the evaluation sets and the verifications."""
    verified = [
        job.catalog.get(Artifact.VERIFICATION, name)
        and job.catalog.digest(Artifact.VERIFICATION, name)
        for name in stage.names
    ]
    return {**job.measured_inputs(stage.names), "verifications": digest(verified)}


def write_report(job: Job, stage: FileStage) -> None:
    """Write the report."""
    stage.place.parent.mkdir(parents=True, exist_ok=True)
    device = job.recipe.search.device
    request = ReportRequest(names=stage.names, out=stage.place, overwrite=True, device=device)
    slsgu.write_report(job.store, request)


def evidence_inputs(job: Job, stage: FileStage) -> dict[str, str]:
    """Return what the report has, and digests of the requests and their bounds."""
    requests = [
        {field.name: str(getattr(request, field.name)) for field in fields(request)}
        for request in job.recipe.requests
    ]
    return {
        **report_inputs(job, stage),
        "requests": digest(requests),
        "bounds": digest([str(bound) for bound in job.recipe.bounds]),
    }


def write_all_evidence(job: Job, stage: FileStage) -> None:
    """Write the evidence, with the state of each request by now."""
    job.settle()
    recipe = Path(f"{job.recipe.name}.toml")
    request = EvidenceRequest(names=stage.names, out=stage.place, recipe=recipe, overwrite=True)
    write_evidence(job, request)
