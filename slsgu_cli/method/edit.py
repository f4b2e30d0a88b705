"""From a set's name to its edit, searched for or given by hand; `apply`."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import combinations
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from slsgu_cli import progress
from slsgu_cli.checkpoints.apply import apply_edits, copy_model
from slsgu_cli.checkpoints.edit_plan import Copies, by_encoder, copies_of, require_distinct
from slsgu_cli.checkpoints.edits import (
    Edit,
    by_layer,
    earlier_edits,
    load_edit,
    load_edits,
    moved_values,
    original_values,
    recognised,
    same_values,
    strength_of,
    warn_of_joint_searches,
    warn_of_other_encoders,
)
from slsgu_cli.checkpoints.hub import HUB
from slsgu_cli.checkpoints.layers import Layer, find_layers, layers_of
from slsgu_cli.checkpoints.layouts import WeightSet, open_weights
from slsgu_cli.checkpoints.model_copy import AppliedResult
from slsgu_cli.checkpoints.naming_schemes import NamingScheme, TensorPlace
from slsgu_cli.checkpoints.number_formats import FLOATS, Floats, Raw, narrow, rounded, widen
from slsgu_cli.checkpoints.targets import Family, Target, read_target
from slsgu_cli.checkpoints.tensor_file import canonical_name
from slsgu_cli.clip.model_folder import (
    ModelCard,
    other_layout,
    tokenizer_beside,
    why_not_loaded,
)
from slsgu_cli.clip.models import ResolvedModel, fingerprint, model_layer, resolve
from slsgu_cli.errors import InputError, NotForgottenError, SlsguError, StaleError, UsageError
from slsgu_cli.method.directions import (
    LayerStep,
    ensure_covariances,
    forget_direction,
    unmeasured_edit,
)
from slsgu_cli.method.ranking import named_layers, rank
from slsgu_cli.method.scoring import norm
from slsgu_cli.method.search import SearchResult, search
from slsgu_cli.records.method import (
    Direction,
    EditHeader,
    GradientHeader,
    GradientPointer,
    Qkv,
    Ranking,
    Tower,
)
from slsgu_cli.records.options import (
    ApplyOptions,
    ApplyRequest,
    RankOptions,
    SearchOptions,
    StrengthOptions,
)
from slsgu_cli.records.sets import LOCAL, ModelSpec
from slsgu_cli.store.artifacts import (
    Artifact,
    digests_of,
    plot_path,
    read_manifest,
    read_pointer,
)
from slsgu_cli.store.atomic import require_regular
from slsgu_cli.store.store import Store

# A tensor that a whole CLIP has, and none of its towers.
LOGIT_SCALE = "logit_scale"

# The cosine with an edit from which on weights were moved along it, and by it alone.
ALONG = 0.999


def ensure_edit(
    store: Store, name: str, *, options: SearchOptions, ranking: RankOptions | None = None
) -> Edit:
    """Return the edit in a file, or that of the set `name`.

    A set that has none is searched as `options` say, and ranked as `ranking` says where it has
    no ranking either; both are drawn. Raises NotForgottenError where no step forgets, and
    StaleError where an edit that is there was made from other gradients than the set has now,
    or otherwise than `options` say.
    """
    if _is_file(name) or not store.exists(Artifact.SET.path(name)):
        return load_edit(store, name)
    if not store.exists(Artifact.EDIT.path(name)) and store.exists(Artifact.POINTER.path(name)):
        if not store.exists(Artifact.RANKING.path(name)):
            progress.note(f"{name} has no ranking yet: ranking its layers")
            rank_and_plot(store, name, options=ranking or rank_options(options))
        progress.note(f"{name} has no edit yet: searching for one")
        require_forgotten(search_and_plot(store, name, options=options))
    edit = current_edit(store, name)
    _require_made_so(edit.header, options)
    return edit


def _require_made_so(header: EditHeader, options: SearchOptions) -> None:
    """Raise StaleError unless an edit is of the direction, kind of layer and damping given."""
    name = header.name
    ranks, searches = f"`slsgu rank {quote(name)}", f"`slsgu search {quote(name)}"
    if options.direction not in (None, Direction.BOTH, header.direction):
        raise StaleError(
            f"the edit {name} moves along the direction {header.direction}, "
            f"not {options.direction}",
            hint=f"run {ranks} --direction {options.direction}` and {searches}`",
        )
    if options.qkv and not Layer.parse(header.layer).is_of(options.qkv):
        raise StaleError(
            f"the edit {name} changes {header.layer}, which is no layer where query, key "
            f"and value are {options.qkv}",
            hint=f"run {ranks} --qkv {options.qkv}` and {searches}`",
        )
    if options.damping not in (None, header.damping):
        had = "no damping" if header.damping is None else f"damping {header.damping:g}"
        raise StaleError(
            f"the edit {name} was whitened with {had}, not {options.damping:g}",
            hint=f"run {searches} --damping {options.damping:g}`",
        )


def current_edit(store: Store, name: str) -> Edit:
    """Return the edit of the set `name`.

    Raises MissingError, and StaleError where it was made from other rows or gradients than
    the set has now.
    """
    edit = load_edit(store, name)
    if not store.exists(Artifact.POINTER.path(name)):
        return edit
    pointer = read_pointer(store, read_manifest(store, name))
    change = Artifact.EDIT.changed(edit.header, digests_of(None, pointer))
    if change:
        others = {
            "gradient": f"the edit {name} was made from other gradients than the set has now",
            "retain_data": f"the direction of the edit {name} was whitened by other retain rows "
            "than the set has now",
        }
        raise StaleError(
            others[change.field],
            hint=f"run `{Artifact.RANKING.command(name)}` and `{Artifact.EDIT.command(name)}`",
        )
    return edit


def rank_options(options: SearchOptions) -> RankOptions:
    """Return how to rank for a search that finds no ranking."""
    chosen = RankOptions(device=options.device)
    if options.direction is not None:
        chosen = replace(chosen, direction=options.direction)
    if options.qkv is not None:
        chosen = replace(chosen, qkv=options.qkv)
    return chosen if options.damping is None else replace(chosen, damping=options.damping)


def direct_edit(
    store: Store, name: str, *, layer: str, step: float, options: RankOptions | None = None
) -> Edit:
    """Return the edit that moves `layer` by `step` along its direction, unsearched.

    `options` say which direction, and how it is whitened; of both, it is whitened. Raises
    UsageError where the gradients have no such layer.
    """
    options = options or RankOptions()
    manifest = read_manifest(store, name)
    pointer = read_pointer(store, manifest)
    moved = named_layer(store, pointer, layer)
    whitened = options.direction.whitens
    covariances = None
    if whitened:
        covariances = ensure_covariances(
            store, manifest, pointer, [moved.name], device=options.device
        )
    along = forget_direction(
        store, pointer, moved.name, damping=options.whitening_damping, covariances=covariances
    )
    before = model_layer(resolve(pointer.model), moved.name)
    layer_step = LayerStep(
        layer=moved.name,
        tower=moved.recorded_tower,
        step=step,
        share=step * norm(along) / (norm(before) or 1.0),
        damping=options.whitening_damping if whitened else None,
        delta=step * along,
        before=before,
    )
    return unmeasured_edit(manifest, pointer, layer_step)


def named_layer(store: Store, pointer: GradientPointer, text: str) -> Layer:
    """Return the one layer of the gradients that `text` means. Raises UsageError."""
    header = store.read_header(Artifact.GRADIENT.path(pointer.forget), GradientHeader)
    whole, thirds = (layers_of(header.weights, qkv) for qkv in (Qkv.FUSED, Qkv.SPLIT))
    names = whole if find_layers(text, whole) else thirds
    hint = f"run `slsgu rank {quote(pointer.name)}` for their names"
    return Layer.parse(named_layers([text], names, among="layers", hint=hint)[0])


def rank_and_plot(store: Store, name: str, *, options: RankOptions) -> tuple[Ranking, list[str]]:
    """Rank the layers of a set and draw each tower's front; return where the plots are."""
    from slsgu_cli.figures.curves import pareto_plot

    ranking = rank(store, name, options=options)
    plots = []
    ranked_along = ranking.by_direction()
    for direction, scores in ranked_along.items():
        along = "" if len(ranked_along) == 1 else f", {direction}"
        for tower in Tower:
            if any(score.tower is tower for score in scores):
                path = plot_path(name, f"front-{tower}" + along.replace(", ", "-"))
                title = f"{name}: {tower} layers{along}"
                store.write_bytes(path, pareto_plot(scores, tower=tower, title=title))
                plots.append(store.where(path))
    return ranking, plots


def search_and_plot(store: Store, name: str, *, options: SearchOptions) -> SearchResult:
    """Search a set's layers and draw the accuracies against the step for each."""
    result = search(store, name, options=options)
    draw_steps(store, result)
    return result


def draw_steps(store: Store, result: SearchResult) -> None:
    """Draw the accuracies against the step for each layer that was searched."""
    from slsgu_cli.figures.curves import step_plot

    name = result.trials.name
    chosen, trials = result.chosen, result.trials
    lines: dict[str, set[float | None]] = {}
    for trial in trials.trials:
        lines.setdefault(trial.layer, set()).add(trial.damping)
    for layer, dampings in sorted(lines.items()):
        for damping in dampings:
            step = chosen.step if (layer, damping) == (chosen.layer, chosen.damping) else None
            along = "gradient" if damping is None else f"{damping:g}"
            path = plot_path(name, f"steps-{layer}" + (f"-{along}" if len(dampings) > 1 else ""))
            store.write_bytes(path, step_plot(trials, layer=layer, damping=damping, chosen=step))


def require_forgotten(result: SearchResult) -> None:
    """Raise NotForgottenError unless the chosen step brings the steered accuracy to 0."""
    if result.forgotten:
        return
    chosen, trials = result.chosen, result.trials
    margin = "" if trials.margin is None else f", and a gap of {chosen.gap:.3f}"
    raise NotForgottenError(
        f"no step forgets {trials.name}: the best, {chosen.layer} at {chosen.step:.4g}, leaves "
        f"FA@1 {chosen.forget.top1:.1f} and FA@5 {chosen.forget.top5:.1f} "
        f"of {trials.baseline_forget.top1:.1f} and {trials.baseline_forget.top5:.1f}{margin}",
        hint="the trials and this edit are kept; try --steps 20, or another --layer",
    )


def apply(store: Store, request: ApplyRequest) -> AppliedResult:
    """Write the checkpoint that `request` describes, running what its edits still lack."""
    if request.target is not None and request.model is not None:
        raise UsageError("--target takes the place of --model", hint="leave one of them out")
    require_regular(request.out)
    edits = _requested_edits(store, request)
    for edit in edits:
        if edit.header.criterion is not None and not edit.header.forgotten:
            progress.warn(
                f"the edit {edit.header.name} does not forget completely: its search failed"
            )
    earlier = [] if request.force else earlier_edits(store, edits)
    if not request.revert:
        warn_of_joint_searches([*edits, *earlier])
        warn_of_other_encoders([*edits, *earlier])
    config = None
    if request.target is not None:
        target = read_target(request.target)
        model = _whole_clip(target, edits) if target.family is Family.CLIP else None
    else:
        model = resolve(_shared_model(edits, request.model))
        target, config = _files_of(model)
    compare = None
    if model is not None and not request.force:
        compare = partial(_other_layers, model, [*edits, *earlier])
    with TemporaryDirectory() as scratch:
        layout = other_layout(request.layout, model, target, edits, Path(scratch))
        beside = tokenizer_beside(model, Path(scratch)) if config and layout is None else {}
        card = ModelCard.of(
            edits,
            earlier,
            options=request,
            base=target.path if model is None or request.target is not None else model,
            library=_library(model) if layout is None else layout.client,
        )
        return apply_edits(
            edits,
            target,
            request.out,
            options=request,
            config=config,
            beside=beside,
            earlier=earlier,
            compare=compare,
            check=lambda folder: why_not_loaded(folder, model),
            card=card.over,
            layout=layout,
        )


def _library(model: ResolvedModel | None) -> str | None:
    """Return what loads a model in the layout that it has."""
    if model is None:
        return None
    return "transformers" if model.scheme is NamingScheme.TRANSFORMERS else "open_clip"


def copy_original(spec: ModelSpec, out: Path, *, options: ApplyOptions) -> AppliedResult:
    """Write a copy of a model where a checkpoint with edits would go: without any."""
    require_regular(out)
    model = resolve(spec)
    target, config = _files_of(model)
    with TemporaryDirectory() as scratch:
        return copy_model(
            target,
            out,
            options=options,
            config=config,
            beside=tokenizer_beside(model, Path(scratch)),
            check=lambda folder: why_not_loaded(folder, model),
        )


def _files_of(model: ResolvedModel) -> tuple[Target, dict[str, Any]]:
    """Return a model's files, and the configuration that open_clip loads them by."""
    config = {"model_cfg": model.config, "preprocess_cfg": model.preprocess}
    return read_target(model.folder or model.weights), config


def _whole_clip(target: Target, edits: Sequence[Edit]) -> ResolvedModel | None:
    """Return a target that is a whole CLIP as a model; None of another.

    A file of weights has the configuration of the model that edits were made for, if that is
    to be had without a hub.
    """
    known, here = edits[0].header.model, ModelSpec(str(target.path))
    try:
        if target.path.is_dir():
            return resolve(here)
        held = set(map(canonical_name, open_weights(target.path).names()))
        moved = {Layer.parse(edit.header.layer).parameter for edit in edits}
        if known.name.startswith(HUB) or not {LOGIT_SCALE, *moved} <= held:
            return None
        named = not known.name.startswith(LOCAL)
        like = resolve(replace(known, pretrained=str(target.path)) if named else known)
    except SlsguError:
        return None
    return replace(like, spec=here, weights=target.path, folder=None, scheme=NamingScheme.OPEN_CLIP)


def _other_layers(
    model: ResolvedModel, edits: Sequence[Edit], formats: Collection[str]
) -> str | None:
    """Return what to tell where edits were made on a model whose other layers are not `model`'s.

    A copy in a coarser format has another fingerprint and can be the same model: of that,
    nothing is told.
    """
    if any(edit.is_lora for edit in edits):
        progress.detail("a LoRA holds no original values: other layers were not compared")
        return None
    instead: dict[str, Floats] = {}
    for name, group in by_layer(edits).items():
        layer, values = Layer.parse(name), original_values(group).astype(np.float32)
        if any(not np.array_equal(rounded(values, dtype), values) for dtype in formats):
            progress.detail(
                f"{model.spec} is {', '.join(formats)}: its other layers were not compared"
            )
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
        "than the edited layers: the figures of the edit are not of it"
    )


class Presence(StrEnum):
    """Whether an edit is in a checkpoint."""

    IN = "in it"
    ABSENT = "absent"
    OTHER = "other weights"


@dataclass(frozen=True, slots=True)
class FoundEdit:
    """What one file holds of an edit. `share` is how much of it other weights lie along it."""

    name: str
    layer: str
    file: str
    dtype: str
    presence: Presence
    share: float | None = None


def find_edits(
    store: Store, names: Sequence[str], model: Path, options: StrengthOptions
) -> list[FoundEdit]:
    """Return whether edits are in a model, in every copy of the encoder that it holds.

    Those that they stand on are looked for as well. Of several encoders, it is the ones that
    hold the layer with or without the edit. Raises MissingError, InputError or StaleError.
    """
    edits = [strength_of(load_edit(store, name), options) for name in names]
    require_distinct(edits)
    edits += earlier_edits(store, edits)
    target = read_target(model)
    found: list[FoundEdit] = []
    for layer, edits_of in by_layer(edits).items():
        holding = [copies_of(encoder, layer) for encoder in target.chosen(options.encoder)]
        if not any(holding):
            raise InputError(f"{model} holds no layer {layer}")
        for group in by_encoder(edits_of, holding):
            found += _found_among(holding, group)
    return found


def _found_among(holding: Sequence[Copies], group: Sequence[Edit]) -> list[FoundEdit]:
    """Return what encoders that hold a layer have of its edits, those of other weights left out."""
    shape = original_values(group).shape
    fit = [copies for copies in holding if any(w.shape(p) == shape for w, p in copies)]
    of_encoders = [
        [one for weights, places in copies for one in _found_in(weights, places, group)]
        for copies in fit or holding
    ]
    known = [rows for rows in of_encoders if any(r.presence is not Presence.OTHER for r in rows)]
    return [one for rows in known or of_encoders for one in rows]


def _found_in(
    weights: WeightSet, places: Sequence[TensorPlace], group: Sequence[Edit]
) -> list[FoundEdit]:
    """Return which edits of a layer made it what it is in a set of weights."""
    current, dtype = weights.layer(places)
    there, share = None, None
    if dtype in FLOATS and current.shape == original_values(group).shape:
        there, share = _in_place(current, dtype, group), _share(current, dtype, group)
    path = str(weights.owners[places[0].key])
    rows = []
    for edit in group:
        presence = Presence.OTHER
        if there is not None:
            presence = Presence.IN if edit in there else Presence.ABSENT
        told = share if presence is Presence.OTHER else None
        rows.append(FoundEdit(edit.header.name, edit.header.layer, path, dtype, presence, told))
    return rows


def _in_place(current: Raw, dtype: str, group: Sequence[Edit]) -> Sequence[Edit] | None:
    """Return the edits that made a layer what it is, most of them first; None for others.

    They may have been added in another precision than the file has now.
    """
    before = original_values(group)
    if all(recognised(current, dtype, edit.header.digests) for edit in group):
        return ()
    for count in range(len(group), -1, -1):
        for some in combinations(group, count):
            deltas = [(edit.factor, edit.delta()) for edit in some]
            for made_in in dict.fromkeys((dtype, "F32", "F16", "BF16")):
                start = narrow(before, made_in)
                new = moved_values(start, deltas, made_in)[0] if deltas else start
                if same_values(narrow(widen(new, made_in), dtype), current):
                    return some
    return None


def _share(current: Raw, dtype: str, group: Sequence[Edit]) -> float | None:
    """Return how much of an edit a layer moved along it; None unless it moved that way alone."""
    if len(group) > 1:
        return None
    moved = (widen(current, dtype) - original_values(group)).reshape(-1).astype(np.float64)
    delta = group[0].factor * group[0].delta().reshape(-1).astype(np.float64)
    along, length = float(moved @ delta), norm(moved) * norm(delta)
    return along / norm(delta) ** 2 if length and along / length > ALONG else None


def _requested_edits(store: Store, request: ApplyRequest) -> list[Edit]:
    """Return the edits of a request: one given by layer and step, or those of the sets."""
    if request.step is not None and not math.isfinite(request.step):
        raise UsageError(f"--step {request.step} is no step size")
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
    if request.layer is None:
        edits = [
            edit
            for name in request.names
            for edit in _edits_of(store, name, options=search_options, ranking=ranking)
        ]
        return edits if request.step is None else [edit.restepped(request.step) for edit in edits]
    if request.step is None or len(request.names) != 1:
        raise UsageError("--layer goes with one NAME and --step", hint="--layer L --step S")
    (name,) = request.names
    return [direct_edit(store, name, layer=request.layer, step=request.step, options=ranking)]


def _edits_of(
    store: Store, name: str, *, options: SearchOptions, ranking: RankOptions
) -> list[Edit]:
    """Return the edit of a set, made where it is missing, or all edits of a file."""
    if _is_file(name):
        return load_edits(store, name)
    return [ensure_edit(store, name, options=options, ranking=ranking)]


def _is_file(name: str) -> bool:
    return "/" in name or name.endswith(".safetensors")


def _shared_model(edits: Sequence[Edit], model: ModelSpec | None) -> ModelSpec:
    """Return the model to edit: `model`, else the one all edits were made for."""
    if model is not None:
        return model
    models = {str(edit.header.model): edit.header.model for edit in edits}
    if len(models) > 1:
        raise UsageError(
            f"the edits were made for different models: {', '.join(sorted(models))}",
            hint="say which to edit with --model",
        )
    return next(iter(models.values()))
