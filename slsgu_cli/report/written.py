"""Models that were written without a concept: digests of their files, and the edits in them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slsgu_cli.checkpoints.destinations import all_files
from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.engine.find_edits import FoundEdit, Presence, find_edits
from slsgu_cli.errors import MissingError, SlsguError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.options import StrengthOptions
from slsgu_cli.records.recipe import written_at
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.digests import file_sha256
from slsgu_cli.store.store import Store


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A model's file and its SHA-256 in the original and in the written model."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """A model that was written without a concept: its files, and the edits in it.

    `origin` is the model that it was made from. `troubles` say what could not be read or has
    changed since.
    """

    label: str
    place: Path
    origin: str
    files: tuple[FileDigest, ...]
    edits: tuple[FoundEdit, ...]
    troubles: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """The folder that its file names are relative to."""
        return self.place.parent if self.place.is_file() else self.place

    def holds(self, name: str) -> Presence | None:
        """Return how an edit is present in the copies of its layer; None if it is in none."""
        presences = {edit.presence for edit in self.edits if edit.name == name}
        return max(presences, key=list(Presence).index, default=None)

    def sharing(self, names: Collection[str]) -> list[str]:
        """Return these edits and all that change the same layers; they are checked together."""
        layers = {edit.layer for edit in self.edits if edit.name in names}
        return sorted({*names, *(edit.name for edit in self.edits if edit.layer in layers)})


def written_model(
    store: Store,
    label: str,
    place: Path,
    *,
    origin: ModelSpec | Path,
    names: Sequence[str],
    made: str | None,
) -> WrittenModel:
    """Return the digests of a model's files and of its origin's, and the edits in it.

    `names` are the edits to look for. `made` is the digest that a run recorded when it wrote
    the model.
    """
    troubles = []
    before: dict[str, str] = {}
    try:
        before = _file_digests(_files_of(origin))
    except (SlsguError, OSError) as error:
        troubles.append(f"The original {origin} cannot be read: {error}.")
    after: dict[str, str] = {}
    edits: list[FoundEdit] = []
    try:
        after = _file_digests(_files_of(place))
        if made is not None and made != digest(
            after if place.is_dir() else {"": after[place.name]}
        ):
            troubles.append("Its files have changed since the run wrote them.")
        edits = find_edits(store, names, place, StrengthOptions()) if names else []
    except (SlsguError, OSError) as error:
        troubles.append(f"{place} cannot be read: {error}.")
    digests = tuple(
        FileDigest(name, before.get(name), after.get(name)) for name in sorted({*before, *after})
    )
    return WrittenModel(label, place, str(origin), digests, tuple(edits), tuple(troubles))


def written_fingerprint(model: ModelSpec, place: Path) -> str | None:
    """Return the present fingerprint of a copy of a model; None if it is not a CLIP."""
    try:
        return fingerprint(resolve(written_at(model, place)))
    except (SlsguError, OSError):
        return None


def _files_of(model: ModelSpec | Path) -> dict[str, Path]:
    """Return the files of a model by name. Raises MissingError, InputError."""
    path = model
    if isinstance(path, ModelSpec):
        resolved = resolve(path)
        path = resolved.folder or resolved.weights
    if not path.exists():
        raise MissingError(f"there is no {path}")
    return all_files(path) if path.is_dir() else {path.name: path}


def _file_digests(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: file_sha256(path) for name, path in files.items()}
