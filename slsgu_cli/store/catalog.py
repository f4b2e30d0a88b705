"""What the store holds, what each artifact was made from, and whether that still stands.

Only records and headers are read: no tensor, no image, and nothing of the model. An
artifact that cannot be read is listed with the reason.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from slsgu_cli.errors import SlsguError
from slsgu_cli.records.method import (
    Accuracy,
    EditHeader,
    GradientHeader,
    GradientPointer,
    MomentHeader,
    Ranking,
    SquaresHeader,
    Trials,
)
from slsgu_cli.records.sets import Collection, SetManifest
from slsgu_cli.records.studies import (
    Comparison,
    JointSearch,
    PipelineComparison,
    Sweep,
    Verification,
)
from slsgu_cli.records.targets import Answers, GeneratedSource, Generation, TargetTrials
from slsgu_cli.store.artifacts import (
    CHECKS,
    PLACES,
    ArtifactKind,
    Catalog,
    Standing,
    attributes,
    blocks,
)
from slsgu_cli.store.store import Store


@dataclass(frozen=True, slots=True)
class Entry:
    """One artifact: its path in the store, its size in bytes, its origin and its state.

    `made_from` maps what it was made from to words; `reason` says why it is not ok.
    """

    kind: ArtifactKind
    name: str
    path: str
    size: int
    made_from: dict[str, str]
    state: Standing = Standing.OK
    reason: str | None = None

    def summary(self) -> str:
        """Return what it was made from on one line."""
        return ", ".join(f"{what} {words}" for what, words in self.made_from.items())


_FOLDERS = tuple(sorted({folder for folder, _, _ in PLACES.values()} | {"data", "plots"}))

# Kinds whose record has a folder beside it, of the same name.
_WITH_FOLDER = (
    ArtifactKind.COLLECTION,
    ArtifactKind.TARGET_COMPARISON,
    ArtifactKind.GENERATED,
    ArtifactKind.GENERATION,
    ArtifactKind.ANSWERS,
)


def entries(store: Store) -> list[Entry]:
    """Return every artifact of the store, ordered by kind and name."""
    shelf = Catalog(store)
    found = [*_records(shelf), *_data(shelf), *_plots(store), *_unfinished(store)]
    order = list(ArtifactKind)
    return sorted(found, key=lambda entry: (order.index(entry.kind), entry.name))


def unreferenced(store: Store) -> list[Entry]:
    """Return the entries that nothing in the store refers to, unfinished writes included."""
    return [entry for entry in entries(store) if entry.state is Standing.UNREFERENCED]


def _records(shelf: Catalog) -> Iterator[Entry]:
    """Yield an entry for every artifact that carries a record."""
    for kind, (folder, suffix, _) in PLACES.items():
        for name, record in shelf.read[kind].items():
            path = f"{folder}/{name}{suffix}"
            size = _size(shelf.store, path)
            if kind in _WITH_FOLDER:
                size += _size(shelf.store, f"{folder}/{name}")
            if isinstance(record, SlsguError):
                yield Entry(kind, name, path, size, {}, Standing.DAMAGED, record.message)
                continue
            state, reason = CHECKS[kind](shelf, name, record)
            yield Entry(kind, name, path, size, _WORDS[kind](record), state, reason)


def _data(shelf: Catalog) -> Iterator[Entry]:
    """Yield an entry for every block of rows."""
    users: dict[str, list[str]] = {}
    for manifest in shelf.readable(ArtifactKind.SET):
        for role, ref in blocks(manifest):
            users.setdefault(ref.path, []).append(f"{manifest.name} ({role})")
    for name in shelf.store.names("data", ".zarr"):
        path = f"data/{name}.zarr"
        made_from = {"for": ", ".join(users[path])} if path in users else {}
        state, reason = Standing.OK, None
        try:
            made_from = {"rows": str(attributes(shelf.store, path)["rows"]), **made_from}
        except SlsguError as error:
            state, reason = Standing.DAMAGED, error.message
        if state is Standing.OK and path not in users and shelf.complete(ArtifactKind.SET):
            state, reason = Standing.UNREFERENCED, "no set refers to it"
        yield Entry(
            ArtifactKind.DATA, name, path, _size(shelf.store, path), made_from, state, reason
        )


def _about_collection(collection: Collection) -> dict[str, str]:
    found = {name: f"{tried.found} rows" for name, tried in collection.concepts.items()}
    return {"files": str(collection.files), "rows": str(collection.seen), **found}


def _about_set(manifest: SetManifest) -> dict[str, str]:
    rows = {role: f"{ref.rows} rows" for role, ref in blocks(manifest)}
    return {"model": str(manifest.model), "concept": manifest.concept, **rows}


def _about_pointer(pointer: GradientPointer) -> dict[str, str]:
    how = f"{pointer.batch_size} in {pointer.precision}"
    return {"model": str(pointer.model), "set": pointer.name, "batches of": how}


def _about_gradient(header: GradientHeader | SquaresHeader) -> dict[str, str]:
    how = f"{header.batch_size} in {header.precision}"
    return {"loss": header.loss, "rows": str(header.rows), "batches of": how}


def _about_moments(header: MomentHeader) -> dict[str, str]:
    return {"layers": str(len(header.layers)), "rows": str(header.rows)}


def _about_ranking(ranking: Ranking) -> dict[str, str]:
    front = sum(score.front for score in ranking.scores)
    layers = f"{len(ranking.scores)}, {front} on the fronts"
    about = {"set": ranking.name, "alignment": ranking.alignment}
    return about | {"direction": ranking.direction, "layers": layers}


def _about_trials(trials: Trials) -> dict[str, str]:
    layers = len({trial.layer for trial in trials.trials})
    many = f"{len(trials.trials)} over {layers} layers"
    about = {"set": trials.name, "direction": trials.direction, "steer": trials.steer}
    return about | {"trials": many}


def _about_joint(found: JointSearch) -> dict[str, str]:
    sets = ", ".join(found.names)
    return {"sets": sets, "steer": found.steer, "trials": str(len(found.trials))}


def _about_sweep(sweep: Sweep) -> dict[str, str]:
    done = f"{len(sweep.rows)} of {len(sweep.classes)}"
    return {"model": str(sweep.model), "classes": done, "steer": sweep.steer}


def _about_edit(edit: EditHeader) -> dict[str, str]:
    words = {
        "model": str(edit.model),
        "concept": edit.concept,
        "layer": edit.layer,
        "direction": edit.direction,
        "step": f"{edit.step:.4g} ({100 * edit.share:.3g}% of its norm)",
    }
    if edit.joint:
        words["together with"] = ", ".join(n for n in edit.joint.names if n != edit.name)
    if edit.forget:
        words["FA@1"] = _change(edit.baseline_forget, edit.forget)
    for name, figures in (edit.utility or {}).items():
        words[f"TA@1 {name}"] = _change((edit.baseline_utility or {}).get(name), figures)
    return words


def _about_verification(verification: Verification) -> dict[str, str]:
    labels = ", ".join(subject.label for subject in verification.subjects)
    return {"set": verification.name, "models": labels}


def _about_comparison(comparison: Comparison) -> dict[str, str]:
    methods = ", ".join(dict.fromkeys(outcome.method for outcome in comparison.outcomes))
    return {"set": comparison.name, "outcomes": f"{len(comparison.outcomes)} of {methods}"}


def _about_target_trials(trials: TargetTrials) -> dict[str, str]:
    layers = len({trial.layer for trial in trials.trials})
    many = f"{len(trials.trials)} over {layers} layers"
    return {"set": trials.name, "target": trials.target, "trials": many}


def _about_target_comparison(found: PipelineComparison) -> dict[str, str]:
    labels = ", ".join(outcome.label for outcome in found.outcomes)
    return {"set": found.name, "target": found.target, "outcomes": labels}


def _about_generated(source: GeneratedSource) -> dict[str, str]:
    prompts = "; ".join(source.prompts)
    return {"pipeline": source.pipeline, "prompts": prompts, "images": str(source.count)}


def _about_generation(found: Generation) -> dict[str, str]:
    images = len(found.prompts) * len(found.seeds)
    words = {"target": found.target, "edits": ", ".join(found.edits), "images": f"2 x {images}"}
    if found.before and found.after and found.after.ua is not None:
        words["UA"] = f"{found.before.ua:.1f} to {found.after.ua:.1f}"
    return words


def _about_answers(found: Answers) -> dict[str, str]:
    edits = ", ".join(found.edits)
    return {"target": found.target, "edits": edits, "answers": f"2 x {len(found.answers)}"}


def _change(before: Accuracy | None, after: Accuracy) -> str:
    return f"{before.top1:.2f} to {after.top1:.2f}" if before else f"{after.top1:.2f}"


_WORDS: dict[ArtifactKind, Callable[[Any], dict[str, str]]] = {
    ArtifactKind.COLLECTION: _about_collection,
    ArtifactKind.SET: _about_set,
    ArtifactKind.POINTER: _about_pointer,
    ArtifactKind.GRADIENT: _about_gradient,
    ArtifactKind.MOMENTS: _about_moments,
    ArtifactKind.SQUARES: _about_gradient,
    ArtifactKind.RANKING: _about_ranking,
    ArtifactKind.TRIALS: _about_trials,
    ArtifactKind.TRAJECTORY: _about_trials,
    ArtifactKind.JOINT: _about_joint,
    ArtifactKind.SWEEP: _about_sweep,
    ArtifactKind.EDIT: _about_edit,
    ArtifactKind.VERIFICATION: _about_verification,
    ArtifactKind.COMPARISON: _about_comparison,
    ArtifactKind.TARGET_TRIALS: _about_target_trials,
    ArtifactKind.TARGET_COMPARISON: _about_target_comparison,
    ArtifactKind.GENERATED: _about_generated,
    ArtifactKind.GENERATION: _about_generation,
    ArtifactKind.ANSWERS: _about_answers,
}


def _plots(store: Store) -> Iterator[Entry]:
    for name in store.names("plots", ".png"):
        path = f"plots/{name}.png"
        yield Entry(ArtifactKind.PLOT, name, path, _size(store, path), {})


def _unfinished(store: Store) -> Iterator[Entry]:
    for folder in _FOLDERS:
        for name in store.unfinished(folder):
            path = f"{folder}/{name}"
            reason = "a write under way, or what a killed process left"
            size = _size(store, path)
            yield Entry(
                ArtifactKind.UNFINISHED, name, path, size, {}, Standing.UNREFERENCED, reason
            )
    folders = [name for name in store.names("collections") if not name.endswith(".json")]
    for name in sorted(set(folders) - set(store.names("collections", ".json"))):
        path = f"collections/{name}"
        reason = "a collection under way; the same build-sets goes on with it"
        size = _size(store, path)
        yield Entry(ArtifactKind.UNFINISHED, name, path, size, {}, Standing.UNREFERENCED, reason)


def _size(store: Store, path: str) -> int:
    """Return the bytes at `path`; 0 where another process has just removed it."""
    try:
        return store.size(path)
    except OSError:
        return 0
