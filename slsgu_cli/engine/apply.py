"""The checkpoint with edits that `apply` writes."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from slsgu_cli import progress
from slsgu_cli.checkpoints.apply import apply_edits
from slsgu_cli.checkpoints.edit_plan import require_distinct
from slsgu_cli.checkpoints.edits import (
    Edit,
    by_layer,
    earlier_edits,
    load_edits,
    original_values,
    warn_of_joint_searches,
    warn_of_other_encoders,
)
from slsgu_cli.checkpoints.hub import HUB
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.layouts import open_weights
from slsgu_cli.checkpoints.model_card import edited_card
from slsgu_cli.checkpoints.model_copy import AppliedResult
from slsgu_cli.checkpoints.naming_schemes import NamingScheme
from slsgu_cli.checkpoints.number_formats import Floats, rounded
from slsgu_cli.checkpoints.targets import Family, Target, read_target
from slsgu_cli.checkpoints.tensor_file import canonical_name
from slsgu_cli.clip.model_folder import tokenizer_to_add, why_not_loaded
from slsgu_cli.clip.models import ResolvedModel, fingerprint, model_layer, resolve
from slsgu_cli.clip.other_layouts import other_layout
from slsgu_cli.engine.set_edits import direct_edit, ensure_edit, is_edit_file, rank_options
from slsgu_cli.errors import SlsguError, UsageError
from slsgu_cli.records.options import (
    ApplyOptions,
    ApplyRequest,
    SearchOptions,
)
from slsgu_cli.records.sets import LOCAL, ModelSpec
from slsgu_cli.store.atomic import require_regular
from slsgu_cli.store.store import Store

# A tensor of a whole CLIP that neither of its towers has.
LOGIT_SCALE = "logit_scale"


def apply(store: Store, request: ApplyRequest) -> AppliedResult:
    """Write the checkpoint that `request` describes, and first make the edits that are missing."""
    if request.target is not None and request.model is not None:
        raise UsageError("--target takes the place of --model", hint="leave one of them out")
    require_regular(request.out)
    edits = _requested_edits(store, request)
    require_distinct(edits)
    for edit in edits:
        if edit.header.criterion is not None and not edit.header.forgotten:
            progress.warn(
                f"the edit {edit.header.name} does not forget completely: its search failed"
            )
    earlier = [] if request.force else earlier_edits(store, edits)
    if not request.revert:
        warn_of_joint_searches([*edits, *earlier])
        warn_of_other_encoders([*edits, *earlier])
    if request.target is not None:
        target, config = read_target(request.target), None
        model = _whole_clip(target, edits) if target.family is Family.CLIP else None
        spec = None
    else:
        model = resolve(request.model or _shared_model(edits))
        target, config = _files_of(model)
        spec = model.spec
    with TemporaryDirectory() as scratch:
        layout = other_layout(request.layout, model, target, edits, Path(scratch))
        library = layout.client if layout else None
        if layout is None and model is not None:
            is_transformers = model.scheme is NamingScheme.TRANSFORMERS
            library = "transformers" if is_transformers else "open_clip"
        extra = tokenizer_to_add(model, Path(scratch)) if config and layout is None else {}
        card = partial(
            edited_card,
            edits=[edit.header for edit in edits],
            earlier=[edit.header for edit in earlier],
            options=request,
            spec=spec,
            place=target.path,
            library=library,
        )
        result = apply_edits(
            edits,
            target,
            request.out,
            options=request,
            config=config,
            extra_files=extra,
            earlier=earlier,
            check=lambda folder: why_not_loaded(folder, model),
            card=card,
            layout=layout,
        )
    if model is not None and not request.force:
        formats = {change.dtype for file in result.files for change in file.changes}
        if remark := _other_layers(model, [*edits, *earlier], formats):
            progress.note(remark)
    return result


def copy_original(spec: ModelSpec, out: Path, *, options: ApplyOptions) -> AppliedResult:
    """Write a copy of a model without edits, as `apply` writes one with edits."""
    require_regular(out)
    model = resolve(spec)
    target, config = _files_of(model)
    with TemporaryDirectory() as scratch:
        return apply_edits(
            [],
            target,
            out,
            options=options,
            config=config,
            extra_files=tokenizer_to_add(model, Path(scratch)),
            check=lambda folder: why_not_loaded(folder, model),
        )


def _files_of(model: ResolvedModel) -> tuple[Target, dict[str, Any]]:
    """Return a model's files, and the configuration for open_clip."""
    config = {"model_cfg": model.config, "preprocess_cfg": model.preprocess}
    return read_target(model.folder or model.weights), config


def _whole_clip(target: Target, edits: Sequence[Edit]) -> ResolvedModel | None:
    """Return a target that is a whole CLIP as a model; None for any other.

    A file of weights has the configuration of the model that the edits were made for, unless
    that must be downloaded from a hub.
    """
    known, here = edits[0].header.model, ModelSpec(str(target.path))
    try:
        if target.path.is_dir():
            return resolve(here)
        names = set(map(canonical_name, open_weights(target.path).entries))
        edited = {Layer.parse(edit.header.layer).parameter for edit in edits}
        if known.name.startswith(HUB) or not {LOGIT_SCALE, *edited} <= names:
            return None
        named = not known.name.startswith(LOCAL)
        like = resolve(replace(known, pretrained=str(target.path)) if named else known)
    except SlsguError:
        return None
    return replace(like, spec=here, weights=target.path, folder=None, scheme=NamingScheme.OPEN_CLIP)


def _other_layers(
    model: ResolvedModel, edits: Sequence[Edit], formats: Collection[str]
) -> str | None:
    """Return a warning if layers other than the edited ones differ from the edits' model.

    A copy in a coarser format has another fingerprint although it can be the same model, and a
    LoRA holds no original values: neither is compared.
    """
    if any(edit.is_lora for edit in edits):
        return None
    instead: dict[str, Floats] = {}
    for name, group in by_layer(edits).items():
        layer, values = Layer.parse(name), original_values(group).astype(np.float32)
        if any(not np.array_equal(rounded(values, dtype), values) for dtype in formats):
            return None
        whole = instead.get(layer.parameter)
        if layer.part is not None and whole is None:
            whole = model_layer(model, layer.parameter).astype(np.float32)
        instead[layer.parameter] = layer.replaced(whole, values)
    now = fingerprint(model, instead)
    others = [edit.header.name for edit in edits if edit.header.model_fingerprint != now]
    if not others:
        return None
    return (
        f"{model.spec} differs from the model that {', '.join(others)} was made for in more "
        "than the edited layers: the figures of the edit do not hold for it"
    )


def _requested_edits(store: Store, request: ApplyRequest) -> list[Edit]:
    """Return the edits of a request: one given by layer and step, or those of the sets.

    A set without an edit is searched, and a file may hold several edits.
    """
    if request.step is not None and not math.isfinite(request.step):
        raise UsageError(f"--step {request.step} is not a step size")
    search_options = SearchOptions(
        direction=request.direction,
        damping=request.damping,
        qkv=request.qkv,
        device=request.device,
    )
    ranking = replace(
        rank_options(search_options),
        target=None if request.target is None else str(request.target),
        encoder=request.encoder,
    )
    if request.layer is not None:
        if request.step is None or len(request.names) != 1:
            raise UsageError("--layer goes with one NAME and --step", hint="--layer L --step S")
        (name,) = request.names
        return [direct_edit(store, name, layer=request.layer, step=request.step, options=ranking)]
    edits: list[Edit] = []
    for name in request.names:
        if is_edit_file(name):
            edits += load_edits(store, name)
        else:
            edits.append(ensure_edit(store, name, options=search_options, ranking=ranking))
    return edits if request.step is None else [edit.restepped(request.step) for edit in edits]


def _shared_model(edits: Sequence[Edit]) -> ModelSpec:
    """Return the model that all edits were made for."""
    models = {str(edit.header.model): edit.header.model for edit in edits}
    if len(models) > 1:
        raise UsageError(
            f"the edits were made for different models: {', '.join(sorted(models))}",
            hint="name the one to edit with --model",
        )
    return next(iter(models.values()))
