"""What a store knows of one name: its records, and whether each may be shown as true."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from shlex import quote
from typing import Any, Generic, TypeVar

from slsgu_cli.baselines.records import Comparison
from slsgu_cli.dtypes import PRECISION, narrow, widen
from slsgu_cli.edits import Edit, read_edit
from slsgu_cli.errors import SlsguError
from slsgu_cli.layout import read_manifest
from slsgu_cli.planning import moved_values
from slsgu_cli.records import (
    EditHeader,
    GradientHeader,
    GradientPointer,
    Ranking,
    SetManifest,
    Trials,
)
from slsgu_cli.several.records import JointSearch, Sweep
from slsgu_cli.shelf import CHECKS, PLACES, Kind, Shelf, State
from slsgu_cli.store import Store
from slsgu_cli.verification.records import Verification
from slsgu_cli.weights import layer_digest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding(Generic[T]):
    """One record as the store has it: the record where it may be shown, else why not.

    `state` is None where there is none; `run` is the command that makes it.
    """

    what: str
    path: str
    run: str
    record: T | None = None
    state: State | None = None
    reason: str | None = None
    sha256: str | None = None

    @property
    def trouble(self) -> str | None:
        """Why the record is not shown; None where it is."""
        if self.record is not None:
            return None
        if self.state is None:
            return f"There is no {self.what} yet."
        return f"The {self.what} is {self.state}: {self.reason}."


@dataclass(frozen=True, slots=True)
class EditFacts:
    """What an edit changes: digests of the layer before and after by precision."""

    before: dict[str, str]
    after: dict[str, str]
    changed: int
    values: int


@dataclass(frozen=True, slots=True)
class Dossier:
    """All that is known of one name."""

    name: str
    concept: str
    manifest: Finding[SetManifest]
    pointer: Finding[GradientPointer]
    ranking: Finding[Ranking]
    trials: Finding[Trials]
    edit: Finding[EditHeader]
    trajectory: Finding[Trials]
    joint: dict[str, Finding[JointSearch]]
    sweeps: dict[str, Finding[Sweep]]
    verification: Finding[Verification]
    comparison: Finding[Comparison]
    gradients: dict[str, GradientHeader] = field(default_factory=dict)
    facts: EditFacts | None = None

    def findings(self) -> list[Finding[Any]]:
        """Return every record in the order in which one is made from another."""
        found: list[Finding[Any]] = [self.manifest, self.pointer, self.ranking, self.trials]
        found += [self.edit, self.trajectory, *self.joint.values(), *self.sweeps.values()]
        return [*found, self.verification, self.comparison]


def gather(store: Store, name: str, shelf: Shelf) -> Dossier:
    """Return what the store knows of `name`. Raises MissingError where it has no such set."""
    manifest = read_manifest(store, name)
    word = quote(name)

    def find(kind: Kind, what: str, command: str, label: str = name) -> Finding[Any]:
        return _find(store, shelf, kind, label, Finding(what, "", f"slsgu {command}"))

    pointer = find(Kind.POINTER, "gradients", f"grad {word}")
    edit = find(Kind.EDIT, "edit", f"search {word}")
    named = pointer.record and {"forget": pointer.record.forget, "retain": pointer.record.retain}
    joint = _about(shelf, Kind.JOINT, lambda found: name in found.names)
    swept = _about(shelf, Kind.SWEEP, lambda sweep: any(row.name == name for row in sweep.rows))
    return Dossier(
        name=name,
        concept=manifest.concept,
        manifest=find(Kind.SET, "set", f"build-sets {word} ..."),
        pointer=pointer,
        ranking=find(Kind.RANKING, "ranking", f"rank {word}"),
        trials=find(Kind.TRIALS, "search", f"search {word}"),
        edit=edit,
        trajectory=find(Kind.TRAJECTORY, "trajectory", f"trajectory {word}"),
        joint={
            label: find(Kind.JOINT, f"joint search {label}", "search ... --joint", label)
            for label in joint
        },
        sweeps={
            label: find(Kind.SWEEP, f"sweep {label}", f"sweep {quote(label)} ...", label)
            for label in swept
        },
        verification=find(Kind.VERIFICATION, "verification", f"verify {word}"),
        comparison=find(Kind.COMPARISON, "comparison", f"compare {word}"),
        gradients={role: shelf.get(Kind.GRADIENT, d) for role, d in (named or {}).items()},
        facts=edit_facts(read_edit(store, edit.path)) if edit.record else None,
    )


def _about(shelf: Shelf, kind: Kind, concerns: Callable[[Any], bool]) -> list[str]:
    """Return the names of the records of a kind that concern the set, stale ones too."""
    return [
        label
        for label, record in sorted(shelf.read[kind].items())
        if not isinstance(record, SlsguError) and concerns(record)
    ]


def _find(store: Store, shelf: Shelf, kind: Kind, name: str, sought: Finding[Any]) -> Finding[Any]:
    folder, suffix, _ = PLACES[kind]
    sought = replace(sought, path=f"{folder}/{name}{suffix}")
    met = shelf.read[kind].get(name)
    if met is None:
        return sought
    sha256 = hashlib.sha256(store.read_bytes(sought.path)).hexdigest()
    if isinstance(met, SlsguError):
        return replace(sought, state=State.DAMAGED, reason=met.message, sha256=sha256)
    state, reason = CHECKS[kind](shelf, name, met)
    record = met if state is State.OK else None
    return replace(sought, record=record, state=state, reason=reason, sha256=sha256)


def edit_facts(edit: Edit) -> EditFacts:
    """Return what the edit makes of the layer, rounded as `apply` rounds it."""
    before, delta = edit.before(), edit.delta()
    after = {}
    for dtype in ("F32", "F16", "BF16"):
        stored, _ = moved_values(narrow(before, dtype), [(1.0, delta)], dtype)
        after[PRECISION[dtype]] = layer_digest(widen(stored, dtype), "fp32")
    changed = int((delta != 0).sum())
    return EditFacts(edit.header.digests, after, changed, int(delta.size))
