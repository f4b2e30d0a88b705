"""The folder that `generate` and `ask` write into, which an interrupted run resumes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slsgu_cli.store.artifacts import TABLE, Artifact
from slsgu_cli.store.store import Store

# A digest of the inputs, as long as the images are incomplete.
MADE_FROM = ".made-from"


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """A folder of images, and the record next to it once it is complete."""

    store: Store
    folder: str
    record: str

    @classmethod
    def at(
        cls, store: Store, name: str, out: Path | None, kind: Artifact = Artifact.GENERATION
    ) -> "OutputFolder":
        """Return the folder for the set `name`: `out` if given, otherwise in the store."""
        if out is not None:
            return cls(Store(str(out)), "", f"{TABLE[kind].folder}.json")
        return cls(store, kind.folder_of(name), kind.path(name))

    def write(self, path: str, data: bytes) -> None:
        """Write one file into the folder."""
        self.store.write_bytes(self._inside(path), data)

    def read(self, path: str) -> bytes | None:
        """Return a file of the folder, or None if it does not exist."""
        inside = self._inside(path)
        return self.store.read_bytes(inside) if self.store.exists(inside) else None

    def finish(self, record: Any) -> None:
        """Write the record. It comes last and marks the folder as complete."""
        self.store.write_record(self.record, record)
        self.store.remove(self._inside(MADE_FROM))

    def resume(self, made_from: str, files: Iterable[str]) -> None:
        """Keep the images of an interrupted run with the same inputs; otherwise start over.

        `files` are the files to write; those of other runs are removed.
        """
        inputs = self.read(MADE_FROM)
        if self.store.exists(self.record) or inputs is None or inputs.decode() != made_from:
            self.begin()
            for name in files:
                self.store.remove(self._inside(name))
            self.write(MADE_FROM, made_from.encode())

    def begin(self) -> None:
        """Remove the output of an earlier run, its record first."""
        self.store.remove(self.record)
        if self.folder:
            self.store.remove(self.folder)

    def where(self, path: str) -> str:
        """Return the location of a file, for people and other programs."""
        return self.store.where(self._inside(path))

    def _inside(self, path: str) -> str:
        return f"{self.folder}/{path}" if self.folder else path
