"""`rank`: the score of every candidate layer, from the stored gradients.

Each direction has its own fronts, by importance and alignment in its metric. Layers without the
inputs that a direction needs are ranked along their gradient.
"""

from collections.abc import Sequence
from dataclasses import replace
from shlex import quote

import numpy as np

import slsgu_cli
from slsgu_cli import processes
from slsgu_cli.checkpoints.layers import Layer, find_layers, layers_of, selected
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.checkpoints.target_layers import encoder_of_target
from slsgu_cli.clip.models import ResolvedModel, model_layer
from slsgu_cli.engine.directions import as_array, implementation, layer_gradient, operand
from slsgu_cli.engine.gradients import graded_model
from slsgu_cli.engine.stored_covariances import (
    Covariances,
    ensure_covariances,
    note_layers,
    warn_of_fallback,
)
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.method.fronts import layers_to_try
from slsgu_cli.method.scores import alignment, importance, norm
from slsgu_cli.prefetch import prefetch
from slsgu_cli.records.directions import FALLBACK, Direction, DirectionSpec, needed
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
    options = options.of_set(manifest)
    pointer = read_pointer(store, manifest)
    store.require_writable(Artifact.RANKING.path(name))
    weights = store.read_header(Artifact.GRADIENT.path(pointer.forget), GradientHeader).weights
    encoder = None
    readers: tuple[PromptReader, ...] = ()
    if options.target is not None:
        shapes = {layer: weight.shape for layer, weight in weights.items()}
        encoder, readers = encoder_of_target(options.target, shapes, encoder=options.encoder)
    candidates = [
        layer
        for layer in layers_of(weights, options.qkv)
        if options.tower in (None, Layer.parse(layer).tower)
        and selected(layer, include=options.include, exclude=options.exclude)
    ]
    unreached = {
        layer: reason
        for layer in candidates
        if encoder and (reason := encoder.why_not(layer)) is not None
    }
    layers = [layer for layer in candidates if layer not in unreached]
    kinds = [each.kind for each in options.specs]
    covariances = ensure_covariances(
        store, manifest, pointer, layers, needs=needed(kinds), device=options.device
    )
    warn_of_fallback(
        covariances, layers, options.specs, how="ranked", out="--exclude leaves them out"
    )
    if unable := [layer for layer in layers if not covariances.able(layer, options.specs)]:
        note_layers(f"{len(unable)} layers have no {Direction.of(kinds)} direction", unable)
    layers = [layer for layer in layers if layer not in unable]
    by_layer = _scores(store, pointer, layers, weights, options, covariances)
    scores = [score for layer in layers for score in by_layer[layer]]
    if not scores:
        raise InputError(
            f"no layer of {name} is left to rank",
            hint="check --include, --exclude, --tower and --target; "
            "`slsgu rank NAME` alone ranks all layers",
        )
    if unscored := [layer for layer in layers if not by_layer[layer]]:
        note_layers(
            f"{len(unscored)} layers are left out, because they contain only zeros or the forget "
            "loss does not reach them",
            unscored,
        )
    ranking = Ranking(
        name=name,
        forget=pointer.forget,
        retain=pointer.retain,
        alignment=options.alignment,
        directions=options.specs,
        scores=tuple(
            score
            for direction in dict.fromkeys((*options.specs, FALLBACK))
            for score in _marked(
                [each for each in scores if each.direction == direction],
                implementation(direction).first,
            )
        ),
        version=slsgu_cli.__version__,
        target=options.target,
        unreached=unreached,
        qkv=options.qkv,
        readers=readers,
    )
    store.write_record(Artifact.RANKING.path(name), ranking)
    return ranking


def _scores(
    store: Store,
    pointer: GradientPointer,
    layers: Sequence[str],
    weights: dict[str, ParameterNorm],
    options: RankOptions,
    covariances: Covariances,
) -> dict[str, list[LayerScore]]:
    """Return the scores of each layer along the directions that it has. Ranks share the work.

    A layer without a forget gradient has no score, nor has one of zeros: a step is relative to
    the norm of the layer.
    """
    is_split = any(Layer.parse(layer).part is not None for layer in layers)
    model = graded_model(pointer) if is_split else None

    def read(layer: str) -> tuple[Floats, Floats]:
        forget = layer_gradient(store, pointer.forget, layer)
        return forget, layer_gradient(store, pointer.retain, layer)

    scores: dict[str, list[LayerScore]] = {}
    mine = processes.split(layers)
    # Read the next layer while scoring this one: reading computes digests.
    for layer, gradients in zip(mine, prefetch(read, mine, ahead=1), strict=True):
        scores[layer] = []
        values = _slice(model, layer)
        weight = weights[layer] if values is None else ParameterNorm(values.shape, norm(values))
        forget_norm, retain_norm = map(norm, gradients)
        if not weight.norm or not forget_norm:
            continue
        for direction in covariances.able(layer, options.specs):
            statistics = covariances.statistics(
                layer, direction, weight_norm=weight.norm, weight=values
            )
            chosen = implementation(direction)
            metric = chosen.metric(statistics)
            forget, retain = (
                as_array(metric.scaled(operand(each, chosen, statistics))).ravel(order="K")
                for each in gradients
            )
            score = LayerScore(
                layer=layer,
                tower=Layer.parse(layer).recorded_tower,
                shape=weight.shape,
                importance=importance(norm(forget), metric.weight_norm()),
                alignment=alignment(forget, retain, signed=options.alignment is Alignment.SIGNED),
                forget_norm=forget_norm,
                retain_norm=retain_norm,
                weight_norm=weight.norm,
                front=False,
                direction=direction,
            )
            scores[layer].append(score)
    for part in processes.gathered(scores):
        scores |= part
    return scores


def _slice(model: ResolvedModel | None, layer: str) -> Floats | None:
    """Return a query, key or value slice of a parameter; None for a whole one."""
    if model is None or Layer.parse(layer).part is None:
        return None
    return model_layer(model, layer).astype(np.float32, copy=False)


def _marked(scores: Sequence[LayerScore], first: int | None) -> list[LayerScore]:
    """Mark the layers of each tower to try along one direction, as `layers_to_try`.

    Sorted by tower, then marked layers first, then falling importance.
    """
    marked: list[LayerScore] = []
    for tower in Tower:
        in_tower = [score for score in scores if score.tower is tower]
        front = layers_to_try([(score.importance, score.alignment) for score in in_tower], first)
        rows = [replace(score, front=on) for score, on in zip(in_tower, front, strict=True)]
        marked += sorted(rows, key=lambda row: (not row.front, -row.importance, row.layer))
    return marked


def ranked_layers(ranking: Ranking, options: SearchOptions) -> list[LayerScore]:
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
    hint = f"run `slsgu rank {quote(ranking.name)}` for their names"
    chosen = named_layers(options.layers, names, among="ranked layers", hint=hint)
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
    wanted: Sequence[str], names: Sequence[str], *, among: str, hint: str | None = None
) -> list[str]:
    """Return the layers that `wanted` names, each by a part that matches exactly one of `names`.

    Errors call these names `among`. Raises UsageError.
    """
    chosen = []
    for text in wanted:
        fitting = find_layers(text, names)
        if len(fitting) != 1:
            near = ", ".join(fitting[:5]) or "none"
            raise UsageError(f"--layer {text} fits {len(fitting)} {among}: {near}", hint=hint)
        chosen += fitting
    return chosen
