"""A stage of a job: its inputs, its output, and how it runs."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slsgu_cli import Artifact, Standing
from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.ledger import StageKey, StageKind
from slsgu_cli.removals.job import Job


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a job. Subclasses say what it reads, writes and does."""

    kind: ClassVar[StageKind]
    names: tuple[str, ...]

    @property
    def key(self) -> StageKey:
        """The identity of the stage in the ledger."""
        return self.kind, self.names, None

    @property
    def about(self) -> str:
        """The request, the number of requests, or the output."""
        return self.names[0] if len(self.names) == 1 else f"{len(self.names)} requests"

    def inputs(self, job: Job) -> dict[str, str]:
        """Return digests of the options and of everything the stage reads.

        Raises NotYetError if an earlier stage has not run.
        """
        raise NotImplementedError

    def output(self, job: Job) -> str:
        """Return a digest of the output as it is now. Raises NotYetError, OSError."""
        raise NotImplementedError

    def fault(self, job: Job) -> str | None:
        """Return why the output cannot be used; None if it can."""
        del job
        return None

    def require_possible(self, job: Job) -> None:
        """Raise an SlsguError if the stage is certain to fail."""

    def run(self, job: Job) -> None:
        """Run the stage."""
        raise NotImplementedError


class ArtifactStage(Stage):
    """A stage whose output is an artifact of the store for each of its requests."""

    artifact: ClassVar[Artifact]

    def output(self, job: Job) -> str:
        """Return a digest of the artifacts."""
        return digest([job.digest(self.artifact, name) for name in self.names])

    def fault(self, job: Job) -> str | None:
        """Return why an artifact is damaged or stale."""
        for name in self.names:
            record = job.record(self.artifact, name)
            state, reason = job.catalog.standing(self.artifact, name, record)
            if state is not Standing.OK:
                return reason
        return None


@dataclass(frozen=True, slots=True)
class FileStage(Stage):
    """A stage that writes a file or folder outside the store."""

    place: Path

    @property
    def key(self) -> StageKey:
        """The identity of the stage, which stays the same when requests change."""
        return self.kind, (), str(self.place)

    @property
    def about(self) -> str:
        """The output."""
        return str(self.place)

    def files(self) -> dict[str, Path]:
        """Return the files of the output by name."""
        return files_of(self.place)

    def output(self, job: Job) -> str:
        """Return a digest of the files."""
        del job
        return digest({name: file_sha256(path) for name, path in self.files().items()})

    def inputs(self, job: Job) -> dict[str, str]:
        """Return digests of the edits and of the original weights."""
        return {"edits": job.edits(self.names), "weights": job.weights}

    def require_possible(self, job: Job) -> None:
        """Refuse to replace files that no run of the recipe wrote. Raises InputError."""
        if job.ledger.stage(self.key) is not None:
            return
        for path in self.replaced():
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                raise InputError(f"{path} exists already, and this recipe did not write it")

    def replaced(self) -> list[Path]:
        """Return what the output would replace."""
        return [self.place]


def files_of(place: Path) -> dict[str, Path]:
    """Return the files below a folder by name, or a file under its own name."""
    if not place.is_dir():
        return {place.name: place}
    return {str(p.relative_to(place)): p for p in sorted(place.rglob("*")) if p.is_file()}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
