"""Where a target's layers can move, what a step of each leaves, and which promise most."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slsgu_cli.checkpoints.layers import Layer, is_candidate
from slsgu_cli.checkpoints.layouts import TensorPlace
from slsgu_cli.downstream.subjects import Subject
from slsgu_cli.method.moments import (
    InputMoments,
    RetainMetric,
    mean_square_output,
    whitened_importance,
)
from slsgu_cli.records.figures import Effect, Share
from slsgu_cli.records.method import Direction
from slsgu_cli.records.targets import TargetTrial


@dataclass(frozen=True, slots=True)
class TargetMove:
    """A layer of a target, its original values, the direction it moves in, and the promise of it.

    `ridge` is what whitened the direction, None for the gradient itself. With a `goal`, a
    trial that misses it shows no more of the concept than that takes.
    """

    subject: Subject
    layer: str
    weight: Tensor
    direction: Tensor
    importance: float
    ridge: float | None = None
    goal: float | None = None

    @property
    def line(self) -> tuple[str, float | None]:
        """The layer and the ridge, which tell its trials from those of other moves."""
        return self.layer, self.ridge

    @property
    def first(self) -> float:
        """The step that moves the layer by 10% of its norm."""
        return 0.1 / self.share(1.0)

    def share(self, step: float) -> float:
        """Return the step's length over the layer's norm."""
        return step * float(self.direction.norm() / self.weight.norm())

    def in_place(self, step: float) -> AbstractContextManager[None]:
        """Put a step into the target for the length of a block."""
        values = torch.add(self.weight, self.direction, alpha=step)
        return self.subject.encoder.edited({self.layer: values})

    def measure(self, step: float) -> TargetTrial:
        """Return what the target still shows of the concept after a step."""
        with self.in_place(step):
            concept = self.subject.concept(self.goal)
        tower = self.subject.encoder.tower_place.tower
        return TargetTrial(self.layer, tower, step, self.share(step), concept, None)

    def others(self, step: float) -> Share:
        """Return what the target still shows of other classes after a step."""
        with self.in_place(step):
            return self.subject.others()

    def report(self, step: float) -> dict[str, Effect]:
        """Return what each judge makes of what nothing was chosen by, after a step."""
        with self.in_place(step):
            return self.subject.report()


def moves_of(
    subject: Subject,
    gradients: Mapping[str, Tensor],
    *,
    direction: Direction,
    ridge: float,
) -> list[TargetMove]:
    """Return a move for each layer that has a gradient and reaches the target, best first.

    The whitened direction is that of the target's own retained inputs: what its CLIP is
    applied to when the target runs it, all positions included.
    """
    live = subject.encoder
    reached = [
        layer
        for layer, gradient in gradients.items()
        if is_candidate(layer)
        and Layer.parse(layer).tower is live.tower_place.tower
        and live.encoder.why_not(layer) is None
        and gradient.count_nonzero()
    ]
    keys = sorted({place.key for layer in reached for place in live.places(layer)})
    inputs = InputMoments(live.module, keys)
    if direction is Direction.WHITENED:
        with torch.no_grad(), inputs:
            subject.run_retained()
    moves = []
    for layer in reached:
        weight, gradient = live.value(layer).float(), gradients[layer].to(live.value(layer).device)
        if direction is Direction.GRADIENT:
            importance = float(gradient.norm() / weight.norm())
            moves.append(TargetMove(subject, layer, weight, gradient, importance))
            continue
        # Query, key and value are applied to the same inputs: the moment of one is all's.
        moment = inputs.moments.get(live.places(layer)[0].key)
        if moment is not None:
            metric = RetainMetric(moment.mean(), _axis(moment.axis, live.places(layer)), ridge)
            along = metric.whiten(gradient)
            output = mean_square_output(weight, moment.mean(), metric.axis)
            size = metric.weight_norm(float(weight.norm()), output)
            importance = whitened_importance(gradient, along, size)
            moves.append(TargetMove(subject, layer, weight, along.float(), importance, ridge))
    return sorted(moves, key=_by_importance)


def _by_importance(move: TargetMove) -> tuple[float, str]:
    return -move.importance, move.layer


def _axis(axis: int, places: Sequence[TensorPlace]) -> int:
    """Return the axis of inputs of a layer in open_clip's shape."""
    return 1 - axis if places[0].transposed else axis


# The change of what is read at which a move is measured: above fp16's noise, and still small.
CHANGE = 0.03

# The share of a layer's norm that it is moved by first, to see which step makes that change.
FIRST = 0.1


def by_gain(
    subject: Subject, moves: Sequence[TargetMove], gradients: Mapping[str, Tensor]
) -> list[TargetMove]:
    """Return moves with the gain they promise for their importance, best first.

    They stay as they are where the subject does not say what its target reads.
    """
    before = subject.read()
    if before is None:
        return list(moves)

    def promised(move: TargetMove) -> TargetMove:
        def change(step: float) -> float:
            with move.in_place(step):
                after = subject.read()
            return 0.0 if after is None else float((after - before).norm() / before.norm())

        gradient = gradients[move.layer].to(move.direction.device)
        slope = float((gradient.double() * move.direction.double()).sum())
        return replace(move, importance=gain_per_change(slope, change, FIRST / move.share(1.0)))

    return sorted(map(promised, moves), key=_by_importance)


def gain_per_change(slope: float, change: Callable[[float], float], first: float) -> float:
    """Return a slope over the change of what is read for each unit of step.

    `change` tells the change after a step: after `first`, to find a step that changes
    about as much as CHANGE, and after that. Returns 0 where `first` changes nothing.
    """
    first_change = change(first)
    if first_change == 0:
        return 0.0
    step = first * CHANGE / first_change
    return slope * step / change(step)
