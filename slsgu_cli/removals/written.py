"""A model that was written without some concepts: its files, and the edits in it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import slsgu_cli as slsgu
from slsgu_cli import FoundEdit, Presence, Store
from slsgu_cli.errors import MissingError, SlsguError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.options import StrengthOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.removals.stage import file_sha256, files_of


@dataclass(frozen=True, slots=True)
class FileDigest:
    """The SHA-256 of a file in the original model and in the written one."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """A written model. `troubles` name what cannot be read or differs from what was written."""

    label: str
    place: Path
    origin: str
    files: tuple[FileDigest, ...]
    edits: tuple[FoundEdit, ...]
    troubles: tuple[str, ...]

    @property
    def root(self) -> Path:
        """The folder that file names are relative to."""
        return self.place.parent if self.place.is_file() else self.place

    def presence(self, name: str) -> Presence | None:
        """Return whether an edit is in every copy of its layer; None if it was not looked for."""
        presences = {edit.presence for edit in self.edits if edit.name == name}
        return max(presences, key=list(Presence).index, default=None)

    def sharing(self, names: Collection[str]) -> list[str]:
        """Return these edits and all others in the same layers: they are checked together."""
        layers = {edit.layer for edit in self.edits if edit.name in names}
        return sorted({*names, *(edit.name for edit in self.edits if edit.layer in layers)})


def written_model(
    store: Store,
    label: str,
    place: Path,
    *,
    origin: ModelSpec | Path,
    names: Sequence[str],
    output: str | None,
) -> WrittenModel:
    """Return the files of a model and of its origin, and which of these edits it contains.

    `output` is the digest in the ledger of the files that a run wrote.
    """
    troubles = []
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    edits: list[FoundEdit] = []
    try:
        before = _digests(_path_of(origin))
    except (SlsguError, OSError) as error:
        troubles.append(f"Cannot read the original {origin}: {error}.")
    try:
        after = _digests(place)
        if output is not None and output != digest(after):
            troubles.append(f"The files of {place} have changed since the run wrote them.")
        edits = slsgu.find_edits(store, names, place, StrengthOptions()) if names else []
    except (SlsguError, OSError) as error:
        troubles.append(f"Cannot check {place}: {error}.")
    files = (
        FileDigest(name, before.get(name), after.get(name)) for name in sorted({*before, *after})
    )
    return WrittenModel(label, place, str(origin), tuple(files), tuple(edits), tuple(troubles))


def _path_of(model: ModelSpec | Path) -> Path:
    if isinstance(model, Path):
        return model
    resolved = slsgu.resolve(model)
    return resolved.folder or resolved.weights


def _digests(place: Path) -> dict[str, str]:
    if not place.exists():
        raise MissingError(f"there is no {place}")
    return {name: file_sha256(path) for name, path in files_of(place).items()}
