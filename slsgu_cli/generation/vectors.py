"""The directions that layers of a loaded target can move in, and what they promise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slsgu_cli.generation.subjects import Subject
from slsgu_cli.moments import InputMoments
from slsgu_cli.naming import is_candidate, tower_of
from slsgu_cli.records import Direction
from slsgu_cli.targets.mapping import Slot
from slsgu_cli.whitening import RetainMetric, mean_square_output, whitened_importance


@dataclass(frozen=True, slots=True)
class Ray:
    """A layer's original values, the direction it moves in, and how much that promises."""

    layer: str
    weight: Tensor
    direction: Tensor
    importance: float

    def at(self, step: float) -> Tensor:
        """Return the layer after a step."""
        return torch.add(self.weight, self.direction, alpha=step)

    def share(self, step: float) -> float:
        """Return the step's length over the layer's norm."""
        return step * float(self.direction.norm() / self.weight.norm())


def rays(
    subject: Subject,
    gradients: Mapping[str, Tensor],
    *,
    direction: Direction,
    ridge: float,
) -> list[Ray]:
    """Return a ray for each layer that has a gradient and reaches the target, best first.

    The whitened direction is that of the target's own retained inputs: what its CLIP is
    applied to when the target runs it, all positions included.
    """
    live = subject.encoder
    reached = [
        layer
        for layer, gradient in gradients.items()
        if is_candidate(layer)
        and tower_of(layer) is live.home.tower
        and live.encoder.why_not(layer) is None
        and gradient.count_nonzero()
    ]
    keys = sorted({slot.key for layer in reached for slot in live.slots(layer)})
    inputs = InputMoments(live.module, keys)
    if direction is Direction.WHITENED:
        with torch.no_grad(), inputs:
            subject.run_retained()
    found = []
    for layer in reached:
        weight, gradient = live.value(layer).float(), gradients[layer].to(live.value(layer).device)
        if direction is Direction.GRADIENT:
            importance = float(gradient.norm() / weight.norm())
            found.append(Ray(layer, weight, gradient, importance))
            continue
        # Query, key and value are applied to the same inputs: the moment of one is all's.
        moment = inputs.found.get(live.slots(layer)[0].key)
        if moment is not None:
            own = RetainMetric(moment.mean(), _axis(moment.axis, live.slots(layer)), ridge)
            moved = own.whiten(gradient)
            output = mean_square_output(weight, moment.mean(), own.axis)
            size = own.weight_norm(float(weight.norm()), output)
            importance = whitened_importance(gradient, moved, size)
            found.append(Ray(layer, weight, moved.float(), importance))
    return sorted(found, key=lambda ray: (-ray.importance, ray.layer))


def _axis(axis: int, places: Sequence[Slot]) -> int:
    """Return the axis of inputs of a layer in open_clip's shape."""
    return 1 - axis if places[0].transposed else axis
