"""From the names of edits to a checkpoint that has them: what `slsgu apply` does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slsgu_cli import progress
from slsgu_cli.apply import AppliedResult, CheckpointSource, apply_edits
from slsgu_cli.edits import Edit
from slsgu_cli.errors import UsageError
from slsgu_cli.models import resolve
from slsgu_cli.pipeline import direct_edit, edit_for, rank_options
from slsgu_cli.records import Direction, ModelSpec, Qkv
from slsgu_cli.search import SearchOptions
from slsgu_cli.store import Store
from slsgu_cli.targets.carrying import CarryOptions, carry
from slsgu_cli.targets.mapping import Spelling
from slsgu_cli.targets.states import read_states
from slsgu_cli.targets.target import read_target


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyRequest:
    """What `apply` is asked for. `layer` with `step` takes a direction without a search.

    `direction`, `ridge` and `qkv` are for what has no ranking yet, or is not searched for; an
    edit that is there already must be of that direction, and of a layer of that kind.
    """

    names: Sequence[str]
    out: Path
    model: ModelSpec | None = None
    target: Path | None = None
    encoder: str | None = None
    layer: str | None = None
    step: float | None = None
    direction: Direction | None = None
    ridge: float | None = None
    qkv: Qkv | None = None
    scale: float = 1.0
    rank: int | None = None
    revert: bool = False
    force: bool = False
    overwrite: bool = False
    dry_run: bool = False
    link: bool = False
    device: str = "auto"


def apply_named(store: Store, request: ApplyRequest) -> AppliedResult:
    """Write the checkpoint that `request` describes, running what its edits still lack."""
    if request.target is not None and request.model is not None:
        raise UsageError("--target takes the place of --model", hint="leave one of them out")
    edits = _requested_edits(store, request)
    for edit in edits:
        if edit.header.steer is not None and not edit.header.forgotten:
            progress.warn(
                f"the edit {edit.header.name} does not forget completely: its search failed"
            )
    if not request.revert:
        _tell_of_joint_searches(edits)
    if request.target is not None:
        return _carried(edits, request, request.target)
    model = resolve(_shared_model(edits, request.model))
    if model.folder is not None and _in_transformers(model.folder):
        return _carried(edits, request, model.folder)
    source = CheckpointSource(
        model.spec, model.weights, model.folder, model.config, model.preprocess
    )
    return apply_edits(
        edits,
        source,
        request.out,
        revert=request.revert,
        force=request.force,
        overwrite=request.overwrite,
        dry_run=request.dry_run,
    )


def _tell_of_joint_searches(edits: Sequence[Edit]) -> None:
    """Warn of edits that were searched to be in place with others which are not there."""
    present = {(edit.header.name, edit.header.joint) for edit in edits}
    joints = {edit.header.joint for edit in edits if edit.header.joint}
    for joint in sorted(joints, key=lambda joint: joint.digest):
        missing = [name for name in joint.names if (name, joint) not in present]
        if missing:
            there = [name for name in joint.names if name not in missing]
            progress.warn(
                f"{', '.join(there)}: searched jointly with {', '.join(missing)}, whose edit of "
                "that search is not applied here; the figures hold for all of them together"
            )


def _requested_edits(store: Store, request: ApplyRequest) -> list[Edit]:
    options = SearchOptions(
        direction=request.direction,
        ridges=() if request.ridge is None else (request.ridge,),
        qkv=request.qkv,
        device=request.device,
    )
    target = None if request.target is None else str(request.target)
    ranking = replace(rank_options(options), target=target, encoder=request.encoder)
    if request.step is not None and not math.isfinite(request.step):
        raise UsageError(f"--step {request.step} is no step size")
    if request.layer is not None:
        if request.step is None or len(request.names) != 1:
            raise UsageError("--layer goes with one NAME and --step", hint="--layer L --step S")
        edits = [
            direct_edit(
                store, request.names[0], layer=request.layer, step=request.step, options=ranking
            )
        ]
    else:
        edits = [edit_for(store, name, options=options, ranking=ranking) for name in request.names]
        if request.step is not None:
            edits = [edit.restepped(request.step) for edit in edits]
    if request.rank is not None:
        edits = [edit.of_rank(request.rank) for edit in edits]
    return edits if request.scale == 1 else [edit.scaled(request.scale) for edit in edits]


def _in_transformers(folder: Path) -> bool:
    """Return whether weights in a folder have transformers' names; open_clip's may lie beside."""
    states, _ = read_states(folder)
    return any(h.spelling is Spelling.TRANSFORMERS for state in states for h in state.homes)


def _carried(edits: Sequence[Edit], request: ApplyRequest, path: Path) -> AppliedResult:
    options = CarryOptions(
        encoder=request.encoder,
        revert=request.revert,
        force=request.force,
        overwrite=request.overwrite,
        dry_run=request.dry_run,
        link=request.link,
    )
    return carry(edits, read_target(path), request.out, options=options)


def _shared_model(edits: Sequence[Edit], given: ModelSpec | None) -> ModelSpec:
    """Return the model to edit: the one given, else the one all edits were made for."""
    if given is not None:
        return given
    models = {str(edit.header.model): edit.header.model for edit in edits}
    if len(models) > 1:
        raise UsageError(
            f"the edits were made for different models: {', '.join(sorted(models))}",
            hint="say which to edit with --model",
        )
    return next(iter(models.values()))
