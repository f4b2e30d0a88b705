"""What the store knows of a set: its records, and whether each may be shown."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from slsgu_cli.checkpoints.edits import Edit, by_layer, earlier_edits, read_edit
from slsgu_cli.checkpoints.number_formats import PRECISION, layer_digest, narrow, widen
from slsgu_cli.checkpoints.stored_layer import moved_values
from slsgu_cli.errors import SlsguError
from slsgu_cli.records.comparison import ClipComparison
from slsgu_cli.records.method import (
    EditHeader,
    GradientHeader,
    GradientPointer,
    Ranking,
    Trials,
)
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.studies import JointSearch, Sweep
from slsgu_cli.records.verification import Verification
from slsgu_cli.store.artifacts import TABLE, Artifact, read_manifest
from slsgu_cli.store.catalog import Catalog, Standing

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredRecord(Generic[T]):
    """One record if it may be shown, or the `trouble` that prevents it.

    `state` is None if the store has no such record. `run` is the command that makes it.
    """

    noun: str
    path: str
    run: str
    record: T | None = None
    state: Standing | None = None
    trouble: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class EditFacts:
    """The digests of the edited layer by precision, and how many of its values change."""

    before: dict[str, str]
    after: dict[str, str]
    changed: int
    values: int


@dataclass(frozen=True, slots=True)
class SetRecords:
    """All records of one set."""

    name: str
    concept: str
    manifest: StoredRecord[SetManifest]
    pointer: StoredRecord[GradientPointer]
    ranking: StoredRecord[Ranking]
    trials: StoredRecord[Trials]
    edit: StoredRecord[EditHeader]
    on_targets: dict[str, StoredRecord[EditHeader]]
    trajectory: StoredRecord[Trials]
    joint: dict[str, StoredRecord[JointSearch]]
    sweeps: dict[str, StoredRecord[Sweep]]
    verification: StoredRecord[Verification]
    comparison: StoredRecord[ClipComparison]
    gradients: dict[str, GradientHeader] = field(default_factory=dict)
    facts: EditFacts | None = None

    def all(self) -> list[StoredRecord[Any]]:
        """Return all records, each after those it was made from."""
        return [
            self.manifest,
            self.pointer,
            self.ranking,
            self.trials,
            self.edit,
            *self.on_targets.values(),
            self.trajectory,
            *self.joint.values(),
            *self.sweeps.values(),
            self.verification,
            self.comparison,
        ]


def gather(catalog: Catalog, name: str) -> SetRecords:
    """Return what the store knows of a set. Raises MissingError if it has no such set."""
    manifest = read_manifest(catalog.store, name)
    pointer: StoredRecord[GradientPointer] = _stored(catalog, Artifact.POINTER, name)
    edit: StoredRecord[EditHeader] = _stored(catalog, Artifact.EDIT, name)
    digests = {}
    if pointer.record:
        digests = {"forget": pointer.record.forget, "retain": pointer.record.retain}
    facts = None
    if edit.record:
        whole = read_edit(catalog.store, edit.path)
        facts = edit_facts(whole, earlier_edits(catalog.store, [whole]))
    joint = catalog.readable(Artifact.JOINT)
    sweeps = catalog.readable(Artifact.SWEEP)
    return SetRecords(
        name=name,
        concept=manifest.concept,
        manifest=_stored(catalog, Artifact.SET, name),
        pointer=pointer,
        ranking=_stored(catalog, Artifact.RANKING, name),
        trials=_stored(catalog, Artifact.TRIALS, name),
        edit=edit,
        on_targets={
            label: _stored(catalog, Artifact.EDIT, label, f" {label}")
            for label, header in sorted(catalog.readable(Artifact.EDIT).items())
            if header.target and label.startswith(f"{name}@")
        },
        trajectory=_stored(catalog, Artifact.TRAJECTORY, name),
        joint={
            label: _stored(catalog, Artifact.JOINT, label, f" {label}")
            for label, record in sorted(joint.items())
            if name in record.names and record.stages
        },
        sweeps={
            label: _stored(catalog, Artifact.SWEEP, label, f" {label}")
            for label, record in sorted(sweeps.items())
            if any(row.name == name for row in record.rows)
        },
        verification=_stored(catalog, Artifact.VERIFICATION, name),
        comparison=_stored(catalog, Artifact.COMPARISON, name),
        gradients={role: catalog.get(Artifact.GRADIENT, d) for role, d in digests.items()},
        facts=facts,
    )


def _stored(catalog: Catalog, kind: Artifact, name: str, suffix: str = "") -> StoredRecord[Any]:
    """Return a record and whether it may be shown; `suffix` goes behind its noun."""
    noun, path, run = TABLE[kind].noun + suffix, kind.path(name), kind.command(name)
    record = catalog.read(kind, name)
    if record is None:
        return StoredRecord(noun, path, run, trouble=f"There is no {noun} yet.")
    sha256 = hashlib.sha256(catalog.store.read_bytes(path)).hexdigest()
    damaged = isinstance(record, SlsguError)
    state, reason = (
        (Standing.DAMAGED, record.message) if damaged else catalog.standing(kind, name, record)
    )
    if state is Standing.OK:
        return StoredRecord(noun, path, run, record, state, sha256=sha256)
    return StoredRecord(noun, path, run, None, state, f"The {noun} is {state}: {reason}.", sha256)


def edit_facts(edit: Edit, earlier: Sequence[Edit] = ()) -> EditFacts:
    """Return what the edit changes in its layer, rounded as `apply` rounds it.

    `earlier` edits of the same layer are included.
    """
    before, delta = edit.before(), edit.delta()
    in_layer = by_layer([edit, *earlier])[edit.header.layer]
    after = {}
    for dtype in ("F32", "F16", "BF16"):
        deltas = [(1.0, each.delta()) for each in in_layer]
        stored, _ = moved_values(narrow(before, dtype), deltas, dtype)
        after[PRECISION[dtype]] = layer_digest(widen(stored, dtype), "fp32")
    changed = int((delta != 0).sum())
    return EditFacts(edit.header.digests, after, changed, int(delta.size))
