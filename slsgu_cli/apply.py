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

from slsgu_cli.console import Console
from slsgu_cli.copying import copy_file, replacing, same_place
from slsgu_cli.destination import all_files, require_nothing_lost, require_place
from slsgu_cli.edits import Edit
from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.planning import FilePlan, LayerChange, plan_file
from slsgu_cli.records import ModelSpec
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
class _Layout:
    """Where everything goes: `files` maps a name below `out` ("" is `out`) to its source."""

    out: Path
    files: dict[str, Path]
    plans: dict[str, FilePlan]
    texts: dict[str, str]


def apply_edits(
    edits: Sequence[Edit],
    source: CheckpointSource,
    out: Path,
    *,
    console: Console,
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
    _require_distinct(edits)
    if not source.weights.is_file():
        raise MissingError(f"there is no checkpoint {source.weights}")
    require_place(source.folder or source.weights, out, overwrite=overwrite)
    if source.folder is not None:
        layout = _folder_layout(edits, source, out, console, revert=revert, force=force)
    else:
        plan = plan_file(source.weights, edits, revert=revert, force=force)
        layout = _single_layout(source, out, plan)
    require_nothing_lost(out, [*layout.files, *layout.texts])
    if not dry_run:
        _write(layout)
    files = tuple(
        WrittenFile(str(out / name), layout.files[name].stat().st_size, plan.changes)
        for name, plan in sorted(layout.plans.items())
    )
    loadable = CONFIG in layout.files or CONFIG in layout.texts
    return AppliedResult(str(out), f"local-dir:{out}" if loadable else None, files, revert, dry_run)


def _require_distinct(edits: Sequence[Edit]) -> None:
    if not edits:
        raise UsageError("no edit to apply was named")
    seen = Counter((e.header.name, e.header.layer, e.header.gradient) for e in edits)
    twice = [name for (name, _, _), count in seen.items() if count > 1]
    if twice:
        raise UsageError(f"the edit {twice[0]} is named twice", hint="use --scale 2")


def _folder_layout(
    edits: Sequence[Edit],
    source: CheckpointSource,
    out: Path,
    console: Console,
    *,
    revert: bool,
    force: bool,
) -> _Layout:
    folder = source.folder or source.weights.parent
    plans = {
        path.name: plan_file(path, edits, revert=revert, force=force)
        for path in weight_files(folder)
        if same_place(path, source.weights) or _holds_layer(path, edits, console, force=force)
    }
    if source.weights.name not in plans:
        raise InputError(f"{source.weights} does not lie in the model's folder {folder}")
    files = all_files(folder)
    for name in files:
        if Path(name).suffix in SUFFIXES and Path(name).parent != Path():
            console.warn(f"{folder / name} lies below the model's folder: copied without the edit")
    return _Layout(out, files, plans, {})


def _holds_layer(path: Path, edits: Sequence[Edit], console: Console, *, force: bool) -> bool:
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
        console.warn(f"{path} was copied as it is: {error.message}")
        return False
    held = set()
    for layer in layers:
        try:
            held.add(file.resolve_name(layer))
        except InputError:
            continue
    if held:
        return True
    if file.names():
        console.warn(f"{path} has no {' or '.join(sorted(layers))} and is copied without the edit")
    return False


def _single_layout(source: CheckpointSource, out: Path, plan: FilePlan) -> _Layout:
    weights = source.weights
    container = open_weights(weights).container
    if out.suffix in {*SUFFIXES, weights.suffix} - {""} and not out.is_dir():
        if (out.suffix == SAFETENSORS) != (container == "safetensors"):
            raise UsageError(
                f"{out.name} asks for another format than {weights.name} has",
                hint=f"--out {out.with_suffix(weights.suffix)}, or a folder",
            )
        return _Layout(out, {"": weights}, {"": plan}, {})
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file without a checkpoint's suffix", hint="another --out")
    if source.config is None:
        return _Layout(out, {weights.name: weights}, {weights.name: plan}, {})
    name = STANDARD_NAME[container]
    config = {"model_cfg": source.config, "preprocess_cfg": source.preprocess or {}}
    text = json.dumps(config, indent=2) + "\n"
    return _Layout(out, {name: weights}, {name: plan}, {CONFIG: text})


def _write(layout: _Layout) -> None:
    with replacing(layout.out) as partial:
        for name, origin in layout.files.items():
            target = partial / name if name else partial
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in layout.plans:
                copy_spliced(origin, target, layout.plans[name].splices)
            else:
                copy_file(origin, target)
        for name, text in layout.texts.items():
            (partial / name).write_text(text)
