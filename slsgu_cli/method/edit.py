"""From a set's name to its edit, searched for or given by hand; `apply`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from shlex import quote

from slsgu_cli import progress
from slsgu_cli.checkpoints.apply import AppliedResult, apply_edits
from slsgu_cli.checkpoints.edits import (
    Edit,
    earlier_edits,
    load_edit,
    tell_of_joint_searches,
)
from slsgu_cli.checkpoints.layers import Layer, find_layers, layers_of
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.clip.models import model_layer, resolve
from slsgu_cli.errors import NotForgottenError, StaleError, UsageError
from slsgu_cli.method.directions import LayerStep, ensure_moments, forget_direction, unmeasured_edit
from slsgu_cli.method.ranking import rank
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
from slsgu_cli.records.options import ApplyRequest, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import (
    Artifact,
    digests_of,
    plot_path,
    read_manifest,
    read_pointer,
)
from slsgu_cli.store.files import require_regular
from slsgu_cli.store.store import Store


def ensure_edit(
    store: Store, name: str, *, options: SearchOptions, ranking: RankOptions | None = None
) -> Edit:
    """Return the edit in a file, or that of the set `name`.

    A set that has none is searched as `options` say, and ranked as `ranking` says where it has
    no ranking either; both are drawn. Raises NotForgottenError where no step forgets, and
    StaleError where an edit that is there was made from other gradients than the set has now,
    or otherwise than `options` say.
    """
    is_file = "/" in name or name.endswith(".safetensors")
    if is_file or not store.exists(Artifact.SET.path(name)):
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
    """Raise StaleError unless an edit is of the direction, kind of layer and ridge given."""
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
    if options.ridge not in (None, header.ridge):
        had = "no ridge" if header.ridge is None else f"ridge {header.ridge:g}"
        raise StaleError(
            f"the edit {name} was whitened with {had}, not {options.ridge:g}",
            hint=f"run {searches} --ridge {options.ridge:g}`",
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
    return chosen if options.ridge is None else replace(chosen, ridge=options.ridge)


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
    moments = None
    if whitened:
        moments = ensure_moments(store, manifest, pointer, [moved.name], device=options.device)
    along = forget_direction(store, pointer, moved.name, ridge=options.damping, moments=moments)
    before = model_layer(resolve(pointer.model), moved.name)
    layer_step = LayerStep(
        layer=moved.name,
        tower=moved.recorded_tower,
        step=step,
        share=step * norm(along) / (norm(before) or 1.0),
        ridge=options.damping if whitened else None,
        delta=step * along,
        before=before,
    )
    return unmeasured_edit(manifest, pointer, layer_step)


def named_layer(store: Store, pointer: GradientPointer, text: str) -> Layer:
    """Return the one layer of the gradients that `text` means. Raises UsageError."""
    header = store.read_header(Artifact.GRADIENT.path(pointer.forget), GradientHeader)
    whole, split = (find_layers(text, layers_of(header.weights, qkv)) for qkv in Qkv)
    fitting = whole or split
    if len(fitting) != 1:
        raise UsageError(
            f"--layer {text} fits {len(fitting)} layers: {', '.join(fitting[:5]) or 'none'}",
            hint=f"run `slsgu rank {quote(pointer.name)}` for their names",
        )
    return Layer.parse(fitting[0])


def rank_and_plot(store: Store, name: str, *, options: RankOptions) -> tuple[Ranking, list[str]]:
    """Rank the layers of a set and draw each tower's front; return where the plots are."""
    from slsgu_cli.figures.curves import pareto_plot

    ranking = rank(store, name, options=options)
    plots = []
    for direction, scores in ranking.by_direction().items():
        told = "" if len(ranking.direction.each) == 1 else f", {direction}"
        for tower in Tower:
            if any(score.tower is tower for score in scores):
                path = plot_path(name, f"front-{tower}" + told.replace(", ", "-"))
                title = f"{name}: {tower} layers{told}"
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
        lines.setdefault(trial.layer, set()).add(trial.ridge)
    for layer, ridges in sorted(lines.items()):
        for ridge in ridges:
            step = chosen.step if (layer, ridge) == (chosen.layer, chosen.ridge) else None
            along = "gradient" if ridge is None else f"{ridge:g}"
            path = plot_path(name, f"steps-{layer}" + (f"-{along}" if len(ridges) > 1 else ""))
            store.write_bytes(path, step_plot(trials, layer=layer, ridge=ridge, chosen=step))


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
        if edit.header.steer is not None and not edit.header.forgotten:
            progress.warn(
                f"the edit {edit.header.name} does not forget completely: its search failed"
            )
    earlier = [] if request.force else earlier_edits(store, edits)
    if not request.revert:
        tell_of_joint_searches([*edits, *earlier])
    if request.target is not None:
        target = read_target(request.target)
        return apply_edits(edits, target, request.out, options=request, earlier=earlier)
    model = resolve(_shared_model(edits, request.model))
    target = read_target(model.folder or model.weights)
    config = {"model_cfg": model.config, "preprocess_cfg": model.preprocess}
    return apply_edits(edits, target, request.out, options=request, config=config, earlier=earlier)


def _requested_edits(store: Store, request: ApplyRequest) -> list[Edit]:
    """Return the edits of a request: one given by layer and step, or those of the sets."""
    if request.step is not None and not math.isfinite(request.step):
        raise UsageError(f"--step {request.step} is no step size")
    search_options = SearchOptions(
        direction=request.direction,
        ridge=request.ridge,
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
            ensure_edit(store, name, options=search_options, ranking=ranking)
            for name in request.names
        ]
        return edits if request.step is None else [edit.restepped(request.step) for edit in edits]
    if request.step is None or len(request.names) != 1:
        raise UsageError("--layer goes with one NAME and --step", hint="--layer L --step S")
    (name,) = request.names
    return [direct_edit(store, name, layer=request.layer, step=request.step, options=ranking)]


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
