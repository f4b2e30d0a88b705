"""The whole method on a model and two iterables of (images, texts): `unlearn`.

1. One pass takes the gradients of the forget loss (Eq. 5) and the retain loss (Eq. 4).
2. Importance and alignment (Eq. 7 and 8) score each layer, and the Pareto front of each tower
   names the layers to try (Alg. 2).
3. Doubling and bisection find a step for each of these layers (Alg. 3).
4. The step that forgets most wins, ties by utility (Alg. 1).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor

from slsgu_cli.errors import InputError
from slsgu_cli.method.directions import Direction, LayerStatistics
from slsgu_cli.method.directions.gradient import Gradient
from slsgu_cli.method.edits import LayerEdit
from slsgu_cli.method.fronts import layers_to_try
from slsgu_cli.method.gradient import Pairs, mean_gradient
from slsgu_cli.method.layer_statistics import layer_statistics
from slsgu_cli.method.layers import TEXT, VISION, candidates, tower_of
from slsgu_cli.method.losses import Loss, contrastive, cosine_forget, sigmoid
from slsgu_cli.method.scores import Vector, alignment, importance, norm
from slsgu_cli.method.step_search import best, bisection, first_step

# Returns forget accuracy and utility of a model, in percent: low and high is good.
Evaluate = Callable[[Any], tuple[float, float]]


def unlearn(
    model: Any,
    forget: Pairs,
    retain: Pairs,
    evaluate: Evaluate,
    *,
    directions: Sequence[Direction] = (Gradient(),),
    layers: Iterable[str] | None = None,
    steps: int = 10,
    signed: bool = False,
) -> LayerEdit:
    """Return the edit of one layer that makes a CLIP forget; the model stays as it is.

    `forget` and `retain` yield mini-batches of (images, texts), as often as they are iterated.
    `layers` limits the candidates, `steps` is the number of trials for each layer and direction
    (K in the paper), and `signed` ranks by the cosine itself instead of its magnitude. Raises
    InputError if no layer remains, and NotFiniteError.

    >>> edit = unlearn(model, forget, retain, evaluate)
    >>> edit.apply(model)
    """
    names = candidates(n for n, p in model.named_parameters() if p.requires_grad)
    if layers is not None:
        names = [name for name in names if name in set(layers)]
    forget_gradient = mean_gradient(model, cosine_forget, forget)
    retain_gradient = mean_gradient(model, retain_loss(model), retain)
    known: dict[str, LayerStatistics] = {}
    if any(direction.needs for direction in directions):
        known = layer_statistics(model, names, retain)
    original = evaluate(model)

    trials: list[LayerEdit] = []
    for direction in directions:
        able = [name for name in names if has_all(known.get(name), direction.needs)]
        for name in front_layers(
            model, direction, able, known, forget_gradient, retain_gradient, signed=signed
        ):
            weight = model.get_parameter(name).detach().clone()
            metric = direction.metric(known.get(name) or plain_statistics(weight))
            along = direction.along(forget_gradient[name], metric).to(weight)

            unmeasured = LayerEdit(name, 0.0, along, weight)
            measure = partial(measured, model, evaluate, unmeasured)
            first = first_step(norm(array(weight)), norm(array(along)))
            trials += islice(bisection(measure, lambda edit: edit.forget, first), steps)
    if not trials:
        raise InputError(
            "there is no layer to edit: the forget loss reaches none of the candidates"
        )
    chosen = trials[best([(edit.forget, edit.utility) for edit in trials])]
    return replace(chosen, original_forget=original[0], original_utility=original[1])


def measured(model: Any, evaluate: Evaluate, edit: LayerEdit, step: float) -> LayerEdit:
    """Return an edit with another step, and the figures of the model with it."""
    edit = replace(edit, step=step)
    with edit.in_place(model):
        forget, utility = evaluate(model)
    return replace(edit, forget=forget, utility=utility)


def front_layers(
    model: Any,
    direction: Direction,
    names: Sequence[str],
    known: dict[str, LayerStatistics],
    forget: dict[str, Tensor],
    retain: dict[str, Tensor],
    *,
    signed: bool = False,
) -> list[str]:
    """Return the layers of each tower to try, the most important first (Alg. 2)."""
    fronts: list[str] = []
    for tower in (VISION, TEXT):
        scores: dict[str, tuple[float, float]] = {}
        for name in names:
            layer = known.get(name) or plain_statistics(model.get_parameter(name).detach())
            if tower_of(name) != tower or not layer.weight_norm or not forget[name].any():
                continue
            metric = direction.metric(layer)
            f, r = (array(metric.scaled(gradient[name])) for gradient in (forget, retain))
            scores[name] = importance(norm(f), metric.weight_norm()), alignment(f, r, signed=signed)
        marks = layers_to_try(list(scores.values()), direction.first)
        front = [name for name, on in zip(scores, marks, strict=True) if on]
        fronts += sorted(front, key=lambda name: (-scores[name][0], name))
    return fronts


def retain_loss(model: Any) -> Loss:
    """Return the contrastive loss, or the sigmoid loss of a model with a logit bias."""

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        scale, bias = model.logit_scale.exp(), getattr(model, "logit_bias", None)
        chosen = contrastive(scale) if bias is None else sigmoid(scale, bias)
        return chosen(images, texts)

    return loss


def has_all(layer: LayerStatistics | None, needs: Iterable[str]) -> bool:
    """Return whether all statistics of a layer that a direction needs are known."""
    return all(getattr(layer, name, None) is not None for name in needs)


def plain_statistics(weight: Tensor) -> LayerStatistics:
    """Return what directions know of a layer without the retain set."""
    return LayerStatistics(norm(array(weight)))


def array(values: Tensor) -> Vector:
    """Return a tensor's values on the host."""
    host: Vector = values.cpu().numpy()
    return host
