"""The edit of a set: from the store, searched, or given by layer and step."""

from shlex import quote

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, load_edit
from slsgu_cli.checkpoints.layers import Layer, find_layers, layers_of
from slsgu_cli.clip.models import model_layer, resolve
from slsgu_cli.engine.directions import forget_direction
from slsgu_cli.engine.ranking import named_layers
from slsgu_cli.engine.step_edit import step_edit
from slsgu_cli.engine.stored_covariances import ensure_covariances
from slsgu_cli.errors import InputError, StaleError
from slsgu_cli.method.scores import norm
from slsgu_cli.records.directions import FALLBACK, DirectionSpec
from slsgu_cli.records.method import EditHeader, GradientHeader, GradientPointer, Qkv
from slsgu_cli.records.options import RankOptions, SearchOptions
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
        # An edit that exists needs no PyTorch.
        from slsgu_cli.engine.plots import rank_and_plot, search_and_plot
        from slsgu_cli.engine.search import require_forgotten

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
    kind, unmet = header.direction.kind, []
    if options.direction is not None and kind not in options.direction.each:
        unmet.append(f"--direction {options.direction}")
    if options.qkv and not Layer.parse(header.layer).is_of(options.qkv):
        unmet.append(f"--qkv {options.qkv}")
    if options.damping is not None and header.direction != DirectionSpec.of(
        kind, damping=options.damping
    ):
        unmet.append(f"--damping {options.damping:g}")
    if unmet:
        name = quote(header.name)
        raise StaleError(
            f"the edit {header.name} moves {header.layer} along {header.direction}, which does "
            f"not match {' '.join(unmet)}",
            hint=f"run `slsgu rank {name} {' '.join(unmet)}` and `slsgu search {name}`",
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
    if change := Artifact.EDIT.changed(edit.header, digests_of(None, pointer)):
        made_from = "retain rows" if change.field == "retain_data" else "gradients"
        raise StaleError(
            f"the edit {name} was made from other {made_from} than the set has now",
            hint=f"run `{Artifact.RANKING.command(name)}` and `{Artifact.EDIT.command(name)}`",
        )
    return edit


def rank_options(options: SearchOptions) -> RankOptions:
    """Return the options of the ranking that a search needs."""
    values = {name: getattr(options, name) for name in ("direction", "qkv", "damping", "device")}
    return RankOptions(**{name: value for name, value in values.items() if value is not None})


def direct_edit(
    store: Store, name: str, *, layer: str, step: float, options: RankOptions | None = None
) -> Edit:
    """Return the edit that moves `layer` by `step` along its direction, without a search.

    The direction is the last one of `options`. Raises UsageError if there is no such layer, and
    InputError if the direction needs inputs of the layer that cannot be captured.
    """
    manifest = read_manifest(store, name)
    options = (options or RankOptions()).of_set(manifest)
    pointer = read_pointer(store, manifest)
    layer = named_layer(store, pointer, layer).name
    direction = options.specs[-1]
    covariances = ensure_covariances(
        store, manifest, pointer, [layer], needs=direction.needs, device=options.device
    )
    if missing := [kind for kind in direction.needs if not covariances.has(layer, [kind])]:
        raise InputError(
            f"{layer} has no {direction.kind} direction: its {' and '.join(missing)} cannot be "
            "captured",
            hint=f"--direction {FALLBACK.kind}, or another layer",
        )
    statistics = covariances.statistics(layer, direction)
    along = forget_direction(store, pointer, layer, direction, statistics)
    before = model_layer(resolve(pointer.model), layer)
    return step_edit(
        manifest,
        pointer,
        layer,
        step=step,
        share=step * norm(along) / (norm(before) or 1.0),
        direction=direction,
        along=along,
        before=before,
    )


def named_layer(store: Store, pointer: GradientPointer, text: str) -> Layer:
    """Return the only layer that `text` matches. Raises UsageError."""
    header = store.read_header(Artifact.GRADIENT.path(pointer.forget), GradientHeader)
    whole, slices = (layers_of(header.weights, qkv) for qkv in (Qkv.FUSED, Qkv.SPLIT))
    names = whole if find_layers(text, whole) else slices
    hint = f"run `slsgu rank {quote(pointer.name)}` for their names"
    return Layer.parse(named_layers([text], names, among="layers", hint=hint)[0])


def is_edit_file(name: str) -> bool:
    """Return whether `name` is a path and not the name of a set."""
    return "/" in name or name.endswith(".safetensors")
