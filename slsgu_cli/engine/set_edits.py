"""The edit of a set: from the store, searched, or given by layer and step."""

from dataclasses import replace
from shlex import quote

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import (
    Edit,
    load_edit,
)
from slsgu_cli.checkpoints.layers import Layer, find_layers, layers_of
from slsgu_cli.clip.models import model_layer, resolve
from slsgu_cli.engine.directions import forget_direction
from slsgu_cli.engine.layer_steps import LayerStep, unmeasured_edit
from slsgu_cli.engine.plots import rank_and_plot, search_and_plot
from slsgu_cli.engine.ranking import named_layers
from slsgu_cli.engine.search import SearchResult
from slsgu_cli.engine.stored_covariances import ensure_covariances
from slsgu_cli.errors import NotForgottenError, StaleError
from slsgu_cli.method.scores import norm
from slsgu_cli.records.directions import DirectionSpec
from slsgu_cli.records.method import (
    EditHeader,
    GradientHeader,
    GradientPointer,
    Qkv,
)
from slsgu_cli.records.options import (
    RankOptions,
    SearchOptions,
)
from slsgu_cli.store.artifacts import Artifact, digests_of, read_manifest, read_pointer
from slsgu_cli.store.store import Store


def ensure_edit(
    store: Store, name: str, *, options: SearchOptions, ranking: RankOptions | None = None
) -> Edit:
    """Return the edit in the file `name`, or the edit of the set `name`.

    A set without an edit is searched with `options`, after a `ranking` if it has none; both are
    plotted. Raises NotForgottenError if no step forgets, and StaleError if an existing edit was
    made from other gradients than the set has now, or with other options.
    """
    if is_edit_file(name) or not store.exists(Artifact.SET.path(name)):
        return load_edit(store, name)
    if not store.exists(Artifact.EDIT.path(name)) and store.exists(Artifact.POINTER.path(name)):
        if not store.exists(Artifact.RANKING.path(name)):
            progress.note(f"{name} has no ranking yet: ranking its layers")
            rank_and_plot(store, name, options=ranking or rank_options(options))
        progress.note(f"{name} has no edit yet: searching for one")
        require_forgotten(search_and_plot(store, name, options=options))
    edit = current_edit(store, name)
    _require_options(edit.header, options)
    return edit


def _require_options(header: EditHeader, options: SearchOptions) -> None:
    """Raise StaleError unless an edit has the direction, kind of layer and damping of `options`."""
    name = header.name
    ranks, searches = f"`slsgu rank {quote(name)}", f"`slsgu search {quote(name)}"
    if options.direction is not None and header.direction.kind not in options.direction.each:
        raise StaleError(
            f"the edit {name} moves along the direction {header.direction.kind}, "
            f"not {options.direction}",
            hint=f"run {ranks} --direction {options.direction}` and {searches}`",
        )
    if options.qkv and not Layer.parse(header.layer).is_of(options.qkv):
        raise StaleError(
            f"the edit {name} changes {header.layer}, which is no layer where query, key "
            f"and value are {options.qkv}",
            hint=f"run {ranks} --qkv {options.qkv}` and {searches}`",
        )
    wanted = DirectionSpec.of(header.direction.kind, damping=options.damping)
    if options.damping is not None and header.direction != wanted:
        raise StaleError(
            f"the edit {name} moves along {header.direction}, not with damping {options.damping:g}",
            hint=f"run {searches} --damping {options.damping:g}`",
        )


def current_edit(store: Store, name: str) -> Edit:
    """Return the edit of the set `name`.

    Raises MissingError, and StaleError if it was made from other rows or gradients than the set
    has now.
    """
    edit = load_edit(store, name)
    if not store.exists(Artifact.POINTER.path(name)):
        return edit
    pointer = read_pointer(store, read_manifest(store, name))
    change = Artifact.EDIT.changed(edit.header, digests_of(None, pointer))
    if change:
        others = {
            "gradient": f"the edit {name} was made from other gradients than the set has now",
            "retain_data": f"the direction of the edit {name} was made with other retain rows "
            "than the set has now",
        }
        raise StaleError(
            others[change.field],
            hint=f"run `{Artifact.RANKING.command(name)}` and `{Artifact.EDIT.command(name)}`",
        )
    return edit


def rank_options(options: SearchOptions) -> RankOptions:
    """Return the options of the ranking that a search needs."""
    chosen = RankOptions(device=options.device)
    if options.direction is not None:
        chosen = replace(chosen, direction=options.direction)
    if options.qkv is not None:
        chosen = replace(chosen, qkv=options.qkv)
    return chosen if options.damping is None else replace(chosen, damping=options.damping)


def direct_edit(
    store: Store, name: str, *, layer: str, step: float, options: RankOptions | None = None
) -> Edit:
    """Return the edit that moves `layer` by `step` along its direction, without a search.

    The direction is the last one of `options`. Raises UsageError if there is no such layer.
    """
    options = options or RankOptions()
    manifest = read_manifest(store, name)
    pointer = read_pointer(store, manifest)
    moved = named_layer(store, pointer, layer)
    direction = options.specs[-1]
    covariances = None
    if direction.needs_inputs:
        covariances = ensure_covariances(
            store, manifest, pointer, [moved.name], device=options.device
        )
    along = forget_direction(
        store, pointer, moved.name, direction=direction, covariances=covariances
    )
    before = model_layer(resolve(pointer.model), moved.name)
    layer_step = LayerStep(
        layer=moved.name,
        tower=moved.recorded_tower,
        step=step,
        share=step * norm(along) / (norm(before) or 1.0),
        direction=direction,
        delta=step * along,
        before=before,
    )
    return unmeasured_edit(manifest, pointer, layer_step)


def named_layer(store: Store, pointer: GradientPointer, text: str) -> Layer:
    """Return the only layer that `text` matches. Raises UsageError."""
    header = store.read_header(Artifact.GRADIENT.path(pointer.forget), GradientHeader)
    whole, thirds = (layers_of(header.weights, qkv) for qkv in (Qkv.FUSED, Qkv.SPLIT))
    names = whole if find_layers(text, whole) else thirds
    hint = f"run `slsgu rank {quote(pointer.name)}` for their names"
    return Layer.parse(named_layers([text], names, among="layers", hint=hint)[0])


def require_forgotten(result: SearchResult) -> None:
    """Raise NotForgottenError unless the chosen step brings the accuracy of the criterion to 0."""
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


def is_edit_file(name: str) -> bool:
    """Return whether `name` is a path and not the name of a set."""
    return "/" in name or name.endswith(".safetensors")
