"""Stages of a job, and the files that some of them write."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from slsgu_cli.records.ledger import StageKey, StageKind


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a job: its kind and its requests."""

    kind: StageKind
    names: tuple[str, ...]

    @property
    def key(self) -> StageKey:
        """The identity of the stage in the ledger."""
        return self.kind, self.names, None

    @property
    def about(self) -> str:
        """The request, the number of requests, or the output."""
        return self.names[0] if len(self.names) == 1 else f"{len(self.names)} requests"


@dataclass(frozen=True, slots=True)
class FileStage(Stage):
    """A stage that writes a file or folder outside the store.

    A copy of a target has an `origin`.
    """

    place: Path
    origin: Path | None = None

    @property
    def key(self) -> StageKey:
        """The identity of the stage, which stays the same when requests change."""
        return self.kind, (), str(self.place)

    @property
    def about(self) -> str:
        """The output."""
        return str(self.place)

    @property
    def files(self) -> dict[str, Path]:
        """The files of the output by name."""
        if self.kind is StageKind.EDITS:
            return {name: self.place / f"{name}.safetensors" for name in self.names}
        # Without requests, there is no LoRA.
        return {} if self.kind is StageKind.LORA and not self.names else files_of(self.place)


def files_of(place: Path) -> dict[str, Path]:
    """Return the files below a folder by name, or a file under its own name."""
    if not place.is_dir():
        return {place.name: place}
    return {str(p.relative_to(place)): p for p in sorted(place.rglob("*")) if p.is_file()}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
