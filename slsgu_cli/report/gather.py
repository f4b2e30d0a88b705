"""The records of one name, whether each may be shown, the commands they came from, its models."""

import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from slsgu_cli.checkpoints.apply import all_files
from slsgu_cli.checkpoints.edits import Edit, by_layer, earlier_edits, moved_values, read_edit
from slsgu_cli.checkpoints.tensor_file import PRECISION, layer_digest, narrow, widen
from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.errors import MissingError, SlsguError
from slsgu_cli.figures.html import Html, code, paragraph
from slsgu_cli.method.edit import FoundEdit, Presence, find_edits
from slsgu_cli.records.codec import digest
from slsgu_cli.records.comparison import ClipComparison
from slsgu_cli.records.method import (
    Criterion,
    EditHeader,
    GradientHeader,
    GradientPointer,
    Precision,
    Ranking,
    Trials,
)
from slsgu_cli.records.options import (
    DAMPING,
    MARGIN,
    PassOptions,
    RankOptions,
    SearchOptions,
    StrengthOptions,
)
from slsgu_cli.records.recipe import written_at
from slsgu_cli.records.sets import LOCAL, ModelSpec, SetManifest
from slsgu_cli.records.studies import JointSearch, Sweep
from slsgu_cli.records.verification import Verification
from slsgu_cli.records.words import command_line
from slsgu_cli.store.artifacts import TABLE, Artifact, read_manifest
from slsgu_cli.store.catalog import Catalog, Standing
from slsgu_cli.store.files import file_sha256
from slsgu_cli.store.store import Store

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Evidence(Generic[T]):
    """One record as the store has it: the record where it may be shown, else why not.

    `state` is None where there is none; `run` is the command that makes it.
    """

    what: str
    path: str
    run: str
    record: T | None = None
    state: Standing | None = None
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
class SetRecords:
    """All that is known of one name."""

    name: str
    concept: str
    manifest: Evidence[SetManifest]
    pointer: Evidence[GradientPointer]
    ranking: Evidence[Ranking]
    trials: Evidence[Trials]
    edit: Evidence[EditHeader]
    on_targets: dict[str, Evidence[EditHeader]]
    trajectory: Evidence[Trials]
    joint: dict[str, Evidence[JointSearch]]
    sweeps: dict[str, Evidence[Sweep]]
    verification: Evidence[Verification]
    comparison: Evidence[ClipComparison]
    gradients: dict[str, GradientHeader] = field(default_factory=dict)
    facts: EditFacts | None = None

    def evidence(self) -> list[Evidence[Any]]:
        """Return every record in the order in which one is made from another."""
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
    """Return what the store knows of `name`. Raises MissingError where it has no such set."""
    manifest = read_manifest(catalog.store, name)
    pointer: Evidence[GradientPointer] = _evidence(catalog, Artifact.POINTER, name)
    edit: Evidence[EditHeader] = _evidence(catalog, Artifact.EDIT, name)
    digests = {}
    if pointer.record:
        digests = {"forget": pointer.record.forget, "retain": pointer.record.retain}
    joint = catalog.readable(Artifact.JOINT)
    sweeps = catalog.readable(Artifact.SWEEP)
    return SetRecords(
        name=name,
        concept=manifest.concept,
        manifest=_evidence(catalog, Artifact.SET, name),
        pointer=pointer,
        ranking=_evidence(catalog, Artifact.RANKING, name),
        trials=_evidence(catalog, Artifact.TRIALS, name),
        edit=edit,
        on_targets={
            label: _evidence(catalog, Artifact.EDIT, label, f" {label}")
            for label, header in sorted(catalog.readable(Artifact.EDIT).items())
            if header.target and label.startswith(f"{name}@")
        },
        trajectory=_evidence(catalog, Artifact.TRAJECTORY, name),
        joint={
            label: _evidence(catalog, Artifact.JOINT, label, f" {label}")
            for label, record in sorted(joint.items())
            if name in record.names and record.stages
        },
        sweeps={
            label: _evidence(catalog, Artifact.SWEEP, label, f" {label}")
            for label, record in sorted(sweeps.items())
            if any(row.name == name for row in record.rows)
        },
        verification=_evidence(catalog, Artifact.VERIFICATION, name),
        comparison=_evidence(catalog, Artifact.COMPARISON, name),
        gradients={role: catalog.get(Artifact.GRADIENT, d) for role, d in digests.items()},
        facts=_facts(catalog, edit.path) if edit.record else None,
    )


def _evidence(catalog: Catalog, kind: Artifact, name: str, of: str = "") -> Evidence[Any]:
    """Return a record with its standing; `of` tells it from others that concern the set."""
    evidence: Evidence[Any] = Evidence(TABLE[kind].noun + of, kind.path(name), kind.command(name))
    record = catalog.read(kind, name)
    if record is None:
        return evidence
    sha256 = hashlib.sha256(catalog.store.read_bytes(evidence.path)).hexdigest()
    if isinstance(record, SlsguError):
        return replace(evidence, state=Standing.DAMAGED, reason=record.message, sha256=sha256)
    state, reason = catalog.standing(kind, name, record)
    shown = record if state is Standing.OK else None
    return replace(evidence, record=shown, state=state, reason=reason, sha256=sha256)


def _facts(catalog: Catalog, path: str) -> EditFacts:
    edit = read_edit(catalog.store, path)
    return edit_facts(edit, earlier_edits(catalog.store, [edit]))


def edit_facts(edit: Edit, earlier: Sequence[Edit] = ()) -> EditFacts:
    """Return what the edit makes of the layer, rounded as `apply` rounds it.

    With it come those of the `earlier` edits that changed the same layer.
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


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file of a model by its name: its SHA-256 in the original, and in what was written."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """A model that was written without something: its files, and which edits are in it.

    `origin` is what it was made from. `troubles` say what could not be looked at, or is not as
    it was written.
    """

    label: str
    place: Path
    origin: str
    files: tuple[FileDigest, ...]
    edits: tuple[FoundEdit, ...]
    troubles: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """The folder that the names of its files are from."""
        return self.place.parent if self.place.is_file() else self.place

    def holds(self, name: str) -> Presence | None:
        """Return whether an edit is in every copy of its layer; None where it was not found."""
        presences = {edit.presence for edit in self.edits if edit.name == name}
        return max(presences, key=list(Presence).index, default=None)

    def sharing(self, names: Collection[str]) -> list[str]:
        """Return these edits and those that move the same layers, which are told together."""
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
    """Return digests of a model's files beside those of its origin, and what is in it.

    `names` are the edits to look for; `made` is the digest that a run has of what it wrote.
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
            troubles.append("Its files are others than those that the run wrote.")
        edits = find_edits(store, names, place, StrengthOptions()) if names else []
    except (SlsguError, OSError) as error:
        troubles.append(f"{place} cannot be looked at: {error}.")
    digests = tuple(
        FileDigest(name, before.get(name), after.get(name)) for name in sorted({*before, *after})
    )
    return WrittenModel(label, place, str(origin), digests, tuple(edits), tuple(troubles))


def written_fingerprint(model: ModelSpec, place: Path) -> str | None:
    """Return the fingerprint of a copy of a model as it is now; None where it is no CLIP."""
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


@dataclass(frozen=True, slots=True)
class Section:
    """One section. `trouble` says why its content is missing, `run` what adds it."""

    title: str
    content: Html
    trouble: str | None = None
    run: str | None = None

    @property
    def state(self) -> str:
        """Whether the section shows what it is about."""
        return "missing" if self.trouble else "shown"


def section(title: str, evidence: Evidence[T], build: Callable[[T], Html]) -> Section:
    """Return a section of what a record says, or of what is wrong with it."""
    if evidence.record is not None:
        return Section(title, build(evidence.record))
    return absent(title, evidence.trouble or "", evidence.run)


def absent(title: str, trouble: str, run: str) -> Section:
    """Return a section that says what is missing and which command adds it."""
    line = paragraph(trouble, " To add it: ", code(run), class_="notice")
    return Section(title, line, trouble, run)


def commands(records: SetRecords) -> list[str]:
    """Return a command line for each step that the store has a good record of."""
    name = records.name
    lines: list[list[str]] = []
    if manifest := records.manifest.record:
        lines.append(list(manifest.command))
    if pointer := records.pointer.record:
        passes = PassOptions(
            batch_size=pointer.batch_size,
            precision=Precision(pointer.precision),
            prefixes=pointer.prefixes,
        )
        lines.append(["slsgu", "grad", pointer.name, *command_line(passes)])
    if ranking := records.ranking.record:
        lines.append(_rank(ranking))
    if (trials := records.trials.record) and ranking:
        lines += _searches(trials, ranking)
    if edit := records.edit.record:
        names = edit.joint.names if edit.joint else (*edit.after, name)
        if edit.joint:
            lines.append(["slsgu", "search", *names, "--joint", "--criterion", str(edit.criterion)])
        lines.append(["slsgu", "apply", *names, "--out", f"without-{name}"])
        lines.append(["slsgu", "eval", *names, "--model", f"{LOCAL}without-{name}"])
    return [shlex.join(words) for words in lines if words]


def commands_again(
    store: Store, gathered: Sequence[SetRecords], *, recipe: Path | str | None
) -> Iterator[str]:
    """Yield the commands that do it all again: the run of a recipe, or else each step."""
    yield f"export SLSGU_STORE={shlex.quote(store.url)}"
    if recipe is None:
        yield from (line for records in gathered for line in commands(records))
        return
    yield f"slsgu run {shlex.quote(str(recipe))}"
    for records in gathered:
        verified = records.verification.record
        for subject in verified.subjects[1:] if verified else ():
            of_model = f" {subject.model.flags()}" if subject.edit is None else ""
            yield f"slsgu verify {shlex.quote(records.name)}{of_model}"


def _rank(ranking: Ranking) -> list[str]:
    options = RankOptions(
        alignment=ranking.alignment,
        direction=ranking.direction,
        damping=None if ranking.damping == DAMPING else ranking.damping,
        qkv=ranking.qkv,
    )
    return ["slsgu", "rank", ranking.name, *command_line(options)]


# The order in which the options of a search are told.
TOLD = ("criterion", "margin", "layers", "direction", "damping", "steps", "precision", "after")


def _searches(trials: Trials, ranking: Ranking) -> list[list[str]]:
    """Return a search for each damping that trials are of."""
    steps = Counter((trial.layer, trial.damping) for trial in trials.trials)
    layers = tuple(dict.fromkeys(layer for layer, _ in steps))
    fronts = {score.layer for score in ranking.scores if score.front}
    options = SearchOptions(
        criterion=trials.criterion,
        margin=MARGIN if trials.margin is None else trials.margin,
        layers=() if set(layers) == fronts else layers,
        direction=None if trials.direction is ranking.direction else trials.direction,
        steps=max(steps.values(), default=SearchOptions().steps),
        precision=trials.precision,
        after=tuple(trials.after),
    )
    also = ("criterion", "margin") if trials.criterion is Criterion.MARGIN else ("criterion",)
    lines = []
    dampings = dict.fromkeys(damping for _, damping in steps) or {ranking.damping: None}
    if len(dampings) > 1:
        # Along its gradient a layer was searched beside others.
        dampings.pop(None, None)
    for damping in dampings:
        searched = replace(options, damping=None if damping == ranking.damping else damping)
        words = command_line(searched, fields=TOLD, also=also)
        lines.append(["slsgu", "search", trials.name, *words])
    return lines
