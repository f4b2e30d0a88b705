"""Applying edits: a checkpoint's copy with the edited layers, in the format it came in.

A model's folder is copied as a whole, and every weight file in it that holds an edited
layer is edited, for open_clip would load a file left over as gladly. Nothing is written
before all of them are checked, and what is written appears whole or not at all.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slsgu_cli import progress
from slsgu_cli.copying import copy_file, link_file, replacing, same_place
from slsgu_cli.destination import all_files, require_nothing_lost, require_place
from slsgu_cli.edits import Edit
from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.planning import FilePlan, LayerChange, plan_file
from slsgu_cli.records import ModelSpec
from slsgu_cli.thirds import parameter_of
from slsgu_cli.weights import SUFFIXES, copy_spliced, open_weights, weight_files

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
            names.add(file.resolve_name(parameter_of(layer)))
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
