"""Edited copies of models of every kind."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slsgu_cli import progress
from slsgu_cli.checkpoints.configurations import OPEN_CLIP
from slsgu_cli.checkpoints.conversion import OtherLayout, converted
from slsgu_cli.checkpoints.destinations import README, SAFETENSORS, all_files, require_place
from slsgu_cli.checkpoints.edit_plan import FilePlan, patched, plan_target
from slsgu_cli.checkpoints.edits import (
    Edit,
    strength_of,
)
from slsgu_cli.checkpoints.layouts import SUFFIXES, open_weights
from slsgu_cli.checkpoints.model_copy import (
    AppliedResult,
    Check,
    CopyPlan,
    write_copy,
)
from slsgu_cli.checkpoints.targets import Target, with_edits
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.options import ApplyOptions

# What open_clip looks for in a folder, by the kind of file.
STANDARD_NAME = {
    "safetensors": "open_clip_model.safetensors",
    "torch": "open_clip_pytorch_model.bin",
}

# Formats that other libraries load in place of the ones edited here.
OTHER_FORMATS = (".msgpack", ".h5", ".onnx", ".ckpt", ".gguf", ".pb")

# Takes the present model card, and returns the one to write: None for none.
Card = Callable[[str | None], str | None]


def apply_edits(
    edits: Sequence[Edit],
    target: Target,
    out: Path,
    *,
    options: ApplyOptions,
    config: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, Path] | None = None,
    earlier: Sequence[Edit] = (),
    check: Check | None = None,
    card: Card | None = None,
    layout: OtherLayout | None = None,
) -> AppliedResult:
    """Write a copy of a model with distinct edits, if any, applied (or undone) at `out`.

    The edits build on `earlier` ones, which must be in place and stay unchanged.
    `out` is a folder, or for a single file also a file of the same format. With `config`,
    the content of its configuration, a single file becomes a folder in open_clip's layout,
    which also gets the `extra_files`.
    `check` examines a folder in open_clip's layout before it is in place. `card` returns the model
    card of a folder. With a `layout`, the copy has that layout.
    `out` is replaced in one step, even if it is the model itself.
    Raises UsageError, InputError, MissingError or StaleError, with nothing written.
    """
    require_place(target.path, out, overwrite=options.overwrite, layout=layout)
    scaled = [strength_of(edit, options) for edit in edits]
    plans, encoders = plan_target(scaled, target, options, earlier)
    if layout is not None:
        copy = _converted_copy(target, out, plans, layout, options)
    elif target.path.is_file():
        copy = _file_copy(
            target.path, out, plans.get(target.path, FilePlan()), config, extra_files or {}
        )
    else:
        if edits:
            _require_readable(target, options)
            _warn_of_other_files(target, plans)
        relative = {str(path.relative_to(target.path)): plan for path, plan in plans.items()}
        copy = CopyPlan(out, all_files(target.path), relative)
    result = write_copy(_with_card(copy, card), options, check)
    return replace(result, readers=with_edits(target.readers, encoders))


def _with_card(plan: CopyPlan, card: Card | None) -> CopyPlan:
    """Return a plan with the model card of a folder; a single file has none."""
    if card is None or "" in plan.plans:
        return plan
    there = plan.files.get(README)
    text = card(there.read_bytes().decode("utf-8", "surrogateescape") if there else None)
    files = {name: path for name, path in plan.files.items() if name != README}
    texts = plan.texts if text is None else {**plan.texts, README: text}
    return replace(plan, files=files, texts=texts)


def _file_copy(
    weights: Path,
    out: Path,
    plan: FilePlan,
    config: Mapping[str, Any] | None,
    extra_files: Mapping[str, Path],
) -> CopyPlan:
    """Return the plan for one edited file: `out` is the file, or a folder for it."""
    container = open_weights(weights).container
    if out.suffix in {*SUFFIXES, weights.suffix} - {""} and not out.is_dir():
        if (out.suffix == SAFETENSORS) != (container == "safetensors"):
            raise UsageError(
                f"{out.name} has another format than {weights.name}",
                hint=f"--out {out.with_suffix(weights.suffix)}, or a folder",
            )
        return CopyPlan(out, {"": weights}, {"": plan})
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file without a checkpoint's suffix", hint="another --out")
    if config is None:
        return CopyPlan(out, {weights.name: weights}, {weights.name: plan})
    name = STANDARD_NAME[container]
    text = json.dumps(config, indent=2) + "\n"
    return CopyPlan(out, {**extra_files, name: weights}, {name: plan}, {OPEN_CLIP: text})


def _converted_copy(
    target: Target,
    out: Path,
    plans: Mapping[Path, FilePlan],
    layout: OtherLayout,
    options: ApplyOptions,
) -> CopyPlan:
    """Return the plan for another layout: all weights, with the edits, in one file."""
    edited = {
        encoder.name: weights
        for encoder in target.chosen(options.encoder)
        for weights in reversed(encoder.copies)
        if (layout.weights in weights.files if layout.weights else plans.keys() & weights.files)
    }
    if len(edited) > 1:
        raise UsageError(
            f"{layout.client} loads one encoder, but these edits are for {' and '.join(edited)}",
            hint="write each encoder by a separate command with its edits",
        )
    (weights,) = edited.values()
    tensors = converted(weights, layout, patched(weights, plans))
    changes = [change for path in weights.files if path in plans for change in plans[path].changes]
    return CopyPlan(
        out,
        layout.files,
        {layout.file: FilePlan(changes=changes)},
        layout.texts,
        {layout.file: tensors},
        layout.client,
    )


def _require_readable(target: Target, options: ApplyOptions) -> None:
    """Raise InputError for weights next to the edited ones that cannot be read."""
    for path, why in target.unread.items():
        if not options.force:
            raise InputError(
                f"{path} is next to the weights and cannot be edited: {why}",
                hint="move it away, or --force to copy it unchanged",
            )
        progress.warn(f"{path} was copied unchanged: {why}")


def _warn_of_other_files(target: Target, plans: Iterable[Path]) -> None:
    """Warn of weights that are copied without the edit."""
    sets = [weights for encoder in target.encoders for weights in encoder.copies]
    known = {*target.unread, *(path for weights in sets for path in weights.files)}
    for folder in sorted({target.path, *(path.parent for path in plans)}):
        for path in sorted(set(folder.iterdir()) - known):
            is_weights = folder == target.path and path.suffix in SUFFIXES and _has_tensors(path)
            if is_weights or path.suffix in OTHER_FORMATS:
                progress.warn(f"{path} was copied without the edit")


def _has_tensors(path: Path) -> bool:
    """Return whether a file holds tensors, or might: an unreadable one may be weights."""
    try:
        return bool(open_weights(path).entries)
    except InputError:
        return True
