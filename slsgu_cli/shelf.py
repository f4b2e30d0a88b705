"""The records of a store, read once, and whether what they were made from still stands.

Nothing is called unreferenced while a record that might refer to it cannot be read.
"""

import json
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from slsgu_cli.baselines.records import Comparison
from slsgu_cli.curation.records import Collection
from slsgu_cli.erasing.records import PipelineComparison
from slsgu_cli.errors import InputError, MissingError, SlsguError
from slsgu_cli.generation.records import Answers, GeneratedSource, Generation, TargetTrials
from slsgu_cli.records import (
    DataRef,
    EditHeader,
    GradientHeader,
    GradientPointer,
    MomentHeader,
    Ranking,
    SetManifest,
    SquaresHeader,
    Trials,
    digest,
)
from slsgu_cli.several.records import JointSearch, Sweep
from slsgu_cli.store import Store
from slsgu_cli.verification.records import Verification


class Kind(StrEnum):
    """Kinds of artifact, in the order in which one is made from another."""

    COLLECTION = "collection"
    SET = "set"
    DATA = "data"
    POINTER = "pointer"
    GRADIENT = "gradient"
    MOMENTS = "moments"
    SQUARES = "squares"
    RANKING = "ranking"
    TRIALS = "trials"
    TRAJECTORY = "trajectory"
    JOINT = "joint"
    SWEEP = "sweep"
    EDIT = "edit"
    VERIFICATION = "verification"
    COMPARISON = "comparison"
    PLOT = "plot"
    TARGET_TRIALS = "target trials"
    TARGET_COMPARISON = "target comparison"
    GENERATED = "generated source"
    GENERATION = "generation"
    ANSWERS = "answers"
    UNFINISHED = "unfinished"


class State(StrEnum):
    """Whether an artifact can be used as it stands."""

    OK = "ok"
    STALE = "stale"
    UNREFERENCED = "unreferenced"
    DAMAGED = "damaged"


# Which records lie where. Data blocks and plots have no record of ours.
PLACES: dict[Kind, tuple[str, str, type[Any]]] = {
    Kind.COLLECTION: ("collections", ".json", Collection),
    Kind.SET: ("sets", ".json", SetManifest),
    Kind.POINTER: ("gradients", ".json", GradientPointer),
    Kind.GRADIENT: ("gradients", ".safetensors", GradientHeader),
    Kind.MOMENTS: ("moments", ".safetensors", MomentHeader),
    Kind.SQUARES: ("squares", ".safetensors", SquaresHeader),
    Kind.RANKING: ("rankings", ".json", Ranking),
    Kind.TRIALS: ("trials", ".json", Trials),
    Kind.TRAJECTORY: ("trajectories", ".json", Trials),
    Kind.JOINT: ("joint", ".json", JointSearch),
    Kind.SWEEP: ("sweeps", ".json", Sweep),
    Kind.EDIT: ("edits", ".safetensors", EditHeader),
    Kind.VERIFICATION: ("verifications", ".json", Verification),
    Kind.COMPARISON: ("comparisons", ".json", Comparison),
    Kind.TARGET_TRIALS: ("target-trials", ".json", TargetTrials),
    Kind.TARGET_COMPARISON: ("target-comparisons", ".json", PipelineComparison),
    Kind.GENERATED: ("generated", ".json", GeneratedSource),
    Kind.GENERATION: ("generations", ".json", Generation),
    Kind.ANSWERS: ("answers", ".json", Answers),
}


class Shelf:
    """The records of a store, each read once: the record, or the error that met us."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.read: dict[Kind, dict[str, Any]] = {kind: {} for kind in PLACES}
        for kind, (folder, suffix, record) in PLACES.items():
            reader = store.read_record if suffix == ".json" else store.read_header
            for name in store.names(folder, suffix):
                try:
                    self.read[kind][name] = reader(f"{folder}/{name}{suffix}", record)
                except MissingError:
                    continue
                except SlsguError as error:
                    self.read[kind][name] = error

    def get(self, kind: Kind, name: str) -> Any:
        """Return a record that could be read, else None."""
        record = self.read[kind].get(name)
        return None if isinstance(record, SlsguError) else record

    def readable(self, kind: Kind) -> list[Any]:
        """Return every record of a kind that could be read."""
        return [r for r in self.read[kind].values() if not isinstance(r, SlsguError)]

    def complete(self, kind: Kind) -> bool:
        """Return whether every record of a kind could be read."""
        return len(self.readable(kind)) == len(self.read[kind])


def blocks(manifest: SetManifest) -> list[tuple[str, DataRef]]:
    """Return every block of rows of a set with its role: forget, retain, evaluation names."""
    return [("forget", manifest.forget), ("retain", manifest.retain), *manifest.evals.items()]


def attributes(store: Store, path: str) -> dict[str, Any]:
    """Return what a block says of itself, read without zarr. Raises SlsguError."""
    try:
        told = json.loads(store.read_bytes(f"{path}/zarr.json"))["attributes"]
        if told.get("complete") is not True:
            raise ValueError("it is not complete")
        return {"rows": int(told["rows"]), "fingerprint": told["fingerprint"]}
    except SlsguError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{store.where(path)} is damaged: {reason}") from error


Check = tuple[State, str | None]
GOOD: Check = (State.OK, None)
REWHITENED = "the retain set that whitened its direction was built anew since"


def _stale(reason: str) -> Check:
    return State.STALE, reason


def _check_collection(shelf: Shelf, name: str, collection: Collection) -> Check:
    held = set(shelf.store.names(f"collections/{name}/parts"))
    tried = [*collection.concepts.values(), collection.retain]
    for shard in sorted({shard for one in tried for shard in one.shards}):
        if shard not in held:
            return State.DAMAGED, f"its shard {shard} is missing"
    return GOOD


def _check_set(shelf: Shelf, _name: str, manifest: SetManifest) -> Check:
    for role, ref in blocks(manifest):
        try:
            standing = attributes(shelf.store, ref.path)["fingerprint"]
        except SlsguError as error:
            return State.DAMAGED, f"its {role} rows cannot be read: {error.message}"
        if standing != ref.fingerprint:
            return _stale(f"its {role} rows were built anew since")
    return GOOD


def _check_pointer(shelf: Shelf, name: str, pointer: GradientPointer) -> Check:
    for role, address in (("forget", pointer.forget), ("retain", pointer.retain)):
        if shelf.get(Kind.GRADIENT, address) is None:
            return State.DAMAGED, f"its {role} gradient {address} is missing or damaged"
    manifest = shelf.get(Kind.SET, name)
    if manifest is None:
        return _stale(f"the set {name} is not in the store or cannot be read")
    for role in ("forget", "retain"):
        if getattr(pointer, f"{role}_data") != getattr(manifest, role).fingerprint:
            return _stale(f"the {role} set was built anew since")
    return GOOD


def _check_gradient(shelf: Shelf, name: str, _header: GradientHeader | SquaresHeader) -> Check:
    used = any(name in (p.forget, p.retain) for p in shelf.readable(Kind.POINTER))
    if used or not shelf.complete(Kind.POINTER):
        return GOOD
    return State.UNREFERENCED, "no set's gradients are these"


def _check_moments(shelf: Shelf, _name: str, header: MomentHeader) -> Check:
    made_from = (header.model, header.data)
    pointers = shelf.readable(Kind.POINTER)
    used = any((p.model_fingerprint, p.retain_data) == made_from for p in pointers)
    if used or not shelf.complete(Kind.POINTER):
        return GOOD
    return State.UNREFERENCED, "no set's gradients are of this model and these retain rows"


def _check_ranking(shelf: Shelf, name: str, ranking: Ranking) -> Check:
    pointer = shelf.get(Kind.POINTER, name)
    if pointer and (ranking.forget, ranking.retain) != (pointer.forget, pointer.retain):
        return _stale("the gradients were computed anew since")
    return _as_pointer(shelf, name, pointer)


def _check_trials(shelf: Shelf, name: str, trials: Trials) -> Check:
    pointer = shelf.get(Kind.POINTER, name)
    if pointer and trials.retain_data not in (None, pointer.retain_data):
        return _stale(REWHITENED)
    return _check_figures(shelf, name, trials)


def _check_figures(shelf: Shelf, name: str, measured: Trials | Comparison) -> Check:
    pointer, manifest = shelf.get(Kind.POINTER, name), shelf.get(Kind.SET, name)
    if pointer and measured.forget != pointer.forget:
        return _stale("the forget gradient was computed anew since")
    if pointer and measured.model_fingerprint != pointer.model_fingerprint:
        return _stale("the model has other weights since")
    for known, ref in manifest.evals.items() if manifest else ():
        if measured.evals.get(known) != ref.fingerprint:
            return _stale(f"the evaluation set {known} was built anew since")
    return _as_pointer(shelf, name, pointer)


def _check_joint(shelf: Shelf, _name: str, found: JointSearch) -> Check:
    for name, gradient in found.gradients.items():
        pointer, manifest = shelf.get(Kind.POINTER, name), shelf.get(Kind.SET, name)
        if pointer is None or pointer.forget != gradient:
            return _stale(f"the forget gradient of {name} was computed anew since, or is gone")
        if pointer.model_fingerprint != found.model_fingerprint:
            return _stale("the model has other weights since")
        for known, ref in manifest.evals.items() if manifest else ():
            if found.evals.get(known) != ref.fingerprint:
                return _stale(f"the evaluation set {known} was built anew since")
    return GOOD


def _check_sweep(shelf: Shelf, _name: str, sweep: Sweep) -> Check:
    for row in sweep.rows:
        pointer = shelf.get(Kind.POINTER, row.name)
        if pointer is None or pointer.forget != row.gradient:
            return _stale(f"the forget gradient of {row.name} was computed anew since, or is gone")
    return GOOD


def _check_edit(shelf: Shelf, name: str, edit: EditHeader) -> Check:
    # An edit carries all it needs; without gradients of its name it is not out of date.
    pointer = shelf.get(Kind.POINTER, name)
    if pointer is None:
        return GOOD
    if edit.gradient != pointer.forget:
        return _stale("the forget gradient was computed anew since")
    if edit.retain_data not in (None, pointer.retain_data):
        return _stale(REWHITENED)
    return GOOD


def _check_verification(shelf: Shelf, name: str, verification: Verification) -> Check:
    manifest, edit = shelf.get(Kind.SET, name), shelf.get(Kind.EDIT, name)
    if manifest is None:
        return _stale(f"the set {name} is not in the store or cannot be read")
    for role, ref in blocks(manifest):
        if verification.data.get(role) != ref.fingerprint:
            return _stale(f"its {role} rows were built anew since")
    edits = [subject.edit for subject in verification.subjects if subject.edit is not None]
    if edit and edits and edit not in edits:
        return _stale("the edit was made anew since")
    return GOOD


def _check_on_target(shelf: Shelf, _name: str, found: TargetTrials | PipelineComparison) -> Check:
    pointer = shelf.get(Kind.POINTER, found.name)
    if pointer and found.forget != pointer.forget:
        return _stale("the forget gradient was computed anew since")
    return _as_pointer(shelf, found.name, pointer)


def _check_shown(shelf: Shelf, _name: str, shown: Generation | Answers) -> Check:
    # Edits that came from files elsewhere cannot be looked up, and need not be.
    for name, known in shown.edits.items():
        edit = shelf.get(Kind.EDIT, name)
        if edit is not None and digest(edit) != known:
            return _stale(f"the edit {name} was made anew since")
    return GOOD


def _as_pointer(shelf: Shelf, name: str, pointer: GradientPointer | None) -> Check:
    """Return stale where the gradients in use are gone or stale themselves."""
    if pointer is None:
        return _stale(f"the gradients of {name} are not in the store or cannot be read")
    state, reason = _check_pointer(shelf, name, pointer)
    return GOOD if state is State.OK else _stale(f"its gradients are {state}: {reason}")


CHECKS: dict[Kind, Callable[[Shelf, str, Any], Check]] = {
    Kind.COLLECTION: _check_collection,
    Kind.SET: _check_set,
    Kind.POINTER: _check_pointer,
    Kind.GRADIENT: _check_gradient,
    Kind.MOMENTS: _check_moments,
    Kind.SQUARES: _check_gradient,
    Kind.RANKING: _check_ranking,
    Kind.TRIALS: _check_trials,
    Kind.TRAJECTORY: _check_trials,
    Kind.JOINT: _check_joint,
    Kind.SWEEP: _check_sweep,
    Kind.EDIT: _check_edit,
    Kind.VERIFICATION: _check_verification,
    Kind.COMPARISON: _check_figures,
    Kind.TARGET_TRIALS: _check_on_target,
    Kind.TARGET_COMPARISON: _check_on_target,
    Kind.GENERATED: lambda _shelf, _name, _record: GOOD,
    Kind.GENERATION: _check_shown,
    Kind.ANSWERS: _check_shown,
}
