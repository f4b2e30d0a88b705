"""The outputs of a job, one class each."""

import shutil
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import slsgu_cli as slsgu
from slsgu_cli import Artifact
from slsgu_cli.records.codec import digest
from slsgu_cli.records.ledger import RequestState, StageKind
from slsgu_cli.records.method import LoraLayout
from slsgu_cli.records.options import ApplyOptions, ApplyRequest, ExportRequest, ReportRequest
from slsgu_cli.removals.evidence import write_evidence
from slsgu_cli.removals.job import Job
from slsgu_cli.removals.recipe import EvidenceRequest
from slsgu_cli.removals.stage import FileStage, files_of


class CheckpointStage(FileStage):
    """Write the checkpoint with all edits. Without requests, it is a copy of the original."""

    kind = StageKind.CHECKPOINT

    def run(self, job: Job) -> None:
        """Write the checkpoint."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        if self.names:
            slsgu.apply(job.store, ApplyRequest(names=self.names, out=self.place, overwrite=True))
        else:
            slsgu.copy_original(job.recipe.model, self.place, options=ApplyOptions(overwrite=True))


@dataclass(frozen=True, slots=True)
class TargetStage(FileStage):
    """Write a copy of a target with the edits of the requests that name it.

    If no request names it any more, the copy is written again without edits.
    """

    kind = StageKind.TARGET
    origin: Path

    def inputs(self, job: Job) -> dict[str, str]:
        """Return digests of the edits, and of the sizes and times of the target's files."""
        states = {name: path.stat() for name, path in files_of(self.origin).items()}
        stamps = {name: [s.st_size, s.st_mtime_ns] for name, s in states.items()}
        return {**FileStage.inputs(self, job), "target": digest(stamps)}

    def require_possible(self, job: Job) -> None:
        """Refuse a target that cannot be read, and a place with other files."""
        slsgu.read_target(self.origin)
        FileStage.require_possible(self, job)

    def run(self, job: Job) -> None:
        """Write the copy."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        if self.names:
            request = ApplyRequest(
                names=self.names, out=self.place, target=self.origin, overwrite=True
            )
            slsgu.apply(job.store, request)
            return
        with slsgu.replacing(self.place) as partial:
            copy = shutil.copytree if self.origin.is_dir() else shutil.copy2
            copy(self.origin, partial)


class EditsStage(FileStage):
    """Copy the edits to a folder."""

    kind = StageKind.EDITS

    def files(self) -> dict[str, Path]:
        """Return the files of the edits."""
        return {name: self.place / f"{name}.safetensors" for name in self.names}

    def replaced(self) -> list[Path]:
        """Return the files of the edits: others in the folder stay."""
        return [*self.files().values()]

    def run(self, job: Job) -> None:
        """Copy the edits, and remove those of withdrawn requests."""
        self.place.mkdir(parents=True, exist_ok=True)
        for name, path in self.files().items():
            with slsgu.replacing(path) as partial:
                partial.write_bytes(job.store.read_bytes(Artifact.EDIT.path(name)))
        for row in job.ledger.rows:
            if row.state is RequestState.WITHDRAWN and row.name not in self.names:
                with suppress(FileNotFoundError):
                    (self.place / f"{row.name}.safetensors").unlink()


class LoraStage(FileStage):
    """Write one LoRA of all edits. Without requests, there is none."""

    kind = StageKind.LORA

    def files(self) -> dict[str, Path]:
        """Return the files of the LoRA."""
        return files_of(self.place) if self.names else {}

    def run(self, job: Job) -> None:
        """Write the LoRA, or remove it."""
        if not self.names:
            shutil.rmtree(self.place) if self.place.is_dir() else self.place.unlink(missing_ok=True)
            return
        layout = LoraLayout.LORA if self.place.suffix == ".safetensors" else LoraLayout.PEFT
        request = ExportRequest(
            names=self.names,
            out=self.place,
            layout=layout,
            overwrite=True,
            device=job.recipe.search.device,
        )
        slsgu.export(job.store, request)


class ReportStage(FileStage):
    """Write the report."""

    kind = StageKind.REPORT

    def inputs(self, job: Job) -> dict[str, str]:
        """Return digests of the written model, the evaluation sets and the verifications."""
        verified = [
            job.catalog.get(Artifact.VERIFICATION, name)
            and job.catalog.digest(Artifact.VERIFICATION, name)
            for name in self.names
        ]
        return {**job.measured_inputs(self.names), "verifications": digest(verified)}

    def run(self, job: Job) -> None:
        """Write the report."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        device = job.recipe.search.device
        request = ReportRequest(names=self.names, out=self.place, overwrite=True, device=device)
        slsgu.write_report(job.store, request)


class EvidenceStage(ReportStage):
    """Write the evidence of all requests."""

    kind = StageKind.EVIDENCE

    def inputs(self, job: Job) -> dict[str, str]:
        """Return what the report has, and digests of the requests and their bounds."""
        recipe = job.recipe
        requests = [
            {field.name: str(getattr(request, field.name)) for field in fields(request)}
            for request in recipe.requests
        ]
        return {
            **ReportStage.inputs(self, job),
            "requests": digest(requests),
            "bounds": digest([str(bound) for bound in recipe.bounds]),
        }

    def run(self, job: Job) -> None:
        """Write the evidence, with the state of each request by now."""
        job.settle()
        recipe = Path(f"{job.recipe.name}.toml")
        request = EvidenceRequest(names=self.names, out=self.place, recipe=recipe, overwrite=True)
        write_evidence(job, request)
