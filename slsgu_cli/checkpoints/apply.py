"""Edited copies of checkpoints: where they may go, what is changed, how it is written."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, FilePlan, LayerChange, by_layer, plan_file, plan_layer
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.layouts import TensorPlace, WeightSet, placed, tensor_places
from slsgu_cli.checkpoints.targets import OPEN_CLIP, Encoder, Target
from slsgu_cli.checkpoints.tensor_file import Raw
from slsgu_cli.checkpoints.weights import SUFFIXES, copy_spliced, open_weights, weight_files
from slsgu_cli.errors import InputError, MissingError, StaleError, UsageError
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.files import PARTIAL, copy_file, link_file, replacing, same_place


def require_place(origin: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse an `out` that is taken or that lies across the model at `origin`.

    With `overwrite` it may be taken, by the model itself as well. Raises InputError or
    UsageError.
    """
    if origin.is_dir() and out.suffix in SUFFIXES and not out.is_dir():
        raise UsageError(f"{out} names a file, but the model is a folder", hint="--out FOLDER")
    if same_place(origin, out):
        if not overwrite:
            raise InputError(
                f"{out} is the model itself",
                hint="another --out, or --overwrite to edit it in place",
            )
        return
    if out.resolve().is_relative_to(origin.resolve()):
        raise InputError(f"{out} lies inside the model {origin}", hint="another --out")
    if origin.resolve().is_relative_to(out.resolve()) and overwrite:
        raise InputError(f"{out} holds the model {origin}", hint="another --out")
    taken = any(out.iterdir()) if out.is_dir() else out.exists()
    if taken and not overwrite:
        raise InputError(f"{out} exists already", hint="another --out, or --overwrite")
    if origin.is_dir() and taken and not out.is_dir():
        raise InputError(f"{out} is a file, but the model is a folder", hint="another --out")


def require_nothing_lost(out: Path, written: Iterable[str]) -> None:
    """Refuse to replace a folder that holds files whose names are not `written` anew."""
    if not out.is_dir():
        return
    kept = set(written)
    held = (path for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (str(path.relative_to(out)) for path in held)
    lost = sorted(name for name in names if name not in kept and not name.startswith(PARTIAL))
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise InputError(
            f"{out} holds files that would be lost: {', '.join(lost[:3])}{more}",
            hint="another --out, or move them away",
        )


def all_files(folder: Path) -> dict[str, Path]:
    """Return every file below a folder by its relative name; links to files are followed.

    Raises InputError for what cannot be copied.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(PARTIAL) for part in name.parts):
            continue
        if path.is_symlink() and path.is_dir():
            raise InputError(f"{path} is a link to a folder", hint="replace it by what it leads to")
        if path.is_file():
            found[str(name)] = path
        elif not path.is_dir():
            raise InputError(f"{path} is neither a file nor a folder", hint="remove it")
    return found


CONFIG = "open_clip_config.json"
SAFETENSORS = ".safetensors"
STANDARD_NAME = {
    "safetensors": "open_clip_model.safetensors",
    "torch": "open_clip_pytorch_model.bin",
}


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A model to edit: the folder it is (`local-dir:`), or one file of weights.

    With `config` and `preprocess` (open_clip's model_cfg and preprocess_cfg), a single
    file can be written as a folder that open_clip loads.
    """

    model: ModelSpec
    weights: Path
    folder: Path | None = None
    config: Mapping[str, Any] | None = None
    preprocess: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """An edited file of the result: its path, its size, what changed in it."""

    path: str
    nbytes: int
    changes: tuple[LayerChange, ...]


@dataclass(frozen=True, slots=True)
class AppliedResult:
    """What apply wrote, or with `dry_run` would write.

    `model` names the result for `--model` where open_clip can load it by itself.
    """

    out: str
    model: str | None
    files: tuple[WrittenFile, ...]
    reverted: bool
    dry_run: bool


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Where everything goes: `files` maps a name below `out` ("" is `out`) to its source.

    Files with a plan are edited, `texts` are written anew, all others are as they were.
    """

    out: Path
    files: dict[str, Path]
    plans: dict[str, FilePlan]
    texts: dict[str, str]


def apply_edits(
    edits: Sequence[Edit],
    source: CheckpointSource,
    out: Path,
    *,
    revert: bool = False,
    force: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> AppliedResult:
    """Write a copy of a checkpoint with edits applied (or with `revert`, undone) at `out`.

    `out` is a folder, or for a single file also a file of the same format. With
    `overwrite`, what stands at `out` is replaced in one step, the source itself included.
    Raises UsageError, InputError, MissingError or StaleError, with nothing written.
    """
    require_distinct(edits)
    if not source.weights.is_file():
        raise MissingError(f"there is no checkpoint {source.weights}")
    require_place(source.folder or source.weights, out, overwrite=overwrite)
    if source.folder is not None:
        plan = _folder_plan(edits, source, out, revert=revert, force=force)
    else:
        plan = _single_plan(
            source, out, plan_file(source.weights, edits, revert=revert, force=force)
        )
    loadable = CONFIG in plan.files or CONFIG in plan.texts
    model = f"local-dir:{out}" if loadable else None
    return write_copy(plan, model=model, revert=revert, dry_run=dry_run)


def write_copy(
    plan: CopyPlan, *, model: str | None, revert: bool, dry_run: bool, link: bool = False
) -> AppliedResult:
    """Write what a plan says, all of it or nothing; with `dry_run` only tell.

    With `link`, files that are not edited become hard links to their source where the
    file system allows it. Raises InputError where files at `out` would be lost.
    """
    require_nothing_lost(plan.out, [*plan.files, *plan.texts])
    if not dry_run:
        _write(plan, link=link)
    files = tuple(
        WrittenFile(str(plan.out / name), plan.files[name].stat().st_size, file.changes)
        for name, file in sorted(plan.plans.items())
    )
    return AppliedResult(str(plan.out), model, files, revert, dry_run)


def require_distinct(edits: Sequence[Edit]) -> None:
    """Refuse to apply no edit, or one edit twice. Raises UsageError."""
    if not edits:
        raise UsageError("no edit to apply was named")
    seen = Counter((e.header.name, e.header.layer, e.header.gradient) for e in edits)
    twice = [name for (name, _, _), count in seen.items() if count > 1]
    if twice:
        raise UsageError(f"the edit {twice[0]} is named twice", hint="use --scale 2")


def _folder_plan(
    edits: Sequence[Edit], source: CheckpointSource, out: Path, *, revert: bool, force: bool
) -> CopyPlan:
    folder = source.folder or source.weights.parent
    plans = {
        path.name: plan_file(path, edits, revert=revert, force=force)
        for path in weight_files(folder)
        if same_place(path, source.weights) or _holds_layer(path, edits, force=force)
    }
    if source.weights.name not in plans:
        raise InputError(f"{source.weights} does not lie in the model's folder {folder}")
    files = all_files(folder)
    for name in files:
        if Path(name).suffix in SUFFIXES and Path(name).parent != Path():
            progress.warn(f"{folder / name} lies below the model's folder: copied without the edit")
    return CopyPlan(out, files, plans, {})


def _holds_layer(path: Path, edits: Sequence[Edit], *, force: bool) -> bool:
    """Return whether a file beside the model's weights holds an edited layer as well."""
    layers = {edit.header.layer for edit in edits}
    try:
        file = open_weights(path)
    except InputError as error:
        if not force:
            raise InputError(
                f"{path} lies beside the model's weights and cannot be edited: {error.message}",
                hint="move it away, or --force to copy it as it is",
            ) from error
        progress.warn(f"{path} was copied as it is: {error.message}")
        return False
    names = set()
    for layer in layers:
        try:
            names.add(file.resolve_name(Layer.parse(layer).parameter))
        except InputError:
            continue
    if names:
        return True
    if file.names():
        progress.warn(f"{path} has no {' or '.join(sorted(layers))} and is copied without the edit")
    return False


def _single_plan(source: CheckpointSource, out: Path, plan: FilePlan) -> CopyPlan:
    weights = source.weights
    alone = single_file(weights, out, plan)
    if "" in alone.files or source.config is None:
        return alone
    name = STANDARD_NAME[open_weights(weights).container]
    config = {"model_cfg": source.config, "preprocess_cfg": source.preprocess or {}}
    text = json.dumps(config, indent=2) + "\n"
    return CopyPlan(out, {name: weights}, {name: plan}, {CONFIG: text})


def single_file(weights: Path, out: Path, plan: FilePlan) -> CopyPlan:
    """Return the plan of one edited file at `out`, which is a file, or a folder to put it in.

    Raises UsageError or InputError where `out` can be neither.
    """
    container = open_weights(weights).container
    if out.suffix in {*SUFFIXES, weights.suffix} - {""} and not out.is_dir():
        if (out.suffix == SAFETENSORS) != (container == "safetensors"):
            raise UsageError(
                f"{out.name} asks for another format than {weights.name} has",
                hint=f"--out {out.with_suffix(weights.suffix)}, or a folder",
            )
        return CopyPlan(out, {"": weights}, {"": plan}, {})
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file without a checkpoint's suffix", hint="another --out")
    return CopyPlan(out, {weights.name: weights}, {weights.name: plan}, {})


def _write(plan: CopyPlan, *, link: bool) -> None:
    with replacing(plan.out) as partial:
        for name, origin in plan.files.items():
            target = partial / name if name else partial
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in plan.plans:
                copy_spliced(origin, target, plan.plans[name].splices)
            elif not (link and link_file(origin, target)):
                copy_file(origin, target)
        for name, text in plan.texts.items():
            (partial / name).write_text(text)


# Formats that other libraries load in place of the ones edited here.
OTHER_FORMATS = (".msgpack", ".h5", ".onnx", ".ckpt", ".gguf", ".pb")


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryOptions:
    """How to carry edits over. `encoder` names one of several, `link` saves unedited bytes."""

    encoder: str | None = None
    revert: bool = False
    force: bool = False
    overwrite: bool = False
    dry_run: bool = False
    link: bool = False


def carry(
    edits: Sequence[Edit], target: Target, out: Path, *, options: CarryOptions
) -> AppliedResult:
    """Write a copy of a target with edits applied (or undone) at `out`.

    Raises UsageError, InputError, MissingError or StaleError, with nothing written.
    """
    require_distinct(edits)
    require_place(target.path, out, overwrite=options.overwrite)
    plans = plan_target(edits, target, options=options)
    if target.path.is_file():
        plan = single_file(target.path, out, plans[target.path])
    else:
        _tell_of_others(target, plans, force=options.force)
        files = all_files(target.path)
        relative = {str(path.relative_to(target.path)): plan for path, plan in plans.items()}
        plan = CopyPlan(out, files, relative, {})
    model = f"local-dir:{out}" if OPEN_CLIP in plan.files else None
    return write_copy(
        plan, model=model, revert=options.revert, dry_run=options.dry_run, link=options.link
    )


def plan_target(
    edits: Sequence[Edit], target: Target, *, options: CarryOptions
) -> dict[Path, FilePlan]:
    """Check edits against a target and work out the new values of its files.

    An edit goes into the encoder that holds the weights it was made for; where several
    do, one must be named. Raises UsageError, InputError or StaleError.
    """
    new = _NewValues()
    for layer, group in by_layer(edits).items():
        fitting = _fitting(target, layer, group, options)
        taken, refused = [], []
        for encoder, places in fitting:
            try:
                taken.append((encoder.name, _planned(places, layer, group, options)))
            except StaleError as error:
                refused.append(error)
        if not taken:
            raise refused[0]
        if len(taken) > 1:
            raise UsageError(
                f"{layer} fits several encoders of {target.path}",
                hint=f"--encoder {' or '.join(name for name, _ in taken)}",
            )
        for piece in taken[0][1]:
            new.add(*piece)
    return new.plans()


@dataclass
class _NewValues:
    """What the files of a target will hold, collected layer by layer."""

    states: dict[Path, WeightSet] = field(default_factory=dict)
    patches: dict[Path, dict[str, Raw]] = field(default_factory=dict)
    changes: dict[Path, list[LayerChange]] = field(default_factory=dict)

    def add(
        self, state: WeightSet, places: Sequence[TensorPlace], values: Raw, change: LayerChange
    ) -> None:
        """Add a layer's new values to the tensors and files that hold it."""

        def now(key: str) -> Raw:
            path = state.owners[key]
            own = self.patches.get(path, {})
            return own[key] if key in own else state.files[path].stored(key)

        for key, value in placed(places, values, now).items():
            path = state.owners[key]
            self.states[path] = state
            self.patches.setdefault(path, {})[key] = value
        for path in {state.owners[slot.key] for slot in places}:
            self.changes.setdefault(path, []).append(change)

    def plans(self) -> dict[Path, FilePlan]:
        """Return what to write into each file."""
        return {
            path: FilePlan(
                path, self.states[path].files[path].splices(patches), tuple(self.changes[path])
            )
            for path, patches in self.patches.items()
        }


Places = list[tuple[WeightSet, tuple[TensorPlace, ...]]]


def _fitting(
    target: Target, layer: str, group: Sequence[Edit], options: CarryOptions
) -> list[tuple[Encoder, Places]]:
    """Return the encoders that hold a layer and that it can influence the target through."""
    chosen = target.chosen(options.encoder)
    holding = [(encoder, found) for encoder in chosen if (found := _places(encoder, layer))]
    wanted = group[0].delta().shape
    same = [
        (encoder, found)
        for encoder, found in holding
        if all(state.shape(places) == wanted for state, places in found)
    ]
    fitting = same or holding
    reasons = [encoder.why_not(layer) for encoder in [e for e, _ in fitting] or chosen]
    if all(reasons) and not (fitting and options.force):
        raise InputError(
            f"{layer} cannot influence {target.path}: {reasons[0]}",
            hint=f"`slsgu rank {quote(group[0].header.name)} --target {quote(str(target.path))}` "
            "leaves such layers out"
            + ("; --force writes the edit all the same" if fitting else ""),
        )
    if not fitting:
        raise InputError(f"{target.path} holds no layer {layer}")
    return [pair for pair in fitting if options.force or pair[0].why_not(layer) is None]


def _places(encoder: Encoder, layer: str) -> Places:
    return [
        (state, places)
        for state in encoder.states
        for home in encoder.homes(state)
        if state.holds(places := tensor_places(layer, home))
    ]


def _planned(
    found: Places, layer: str, group: Sequence[Edit], options: CarryOptions
) -> list[tuple[WeightSet, tuple[TensorPlace, ...], Raw, LayerChange]]:
    planned = []
    for state, places in found:
        current, dtype = state.layer(places)
        path = state.owners[places[0].key]
        values, change = plan_layer(
            path, layer, current, dtype, group, revert=options.revert, force=options.force
        )
        planned.append((state, places, values, change))
    return planned


def _tell_of_others(target: Target, plans: Mapping[Path, FilePlan], *, force: bool) -> None:
    """Refuse weights that could not be checked; tell of those that other programs load."""
    for path, why in target.unread.items():
        if not force:
            raise InputError(
                f"{path} lies beside the weights and cannot be edited: {why}",
                hint="move it away, or --force to copy it as it is",
            )
        progress.warn(f"{path} was copied as it is: {why}")
    states = [state for encoder in target.encoders for state in encoder.states]
    known = {*target.unread, *(path for state in states for path in state.files)}
    for folder in sorted({target.path, *(path.parent for path in plans)}):
        for path in sorted(folder.iterdir()):
            weights = path.suffix in SUFFIXES and folder == target.path
            if path not in known and (weights or path.suffix in OTHER_FORMATS):
                progress.warn(f"{path} was copied without the edit")
