"""Where each artifact lies, how the one in use is read, and whether it still stands."""

import json
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

from slsgu_cli import progress
from slsgu_cli.errors import InputError, MissingError, SlsguError, StaleError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import (
    EditHeader,
    GradientHeader,
    GradientPointer,
    MomentHeader,
    Ranking,
    SquaresHeader,
    Trials,
)
from slsgu_cli.records.sets import Collection, DataRef, SetManifest, check_name
from slsgu_cli.records.studies import (
    Comparison,
    JointSearch,
    PipelineComparison,
    Sweep,
    Verification,
)
from slsgu_cli.records.targets import Answers, GeneratedSource, Generation, TargetTrials
from slsgu_cli.store.store import Store, require

# File systems end names at 255 bytes; plots add the name of a layer.
LONGEST_LABEL = 100


def manifest_path(name: str) -> str:
    """Return where the set `name` is described."""
    return f"sets/{check_name(name)}.json"


def pointer_path(name: str) -> str:
    """Return where the gradients of the set `name` are named."""
    return f"gradients/{check_name(name)}.json"


def gradient_path(address: str) -> str:
    """Return where the gradient called `address`, a digest, lies."""
    return f"gradients/{address}.safetensors"


def moments_path(digest: str) -> str:
    """Return where the moments called `digest` lie."""
    return f"moments/{digest}.safetensors"


def squares_path(digest: str) -> str:
    """Return where the squared gradients lie that go with the gradient called `digest`."""
    return f"squares/{digest}.safetensors"


def ranking_path(name: str) -> str:
    """Return where the ranking of the set `name` lies."""
    return f"rankings/{check_name(name)}.json"


def trials_path(name: str) -> str:
    """Return where the search of the set `name` is recorded."""
    return f"trials/{check_name(name)}.json"


def joint_label(names: Sequence[str]) -> str:
    """Return what a joint search over several sets is called: their names, as far as they fit."""
    label = "+".join(names)
    if len(label) <= LONGEST_LABEL:
        return label
    return f"{names[0]}+{len(names) - 1}-{digest(list(names))[:8]}"


def joint_path(names: Sequence[str]) -> str:
    """Return where the joint search over several sets is recorded."""
    return f"joint/{check_name(joint_label(names))}.json"


def sweep_path(name: str) -> str:
    """Return where the sweep `name` is recorded."""
    return f"sweeps/{check_name(name)}.json"


def trajectory_path(name: str) -> str:
    """Return where the trajectories of the set `name` are recorded."""
    return f"trajectories/{check_name(name)}.json"


def comparison_path(name: str) -> str:
    """Return where the comparison of methods on the set `name` is recorded."""
    return f"comparisons/{check_name(name)}.json"


def target_edit(name: str, target: Path) -> str:
    """Return what the edit of the set `name` is called that was steered on `target`."""
    return check_name(f"{name}@{target.resolve().name}")


def set_of(edit: str) -> str:
    """Return the name of the set that an edit was made from, its target aside."""
    return edit.partition("@")[0] or edit


def target_trials_path(name: str, target: Path) -> str:
    """Return where the search of the set `name` that was steered on `target` is recorded."""
    return f"target-trials/{target_edit(name, target)}.json"


def target_comparison_path(name: str, target: Path) -> str:
    """Return where the comparison of methods on `target` for the set `name` is recorded."""
    return f"target-comparisons/{target_edit(name, target)}.json"


def edit_path(name: str) -> str:
    """Return where the edit of the set `name` lies."""
    return f"edits/{check_name(name)}.safetensors"


def verification_path(name: str) -> str:
    """Return where the verification of the set `name` is recorded."""
    return f"verifications/{check_name(name)}.json"


def collection_path(folder: str) -> str:
    """Return where the collection of samples in `folder` is described."""
    return f"{folder}.json"


def plot_path(name: str, kind: str) -> str:
    """Return where a plot of the set `name` lies."""
    return f"plots/{check_name(name)}-{kind}.png"


def read_manifest(store: Store, name: str) -> SetManifest:
    """Return the manifest of the set `name`. Raises MissingError."""
    path = manifest_path(name)
    known = [] if store.exists(path) else store.names("sets", ".json")
    what = f"set {name}" + (f"; it has {', '.join(known)}" if known else "")
    require(store, path, what=what, run=f"slsgu build-sets {quote(name)} --source ...")
    return store.read_record(manifest_path(name), SetManifest)


def read_pointer(store: Store, manifest: SetManifest) -> GradientPointer:
    """Return which gradients belong to a set as it is built now. Raises StaleError."""
    name = manifest.name
    run = f"slsgu grad {quote(name)}"
    require(store, pointer_path(name), what=f"gradients of {name}", run=run)
    pointer = store.read_record(pointer_path(name), GradientPointer)
    built = (manifest.forget.fingerprint, manifest.retain.fingerprint)
    if (pointer.forget_data, pointer.retain_data) != built:
        which = "forget" if pointer.forget_data != built[0] else "retain"
        raise StaleError(
            f"the gradients of {name} were computed before its {which} set was built anew",
            hint=f"run `{run}`",
        )
    for address in (pointer.forget, pointer.retain):
        require(store, gradient_path(address), what=f"gradient {address} of {name}", run=run)
    return pointer


def read_ranking(store: Store, pointer: GradientPointer) -> Ranking:
    """Return the ranking made from the gradients in use. Raises StaleError."""
    name = pointer.name
    run = f"slsgu rank {quote(name)}"
    require(store, ranking_path(name), what=f"ranking of {name}", run=run)
    ranking = store.read_record(ranking_path(name), Ranking)
    if (ranking.forget, ranking.retain) != (pointer.forget, pointer.retain):
        raise StaleError(
            f"the ranking of {name} was made from other gradients than the store has now",
            hint=f"run `{run}`",
        )
    return ranking


T = TypeVar("T")


def recorded(store: Store, path: str, kind: type[T], *, unusable: str) -> T | None:
    """Return the record at `path`, or None where there is none that can be read.

    One that cannot be read is told of by `unusable` and the reason. Whether it was made
    from what is there now is for the caller to say.
    """
    if not store.exists(path):
        return None
    try:
        return store.read_record(path, kind)
    except (StaleError, InputError) as error:
        progress.note(f"{unusable}: {error}")
        return None


class ArtifactKind(StrEnum):
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


class Standing(StrEnum):
    """Whether an artifact can be used as it stands."""

    OK = "ok"
    STALE = "stale"
    UNREFERENCED = "unreferenced"
    DAMAGED = "damaged"


# Which records lie where. Data blocks and plots have no record of ours.
PLACES: dict[ArtifactKind, tuple[str, str, type[Any]]] = {
    ArtifactKind.COLLECTION: ("collections", ".json", Collection),
    ArtifactKind.SET: ("sets", ".json", SetManifest),
    ArtifactKind.POINTER: ("gradients", ".json", GradientPointer),
    ArtifactKind.GRADIENT: ("gradients", ".safetensors", GradientHeader),
    ArtifactKind.MOMENTS: ("moments", ".safetensors", MomentHeader),
    ArtifactKind.SQUARES: ("squares", ".safetensors", SquaresHeader),
    ArtifactKind.RANKING: ("rankings", ".json", Ranking),
    ArtifactKind.TRIALS: ("trials", ".json", Trials),
    ArtifactKind.TRAJECTORY: ("trajectories", ".json", Trials),
    ArtifactKind.JOINT: ("joint", ".json", JointSearch),
    ArtifactKind.SWEEP: ("sweeps", ".json", Sweep),
    ArtifactKind.EDIT: ("edits", ".safetensors", EditHeader),
    ArtifactKind.VERIFICATION: ("verifications", ".json", Verification),
    ArtifactKind.COMPARISON: ("comparisons", ".json", Comparison),
    ArtifactKind.TARGET_TRIALS: ("target-trials", ".json", TargetTrials),
    ArtifactKind.TARGET_COMPARISON: ("target-comparisons", ".json", PipelineComparison),
    ArtifactKind.GENERATED: ("generated", ".json", GeneratedSource),
    ArtifactKind.GENERATION: ("generations", ".json", Generation),
    ArtifactKind.ANSWERS: ("answers", ".json", Answers),
}


class Catalog:
    """The records of a store, each read once: the record, or the error that met us."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.read: dict[ArtifactKind, dict[str, Any]] = {kind: {} for kind in PLACES}
        for kind, (folder, suffix, record) in PLACES.items():
            reader = store.read_record if suffix == ".json" else store.read_header
            for name in store.names(folder, suffix):
                try:
                    self.read[kind][name] = reader(f"{folder}/{name}{suffix}", record)
                except MissingError:
                    continue
                except SlsguError as error:
                    self.read[kind][name] = error

    def get(self, kind: ArtifactKind, name: str) -> Any:
        """Return a record that could be read, else None."""
        record = self.read[kind].get(name)
        return None if isinstance(record, SlsguError) else record

    def readable(self, kind: ArtifactKind) -> list[Any]:
        """Return every record of a kind that could be read."""
        return [r for r in self.read[kind].values() if not isinstance(r, SlsguError)]

    def complete(self, kind: ArtifactKind) -> bool:
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


Check = tuple[Standing, str | None]
GOOD: Check = (Standing.OK, None)
REWHITENED = "the retain set that whitened its direction was built anew since"


def _stale(reason: str) -> Check:
    return Standing.STALE, reason


def _check_collection(shelf: Catalog, name: str, collection: Collection) -> Check:
    held = set(shelf.store.names(f"collections/{name}/parts"))
    tried = [*collection.concepts.values(), collection.retain]
    for shard in sorted({shard for one in tried for shard in one.shards}):
        if shard not in held:
            return Standing.DAMAGED, f"its shard {shard} is missing"
    return GOOD


def _check_set(shelf: Catalog, _name: str, manifest: SetManifest) -> Check:
    for role, ref in blocks(manifest):
        try:
            standing = attributes(shelf.store, ref.path)["fingerprint"]
        except SlsguError as error:
            return Standing.DAMAGED, f"its {role} rows cannot be read: {error.message}"
        if standing != ref.fingerprint:
            return _stale(f"its {role} rows were built anew since")
    return GOOD


def _check_pointer(shelf: Catalog, name: str, pointer: GradientPointer) -> Check:
    for role, address in (("forget", pointer.forget), ("retain", pointer.retain)):
        if shelf.get(ArtifactKind.GRADIENT, address) is None:
            return Standing.DAMAGED, f"its {role} gradient {address} is missing or damaged"
    manifest = shelf.get(ArtifactKind.SET, name)
    if manifest is None:
        return _stale(f"the set {name} is not in the store or cannot be read")
    for role in ("forget", "retain"):
        if getattr(pointer, f"{role}_data") != getattr(manifest, role).fingerprint:
            return _stale(f"the {role} set was built anew since")
    return GOOD


def _check_gradient(shelf: Catalog, name: str, _header: GradientHeader | SquaresHeader) -> Check:
    used = any(name in (p.forget, p.retain) for p in shelf.readable(ArtifactKind.POINTER))
    if used or not shelf.complete(ArtifactKind.POINTER):
        return GOOD
    return Standing.UNREFERENCED, "no set's gradients are these"


def _check_moments(shelf: Catalog, _name: str, header: MomentHeader) -> Check:
    made_from = (header.model, header.data)
    pointers = shelf.readable(ArtifactKind.POINTER)
    used = any((p.model_fingerprint, p.retain_data) == made_from for p in pointers)
    if used or not shelf.complete(ArtifactKind.POINTER):
        return GOOD
    return Standing.UNREFERENCED, "no set's gradients are of this model and these retain rows"


def _check_ranking(shelf: Catalog, name: str, ranking: Ranking) -> Check:
    pointer = shelf.get(ArtifactKind.POINTER, name)
    if pointer and (ranking.forget, ranking.retain) != (pointer.forget, pointer.retain):
        return _stale("the gradients were computed anew since")
    return _as_pointer(shelf, name, pointer)


def _check_trials(shelf: Catalog, name: str, trials: Trials) -> Check:
    pointer = shelf.get(ArtifactKind.POINTER, name)
    if pointer and trials.retain_data not in (None, pointer.retain_data):
        return _stale(REWHITENED)
    return _check_figures(shelf, name, trials)


def _check_figures(shelf: Catalog, name: str, measured: Trials | Comparison) -> Check:
    pointer, manifest = shelf.get(ArtifactKind.POINTER, name), shelf.get(ArtifactKind.SET, name)
    if pointer and measured.forget != pointer.forget:
        return _stale("the forget gradient was computed anew since")
    if pointer and measured.model_fingerprint != pointer.model_fingerprint:
        return _stale("the model has other weights since")
    for known, ref in manifest.evals.items() if manifest else ():
        if measured.evals.get(known) != ref.fingerprint:
            return _stale(f"the evaluation set {known} was built anew since")
    return _as_pointer(shelf, name, pointer)


def _check_joint(shelf: Catalog, _name: str, found: JointSearch) -> Check:
    for name, gradient in found.gradients.items():
        pointer, manifest = shelf.get(ArtifactKind.POINTER, name), shelf.get(ArtifactKind.SET, name)
        if pointer is None or pointer.forget != gradient:
            return _stale(f"the forget gradient of {name} was computed anew since, or is gone")
        if pointer.model_fingerprint != found.model_fingerprint:
            return _stale("the model has other weights since")
        for known, ref in manifest.evals.items() if manifest else ():
            if found.evals.get(known) != ref.fingerprint:
                return _stale(f"the evaluation set {known} was built anew since")
    return GOOD


def _check_sweep(shelf: Catalog, _name: str, sweep: Sweep) -> Check:
    for row in sweep.rows:
        pointer = shelf.get(ArtifactKind.POINTER, row.name)
        if pointer is None or pointer.forget != row.gradient:
            return _stale(f"the forget gradient of {row.name} was computed anew since, or is gone")
    return GOOD


def _check_edit(shelf: Catalog, name: str, edit: EditHeader) -> Check:
    # An edit carries all it needs; without gradients of its name it is not out of date.
    pointer = shelf.get(ArtifactKind.POINTER, name)
    if pointer is None:
        return GOOD
    if edit.gradient != pointer.forget:
        return _stale("the forget gradient was computed anew since")
    if edit.retain_data not in (None, pointer.retain_data):
        return _stale(REWHITENED)
    return GOOD


def _check_verification(shelf: Catalog, name: str, verification: Verification) -> Check:
    manifest, edit = shelf.get(ArtifactKind.SET, name), shelf.get(ArtifactKind.EDIT, name)
    if manifest is None:
        return _stale(f"the set {name} is not in the store or cannot be read")
    for role, ref in blocks(manifest):
        if verification.data.get(role) != ref.fingerprint:
            return _stale(f"its {role} rows were built anew since")
    edits = [subject.edit for subject in verification.subjects if subject.edit is not None]
    if edit and edits and edit not in edits:
        return _stale("the edit was made anew since")
    return GOOD


def _check_on_target(shelf: Catalog, _name: str, found: TargetTrials | PipelineComparison) -> Check:
    pointer = shelf.get(ArtifactKind.POINTER, found.name)
    if pointer and found.forget != pointer.forget:
        return _stale("the forget gradient was computed anew since")
    return _as_pointer(shelf, found.name, pointer)


def _check_shown(shelf: Catalog, _name: str, shown: Generation | Answers) -> Check:
    # Edits that came from files elsewhere cannot be looked up, and need not be.
    for name, known in shown.edits.items():
        edit = shelf.get(ArtifactKind.EDIT, name)
        if edit is not None and digest(edit) != known:
            return _stale(f"the edit {name} was made anew since")
    return GOOD


def _as_pointer(shelf: Catalog, name: str, pointer: GradientPointer | None) -> Check:
    """Return stale where the gradients in use are gone or stale themselves."""
    if pointer is None:
        return _stale(f"the gradients of {name} are not in the store or cannot be read")
    state, reason = _check_pointer(shelf, name, pointer)
    return GOOD if state is Standing.OK else _stale(f"its gradients are {state}: {reason}")


CHECKS: dict[ArtifactKind, Callable[[Catalog, str, Any], Check]] = {
    ArtifactKind.COLLECTION: _check_collection,
    ArtifactKind.SET: _check_set,
    ArtifactKind.POINTER: _check_pointer,
    ArtifactKind.GRADIENT: _check_gradient,
    ArtifactKind.MOMENTS: _check_moments,
    ArtifactKind.SQUARES: _check_gradient,
    ArtifactKind.RANKING: _check_ranking,
    ArtifactKind.TRIALS: _check_trials,
    ArtifactKind.TRAJECTORY: _check_trials,
    ArtifactKind.JOINT: _check_joint,
    ArtifactKind.SWEEP: _check_sweep,
    ArtifactKind.EDIT: _check_edit,
    ArtifactKind.VERIFICATION: _check_verification,
    ArtifactKind.COMPARISON: _check_figures,
    ArtifactKind.TARGET_TRIALS: _check_on_target,
    ArtifactKind.TARGET_COMPARISON: _check_on_target,
    ArtifactKind.GENERATED: lambda _shelf, _name, _record: GOOD,
    ArtifactKind.GENERATION: _check_shown,
    ArtifactKind.ANSWERS: _check_shown,
}
