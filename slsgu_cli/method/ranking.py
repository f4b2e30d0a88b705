"""What `slsgu rank` does: score every candidate layer from the stored gradients.

Each direction has fronts of its own. For the whitened direction, importance and alignment
are those of the step that will be taken: the same formulas,
in the inner product that the retained inputs make of changes. Layers that cannot be whitened
are ranked along their gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING

import numpy as np

import slsgu_cli
from slsgu_cli.checkpoints.layers import Layer, find_layers, is_candidate, layers_of, selected
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.checkpoints.target_layers import TargetLayers, layers_read_by
from slsgu_cli.clip import processes
from slsgu_cli.clip.models import ResolvedModel, model_layer
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.method.directions import (
    Covariances,
    ensure_covariances,
    layer_gradient,
    tell_of_layers,
    tell_of_unwhitened,
)
from slsgu_cli.method.gradients import graded_model
from slsgu_cli.method.scoring import Vector, alignment, importance, norm, pareto_front
from slsgu_cli.prefetch import prefetch
from slsgu_cli.records.method import (
    Direction,
    GradientHeader,
    GradientPointer,
    LayerScore,
    ParameterNorm,
    Ranking,
    Tower,
)
from slsgu_cli.records.options import RankOptions, SearchOptions
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from slsgu_cli.method.covariance import RetainMetric


def rank(store: Store, name: str, *, options: RankOptions = RankOptions()) -> Ranking:
    """Score the candidate layers of set `name`, mark the Pareto fronts, store the ranking.

    Raises MissingError, StaleError, and InputError where no layer is left to rank.
    """
    if options.shard:
        processes.require_several("rank")
    manifest = read_manifest(store, name)
    pointer = read_pointer(store, manifest)
    store.require_writable(Artifact.RANKING.path(name))
    header = store.read_header(Artifact.GRADIENT.path(pointer.forget), GradientHeader)
    aim = _aim(header, options)
    layers, unreached = _to_rank(header, aim, options)
    covariances = None
    if options.direction.whitens and layers:
        covariances = ensure_covariances(
            store, manifest, pointer, layers, device=options.device, shard=options.shard
        )
        tell_of_unwhitened(covariances, layers, how="ranked", out="--exclude leaves them out")
    split = any(Layer.parse(layer).part is not None for layer in layers)
    weights = _Weights(header, graded_model(pointer) if split else None)
    scores = [
        replace(score, direction=line.mark)
        for line in _lines(layers, options.direction, covariances)
        for score in _with_fronts(_scored(store, pointer, weights, line, options))
    ]
    if not scores:
        raise InputError(
            f"no layer of {name} is left to rank{_never_compete(header, options)}",
            hint="check --include, --exclude, --tower and --target; "
            "`slsgu rank NAME` alone ranks all layers",
        )
    _tell_of_unscored(weights, sorted(set(layers) - {score.layer for score in scores}))
    ranking = Ranking(
        name=name,
        forget=pointer.forget,
        retain=pointer.retain,
        alignment=options.alignment,
        direction=options.direction,
        damping=options.whitening_damping if options.direction.whitens else None,
        scores=tuple(scores),
        version=slsgu_cli.__version__,
        target=options.target,
        unreached=unreached,
        qkv=options.qkv,
        readers=aim.readers if aim else (),
    )
    store.write_record(Artifact.RANKING.path(name), ranking)
    return ranking


@dataclass(frozen=True, slots=True)
class _Line:
    """Layers that are ranked together, along their gradient where there are no `covariances`.

    `mark` is the direction that their scores name, None where it is the ranking's.
    """

    layers: Sequence[str]
    covariances: Covariances | None
    mark: Direction | None


def _to_rank(
    header: GradientHeader, aim: TargetLayers | None, options: RankOptions
) -> tuple[list[str], dict[str, str]]:
    """Return the layers to rank, and why a target is not reached by others that were asked for."""
    candidates = [
        layer
        for layer in layers_of(header.weights, options.qkv)
        if options.tower in (None, Layer.parse(layer).tower)
        and selected(layer, include=options.include, exclude=options.exclude)
    ]
    unreached = {
        layer: reason for layer in candidates if aim and (reason := aim.why_not(layer)) is not None
    }
    return [layer for layer in candidates if layer not in unreached], unreached


def _scored(
    store: Store,
    pointer: GradientPointer,
    weights: "_Weights",
    line: _Line,
    options: RankOptions,
) -> list[LayerScore]:
    """Return the scores of layers in their order; of those that have none nothing.

    Processes score a share each.
    """
    # Reading compares digests: the next layer is read while one is scored.
    mine = processes.dealt(line.layers)
    read = prefetch(partial(_gradients, store, pointer), mine, ahead=1)
    score_of = {
        layer: _score(weights, layer, pair, options, line.covariances)
        for layer, pair in zip(mine, read, strict=True)
    }
    for part in processes.gathered(score_of):
        score_of |= part
    scores = (score_of[layer] for layer in line.layers)
    return [score for score in scores if score is not None]


def _lines(layers: list[str], direction: Direction, covariances: Covariances | None) -> list[_Line]:
    """Return what is ranked together: the layers along each direction.

    Beside those that are whitened, the others along their gradient.
    """
    if covariances is None:
        return [_Line(layers, None, None)]
    unwhitened = covariances.without(layers)
    whitened = [layer for layer in layers if layer not in unwhitened]
    if direction is Direction.BOTH:
        return [
            _Line(layers, None, Direction.GRADIENT),
            _Line(whitened, covariances, Direction.WHITENED),
        ]
    return [_Line(whitened, covariances, None), _Line(unwhitened, None, Direction.GRADIENT)]


def _never_compete(header: GradientHeader, options: RankOptions) -> str:
    """Return what `include` fits that never competes, as the end of a sentence."""
    names = [
        name
        for name in sorted(header.weights)
        if options.include
        and not is_candidate(name)
        and selected(name, include=options.include, exclude=options.exclude)
    ]
    return f": of {', '.join(names[:3])} none ever competes" if names else ""


def _tell_of_unscored(weights: "_Weights", layers: Sequence[str]) -> None:
    """Tell which layers have no score, and why."""
    zeros = [layer for layer in layers if not weights.norm(layer).norm]
    unreached = [layer for layer in layers if layer not in zeros]
    if zeros:
        tell_of_layers(f"{len(zeros)} layers are zeros and cannot be moved by a share", zeros)
    if unreached:
        text = f"{len(unreached)} layers are left out: the forget loss does not reach them"
        tell_of_layers(text, unreached)


def _aim(header: GradientHeader, options: RankOptions) -> TargetLayers | None:
    """Return what the target reads of the model; None where the ranking is for the model."""
    if options.target is None:
        return None
    shapes = {name: weight.shape for name, weight in header.weights.items()}
    return layers_read_by(options.target, shapes, encoder=options.encoder)


@dataclass(frozen=True, slots=True)
class _Weights:
    """A model's layers as they are: whole ones as recorded, thirds as `model` has them."""

    header: GradientHeader
    model: ResolvedModel | None

    def norm(self, layer: str) -> ParameterNorm:
        """Return a layer's shape and norm."""
        values = self._third(layer)
        if values is None:
            return self.header.weights[layer]
        return ParameterNorm(values.shape, norm(values))

    def output(self, layer: str, covariances: Covariances, metric: "RetainMetric") -> float:
        """Return a layer's mean squared output over the retain set."""
        import torch

        from slsgu_cli.method.covariance import mean_square_output

        values = self._third(layer)
        if values is None:
            return covariances.output(layer)
        weight = torch.tensor(values, device=metric.covariance.device)
        return mean_square_output(weight, metric.covariance, metric.axis)

    def _third(self, layer: str) -> Floats | None:
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
    options: RankOptions,
    covariances: Covariances | None,
) -> LayerScore | None:
    """Return the score of one layer; None where the loss does not reach it, or it is zeros.

    A step is a share of the layer's own norm, so a layer of zeros has none.
    """
    forget, retain = gradients
    forget_norm = norm(forget)
    weight = weights.norm(layer)
    tower = Layer.parse(layer).tower
    if not forget_norm or not weight.norm or tower is None:
        return None
    retain_norm = norm(retain)
    size = weight.norm
    if covariances is not None:
        metric = covariances.metric(layer, options.whitening_damping)
        size = metric.weight_norm(weight.norm, weights.output(layer, covariances, metric))
        forget, retain = _half_whitened(metric, forget), _half_whitened(metric, retain)
    return LayerScore(
        layer=layer,
        tower=tower,
        shape=weight.shape,
        importance=importance(norm(forget), size),
        alignment=alignment(forget, retain, options.alignment),
        forget_norm=forget_norm,
        retain_norm=retain_norm,
        weight_norm=weight.norm,
        front=False,
    )


def _half_whitened(metric: "RetainMetric", gradient: Vector) -> Vector:
    """Return what stands for a gradient in Eq. 7 and 8 along the whitened direction.

    Its entries are in the order in which they lie in memory.
    """
    import torch

    on_device = torch.tensor(gradient, device=metric.covariance.device)
    half: Vector = metric.half_whiten(on_device).cpu().numpy()
    return half.ravel(order="K")


def _with_fronts(scores: Sequence[LayerScore]) -> list[LayerScore]:
    """Mark each tower's Pareto front; order by tower, front first, falling importance."""
    marked: list[LayerScore] = []
    for tower in Tower:
        in_tower = [score for score in scores if score.tower is tower]
        front = pareto_front([(score.importance, score.alignment) for score in in_tower])
        rows = [replace(score, front=on) for score, on in zip(in_tower, front, strict=True)]
        marked += sorted(rows, key=lambda row: (not row.front, -row.importance, row.layer))
    return marked


def ranked_layers(store: Store, ranking: Ranking, options: SearchOptions) -> list[LayerScore]:
    """Return the front layers to search, or those asked for by a part of a name that fits one only.

    The fronts of both directions are joined where both are searched. Beside layers that are
    whitened stand those that cannot be, as they were ranked along their gradient. Raises
    UsageError.
    """
    ranked_along = ranking.by_direction()
    scores = [score for along in options.moves.each for score in ranked_along[along]]
    if options.moves is Direction.WHITENED:
        whitened = {score.layer for score in scores}
        along_gradient = ranked_along.get(Direction.GRADIENT, [])
        scores += [score for score in along_gradient if score.layer not in whitened]
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


def named_layers(
    wanted: Sequence[str],
    names: Sequence[str],
    *,
    among: str,
    none: Callable[[str], str] = lambda text: "none",
    hint: str | None = None,
) -> list[str]:
    """Return the layers asked for by a part of a name that fits one of `names` only.

    `among` says what these are, and `none` what there is in place of any that fits. Raises
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
    """Return which parameter that is not ranked `text` means, and why it is not; or none."""
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
