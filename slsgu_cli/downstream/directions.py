"""Where a target's layers can move, which promise most, and the trials along them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from time import perf_counter

import torch
from torch import Tensor

from slsgu_cli import progress
from slsgu_cli.checkpoints.layers import Layer, is_candidate
from slsgu_cli.checkpoints.layouts import TensorPlace
from slsgu_cli.downstream.subjects import Subject
from slsgu_cli.method.moments import (
    InputMoments,
    RetainMetric,
    mean_square_output,
    whitened_importance,
)
from slsgu_cli.method.scoring import next_step
from slsgu_cli.records.method import Direction
from slsgu_cli.records.targets import TargetTrial, TargetTrials
from slsgu_cli.store.store import Store


@dataclass(frozen=True, slots=True)
class Move:
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


def moves_of(
    subject: Subject,
    gradients: Mapping[str, Tensor],
    *,
    direction: Direction,
    ridge: float,
) -> list[Move]:
    """Return a ray for each layer that has a gradient and reaches the target, best first.

    The whitened direction is that of the target's own retained inputs: what its CLIP is
    applied to when the target runs it, all positions included.
    """
    live = subject.encoder
    reached = [
        layer
        for layer, gradient in gradients.items()
        if is_candidate(layer)
        and Layer.parse(layer).tower is live.home.tower
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
            found.append(Move(layer, weight, gradient, importance))
            continue
        # Query, key and value are applied to the same inputs: the moment of one is all's.
        moment = inputs.found.get(live.slots(layer)[0].key)
        if moment is not None:
            own = RetainMetric(moment.mean(), _axis(moment.axis, live.slots(layer)), ridge)
            moved = own.whiten(gradient)
            output = mean_square_output(weight, moment.mean(), own.axis)
            size = own.weight_norm(float(weight.norm()), output)
            importance = whitened_importance(gradient, moved, size)
            found.append(Move(layer, weight, moved.float(), importance))
    return sorted(found, key=lambda ray: (-ray.importance, ray.layer))


def _axis(axis: int, places: Sequence[TensorPlace]) -> int:
    """Return the axis of inputs of a layer in open_clip's shape."""
    return 1 - axis if places[0].transposed else axis


# The change of what is read at which a move is measured: above fp16's noise, and still small.
CHANGE = 0.03

# The share of a layer's norm that it is moved by first, to see which step makes that change.
FIRST = 0.1


def by_gain(subject: Subject, found: Sequence[Move], gradients: Mapping[str, Tensor]) -> list[Move]:
    """Return rays with what they promise for their importance, best first.

    They stay as they are where the subject does not say what its target reads.
    """
    before = subject.read()
    if before is None:
        return list(found)

    def promised(ray: Move) -> Move:
        def change(step: float) -> float:
            with subject.encoder.edited({ray.layer: ray.at(step)}):
                after = subject.read()
            return 0.0 if after is None else float((after - before).norm() / before.norm())

        gradient = gradients[ray.layer].to(ray.direction.device)
        slope = float((gradient.double() * ray.direction.double()).sum())
        return replace(ray, importance=gain_per_change(slope, change, FIRST / ray.share(1.0)))

    return sorted(map(promised, found), key=lambda ray: (-ray.importance, ray.layer))


def gain_per_change(slope: float, change: Callable[[float], float], first: float) -> float:
    """Return a slope over the change of what is read for each unit of step.

    `change` tells the change after a step: after `first`, to find a step that changes
    about as much as CHANGE, and after that. Returns 0 where `first` changes nothing.
    """
    seen = change(first)
    if seen == 0:
        return 0.0
    step = first * CHANGE / seen
    return slope * step / change(step)


class TargetRun:
    """The state of one search: trials by layer and step, and the path taken.

    With `full`, what is kept is measured for every trial. `began` is when the search did,
    by the performance counter, if that was earlier.
    """

    def __init__(
        self,
        store: Store,
        path: str,
        subject: Subject,
        trials: TargetTrials,
        *,
        full: bool = False,
        began: float | None = None,
    ) -> None:
        self.store, self.path, self.subject = store, path, subject
        self.full = full
        self._began = perf_counter() if began is None else began
        self._spent = trials.seconds
        self.found = {(trial.layer, trial.step): trial for trial in trials.trials}
        self.taken: list[tuple[str, float]] = []
        self._header = trials

    @property
    def trials(self) -> TargetTrials:
        """Return what was tried so far, as an artifact."""
        return replace(self._header, trials=tuple(self.found.values()))

    def reaches(self, trial: TargetTrial) -> bool:
        """Return whether a trial reaches the goal."""
        return 100 - (trial.concept.percent or 0.0) >= self._header.goal

    def bisect(self, ray: Move, steps: int, start: float | None) -> None:
        """Run Algorithm 3 on one layer, on what the target shows of the concept."""
        first = start or 0.1 / ray.share(1.0)
        tried: list[tuple[float, float]] = []
        with progress.bar(ray.layer, steps) as ticker:
            for _ in range(steps):
                step = next_step(tried, first)
                trial = self.found.get((ray.layer, step)) or self._try(ray, step)
                self._keep(self._with_others(ray, trial) if self.full else trial)
                left = 0.0 if self.reaches(trial) else trial.concept.percent or 0.0
                tried.append((step, left))
                ticker.advance()
        self.taken += [(ray.layer, step) for step, _ in tried]

    def choose(self, tried: Sequence[Move]) -> TargetTrial:
        """Measure what each layer's shortest sufficient step keeps; return the best.

        Where none suffices, it is the step that leaves least of the concept.
        """
        shortest = []
        for ray in tried:
            own = [self.found[key] for key in self.taken if key[0] == ray.layer]
            enough = [trial for trial in own if self.reaches(trial)]
            if enough:
                shortest.append((ray, min(enough, key=attrgetter("step"))))
        if not shortest:
            least = min((self.found[key] for key in self.taken), key=lambda t: t.concept.count)
            shortest = [(ray, least) for ray in tried if ray.layer == least.layer]
        measured = []
        for ray, trial in shortest:
            measured.append(self._with_others(ray, trial))
            self._keep(measured[-1])
        return max(measured, key=lambda trial: trial.others.count if trial.others else -1)

    def _try(self, ray: Move, step: float) -> TargetTrial:
        with self.subject.encoder.edited({ray.layer: ray.at(step)}):
            concept = self.subject.concept()
        tower = self.subject.encoder.home.tower
        return TargetTrial(ray.layer, tower, step, ray.share(step), concept, None)

    def _with_others(self, ray: Move, trial: TargetTrial) -> TargetTrial:
        """Return the trial with what it keeps, measured if it was not."""
        if trial.others is not None:
            return trial
        with self.subject.encoder.edited({ray.layer: ray.at(trial.step)}):
            return replace(trial, others=self.subject.others())

    def _keep(self, trial: TargetTrial) -> None:
        """Record a trial at once: each takes minutes on a large target."""
        if self.found.get((trial.layer, trial.step)) != trial:
            self.found[trial.layer, trial.step] = trial
            spent = self._spent + perf_counter() - self._began
            self._header = replace(self._header, seconds=spent)
            self.store.write_record(self.path, self.trials)
