"""A written model without some concepts: its files, and the edits in it."""

from dataclasses import dataclass
from pathlib import Path

import slsgu_cli as slsgu
from slsgu_cli import FoundEdit, Presence, Store
from slsgu_cli.errors import MissingError, SlsguError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.ledger import Ledger, StageKind, StageRecord
from slsgu_cli.records.options import StrengthOptions
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
    place: str
    origin: str
    files: tuple[FileDigest, ...]
    names: tuple[str, ...]
    edits: tuple[FoundEdit, ...]
    troubles: tuple[str, ...]

    def presence(self, name: str) -> Presence | None:
        """Return whether an edit is in every copy of its layer; None if it was not looked for."""
        presences = {edit.presence for edit in self.edits if edit.name == name}
        return max(presences, key=list(Presence).index, default=None)


def written_models(store: Store, ledger: Ledger) -> list[WrittenModel]:
    """Return the checkpoint and the copies of targets that a recipe's runs wrote."""
    models: list[WrittenModel] = []
    for record in ledger.stages:
        if record.output and record.kind in (StageKind.CHECKPOINT, StageKind.TARGET):
            label = Path(record.place or "").resolve().name
            if label in [each.label for each in models]:
                label = f"{label}-{len(models) + 1}"
            models.append(_written(store, label, record, ledger))
    return models


def _written(store: Store, label: str, record: StageRecord, ledger: Ledger) -> WrittenModel:
    place, origin = Path(record.place or ""), record.origin or str(ledger.model)
    troubles = []
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    edits: list[FoundEdit] = []
    try:
        before = _digests(Path(record.origin) if record.origin else _original(ledger))
    except (SlsguError, OSError) as error:
        troubles.append(f"Cannot read the original {origin}: {error}.")
    try:
        after = _digests(place)
        if record.output != digest(after):
            troubles.append(f"The files of {place} have changed since the run wrote them.")
        if record.names:
            edits = slsgu.find_edits(store, record.names, place, StrengthOptions())
    except (SlsguError, OSError) as error:
        troubles.append(f"Cannot check {place}: {error}.")
    return WrittenModel(
        label,
        str(place),
        origin,
        tuple(FileDigest(n, before.get(n), after.get(n)) for n in sorted({*before, *after})),
        record.names,
        tuple(edits),
        tuple(troubles),
    )


def _original(ledger: Ledger) -> Path:
    resolved = slsgu.resolve(ledger.model)
    return resolved.folder or resolved.weights


def _digests(place: Path) -> dict[str, str]:
    if not place.exists():
        raise MissingError(f"there is no {place}")
    return {name: file_sha256(path) for name, path in files_of(place).items()}
