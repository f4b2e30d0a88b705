"""`rank`: the score of every candidate layer, from the stored gradients.

Each direction has its own fronts, by importance and alignment in its metric. Layers without the
inputs that a direction needs are ranked along their gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from shlex import quote

import numpy as np

import slsgu_cli
from slsgu_cli import processes
from slsgu_cli.checkpoints.layers import Layer, find_layers, layers_of, selected
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.checkpoints.target_layers import encoder_of_target
from slsgu_cli.checkpoints.targets import Encoder
from slsgu_cli.clip.models import ResolvedModel, model_layer
from slsgu_cli.engine.directions import as_tensor, implementation, layer_gradient
from slsgu_cli.engine.gradients import graded_model
from slsgu_cli.engine.stored_covariances import (
    Covariances,
    ensure_covariances,
    note_layers,
    warn_of_fallback,
)
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.method.directions import LayerStatistics
from slsgu_cli.method.fronts import pareto_front
from slsgu_cli.method.layers import is_candidate
from slsgu_cli.method.scores import Vector, alignment, importance, norm
from slsgu_cli.prefetch import prefetch
from slsgu_cli.records.directions import FALLBACK, DirectionSpec
from slsgu_cli.records.method import (
    Alignment,
    GradientHeader,
    GradientPointer,
    LayerScore,
    ParameterNorm,
    PromptReader,
    Ranking,
    Tower,
)
from slsgu_cli.records.options import RankOptions, SearchOptions
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer
from slsgu_cli.store.store import Store


def rank(store: Store, name: str, *, options: RankOptions = RankOptions()) -> Ranking:
    """Score the candidate layers of set `name`, mark the Pareto fronts, store the ranking.

    Raises MissingError, StaleError, and InputError if no layer remains to be ranked.
    """
    manifest = read_manifest(store, name)
    pointer = read_pointer(store, manifest)
    store.require_writable(Artifact.RANKING.path(name))
    header = store.read_header(Artifact.GRADIENT.path(pointer.forget), GradientHeader)
    encoder, readers = _encoder(header, options)
    layers, unreached = _to_rank(header, encoder, options)
    covariances = None
    if options.direction.needs_inputs and layers:
        covariances = ensure_covariances(store, manifest, pointer, layers, device=options.device)
        warn_of_fallback(covariances, layers, how="ranked", out="--exclude leaves them out")
    split = any(Layer.parse(layer).part is not None for layer in layers)
    weights = _Weights(header, graded_model(pointer) if split else None)
    scores = [
        score
        for direction, able in _by_direction(layers, options.specs, covariances).items()
        for score in _with_fronts(
            _scored(store, pointer, weights, able, direction, options, covariances)
        )
    ]
    if not scores:
        raise InputError(
            f"no layer of {name} is left to rank{_never_compete(header, options)}",
            hint="check --include, --exclude, --tower and --target; "
            "`slsgu rank NAME` alone ranks all layers",
        )
    _note_unscored(weights, sorted(set(layers) - {score.layer for score in scores}))
    ranking = Ranking(
        name=name,
        forget=pointer.forget,
        retain=pointer.retain,
        alignment=options.alignment,
        directions=options.specs,
        scores=tuple(scores),
        version=slsgu_cli.__version__,
        target=options.target,
        unreached=unreached,
        qkv=options.qkv,
        readers=readers,
    )
    store.write_record(Artifact.RANKING.path(name), ranking)
    return ranking


def _to_rank(
    header: GradientHeader, encoder: Encoder | None, options: RankOptions
) -> tuple[list[str], dict[str, str]]:
    """Return the layers to rank, and why the target does not read the other candidates."""
    candidates = [
        layer
        for layer in layers_of(header.weights, options.qkv)
        if options.tower in (None, Layer.parse(layer).tower)
        and selected(layer, include=options.include, exclude=options.exclude)
    ]
    unreached = {
        layer: reason
        for layer in candidates
        if encoder and (reason := encoder.why_not(layer)) is not None
    }
    return [layer for layer in candidates if layer not in unreached], unreached


def _scored(
    store: Store,
    pointer: GradientPointer,
    weights: "_Weights",
    layers: Sequence[str],
    direction: DirectionSpec,
    options: RankOptions,
    covariances: Covariances | None,
) -> list[LayerScore]:
    """Return the scores of layers in order, without layers that have none.

    Processes share the work.
    """
    # Read the next layer while scoring this one: reading computes digests.
    mine = processes.split(layers)
    read = prefetch(partial(_gradients, store, pointer), mine, ahead=1)
    score_of = {
        layer: _score(weights, layer, pair, direction, options, covariances)
        for layer, pair in zip(mine, read, strict=True)
    }
    for part in processes.gathered(score_of):
        score_of |= part
    scores = (score_of[layer] for layer in layers)
    return [score for score in scores if score is not None]


def _by_direction(
    layers: list[str], directions: Sequence[DirectionSpec], covariances: Covariances | None
) -> dict[DirectionSpec, list[str]]:
    """Return the layers to rank along each direction.

    Layers that no direction can use are ranked along the gradient.
    """
    unable = set(covariances.without(layers)) if covariances else set()
    able = {
        each: [layer for layer in layers if not (each.needs_inputs and layer in unable)]
        for each in directions
    }
    if unable and all(each.needs_inputs for each in directions):
        able[FALLBACK] = [layer for layer in layers if layer in unable]
    return able


def _never_compete(header: GradientHeader, options: RankOptions) -> str:
    """Return the non-candidates that `include` matches, as the end of a sentence."""
    names = [
        name
        for name in sorted(header.weights)
        if options.include
        and not is_candidate(name)
        and selected(name, include=options.include, exclude=options.exclude)
    ]
    return f": of {', '.join(names[:3])} none ever competes" if names else ""


def _note_unscored(weights: "_Weights", layers: Sequence[str]) -> None:
    """Report the layers without a score, and why they have none."""
    zeros = [layer for layer in layers if not weights.norm(layer).norm]
    unreached = [layer for layer in layers if layer not in zeros]
    if zeros:
        note_layers(f"{len(zeros)} layers contain only zeros and have no relative step", zeros)
    if unreached:
        text = f"{len(unreached)} layers are left out: the forget loss does not reach them"
        note_layers(text, unreached)


def _encoder(
    header: GradientHeader, options: RankOptions
) -> tuple[Encoder | None, tuple[PromptReader, ...]]:
    """Return the encoder of the target that is ranked, and the target's prompt readers, if any."""
    if options.target is None:
        return None, ()
    shapes = {name: weight.shape for name, weight in header.weights.items()}
    return encoder_of_target(options.target, shapes, encoder=options.encoder)


@dataclass(frozen=True, slots=True)
class _Weights:
    """The norms of a model's layers: recorded ones, and those of slices read from `model`."""

    header: GradientHeader
    model: ResolvedModel | None

    def norm(self, layer: str) -> ParameterNorm:
        """Return a layer's shape and norm."""
        values = self.slice(layer)
        if values is None:
            return self.header.weights[layer]
        return ParameterNorm(values.shape, norm(values))

    def slice(self, layer: str) -> Floats | None:
        """Return a query, key or value slice of a parameter; None for a whole one."""
        if self.model is None or Layer.parse(layer).part is None:
            return None
        return model_layer(self.model, layer).astype(np.float32, copy=False)


def _gradients(store: Store, pointer: GradientPointer, layer: str) -> tuple[Floats, Floats]:
    """Return the forget and the retain gradient of a layer."""
    forget = layer_gradient(store, pointer.forget, layer)
    return forget, layer_gradient(store, pointer.retain, layer)


def _score(
    weights: _Weights,
    layer: str,
    gradients: tuple[Floats, Floats],
    direction: DirectionSpec,
    options: RankOptions,
    covariances: Covariances | None,
) -> LayerScore | None:
    """Return the score of one layer; None if it has no forget gradient or contains only zeros.

    A step is relative to the norm of the layer, so a layer of zeros has no score.
    """
    forget, retain = gradients
    forget_norm, retain_norm = norm(forget), norm(retain)
    weight = weights.norm(layer)
    tower = Layer.parse(layer).tower
    if not forget_norm or not weight.norm or tower is None:
        return None
    inputs = None
    if covariances is not None and direction.needs_inputs:
        inputs = covariances.inputs(layer, weights.slice(layer))
    chosen, statistics = implementation(direction), LayerStatistics(weight.norm, inputs)
    metric = chosen.metric(statistics)

    def scaled(gradient: Floats) -> Vector:
        values = metric.scaled(as_tensor(gradient, statistics)).cpu().numpy()
        return values.ravel(order="K")

    forget, retain = scaled(forget), scaled(retain)
    return LayerScore(
        layer=layer,
        tower=tower,
        shape=weight.shape,
        importance=importance(norm(forget), metric.weight_norm()),
        alignment=alignment(forget, retain, signed=options.alignment is Alignment.SIGNED),
        forget_norm=forget_norm,
        retain_norm=retain_norm,
        weight_norm=weight.norm,
        front=False,
        direction=direction,
    )


def _with_fronts(scores: Sequence[LayerScore]) -> list[LayerScore]:
    """Mark each tower's Pareto front; sort by tower, then front first, then falling importance."""
    marked: list[LayerScore] = []
    for tower in Tower:
        in_tower = [score for score in scores if score.tower is tower]
        front = pareto_front([(score.importance, score.alignment) for score in in_tower])
        rows = [replace(score, front=on) for score, on in zip(in_tower, front, strict=True)]
        marked += sorted(rows, key=lambda row: (not row.front, -row.importance, row.layer))
    return marked


def ranked_layers(store: Store, ranking: Ranking, options: SearchOptions) -> list[LayerScore]:
    """Return the front layers to search, or those that `options` name.

    The fronts of all searched directions are joined. Layers that these directions cannot use
    are included along their gradient. Raises UsageError.
    """
    ranked_along = ranking.by_direction()
    kinds = {each.kind for each in search_directions(options, ranking)}
    scores = [
        score for along in ranked_along if along.kind in kinds for score in ranked_along[along]
    ]
    able = {score.layer for score in scores}
    scores += [score for score in ranked_along.get(FALLBACK, []) if score.layer not in able]
    ranked = {score.layer: score for score in reversed(scores)}
    names = list(ranked)[::-1]
    if not options.layers:
        fronts = {score.layer for score in scores if score.front}
        return [ranked[name] for name in names if name in fronts]
    chosen = named_layers(
        options.layers,
        names,
        among="ranked layers",
        none=lambda text: _unranked(store, ranking, text),
        hint=f"run `slsgu rank {quote(ranking.name)}` for their names",
    )
    return [ranked[name] for name in chosen]


def search_directions(options: SearchOptions, ranking: Ranking) -> tuple[DirectionSpec, ...]:
    """Return the directions that `options` name, or else those of the ranking."""
    kinds = [each.kind for each in ranking.directions]
    if options.direction is not None:
        kinds = list(options.direction.each)
    ranked = {each.kind: each for each in ranking.directions}
    if options.damping is None:
        return tuple(ranked[kind] for kind in kinds if kind in ranked)
    return tuple(DirectionSpec.of(kind, damping=options.damping) for kind in kinds)


def named_layers(
    wanted: Sequence[str],
    names: Sequence[str],
    *,
    among: str,
    none: Callable[[str], str] = lambda text: "none",
    hint: str | None = None,
) -> list[str]:
    """Return the layers that `wanted` names, each by a part that matches exactly one of `names`.

    Errors call these names `among`, and describe a text without a match by `none`. Raises
    UsageError.
    """
    chosen = []
    for text in wanted:
        fitting = find_layers(text, names)
        if len(fitting) != 1:
            near = ", ".join(fitting[:5]) or none(text)
            raise UsageError(f"--layer {text} fits {len(fitting)} {among}: {near}", hint=hint)
        chosen += fitting
    return chosen


def _unranked(store: Store, ranking: Ranking, text: str) -> str:
    """Return why the parameter that `text` names is not ranked, or "none"."""
    header = store.read_header(Artifact.GRADIENT.path(ranking.forget), GradientHeader)
    names = find_layers(text, [*layers_of(header.weights, ranking.qkv), *sorted(header.weights)])
    if not names:
        return "none"
    name = names[0]
    if not is_candidate(name):
        return f"none, {name} never competes"
    if name in ranking.unreached:
        return f"none, {name} cannot influence {ranking.target}: {ranking.unreached[name]}"
    return f"none, {name} was left out when layers were ranked"
