"""Measuring one trial: what a step along one layer's direction does to the accuracies."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slsgu_cli.evaluation import Evaluation, accuracy
from slsgu_cli.metrics import least_gap, margins, ranks_of_truth
from slsgu_cli.records import Accuracy, LayerScore, Tower, Trial
from slsgu_cli.scoring import norm
from slsgu_cli.thirds import held, parameter_of
from slsgu_cli.zeroshot import PromptSide, edited

# A vision trial's images are looked at in this many parts, the least certain ones first.
PARTS = 24
MIN_ROWS = 48


@dataclass(slots=True)
class Probe:
    """One layer, its original values and the direction it moves in.

    `ridge` is what whitened the direction, None for the gradient itself.
    """

    evaluation: Evaluation
    score: LayerScore
    direction: Tensor
    ridge: float | None = None
    weight: Tensor = field(init=False)
    norm: float = field(init=False)
    stage: int = field(init=False)
    _embeddings: dict[float, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        parameter = self.evaluation.model.get_parameter(parameter_of(self.score.layer))
        self.weight = held(self.score.layer, parameter.data)
        self.stage = self.evaluation.tower(self.score.tower).stage_of(self.score.layer)
        self.norm = norm(self.direction.cpu().numpy())

    def stepped(self, step: float) -> Tensor:
        """Return the layer after a step; ascent of the forget loss for a positive one."""
        return torch.add(self.weight, self.direction, alpha=step)

    def trial(self, step: float) -> Trial:
        """Measure how well the concept is still recognised after a step, and no utility."""
        logits = self._forget_logits(step)
        labels = self.evaluation.forget.images.labels
        return Trial(
            layer=self.score.layer,
            tower=self.score.tower,
            ridge=self.ridge,
            step=step,
            share=step * self.norm / self.score.weight_norm,
            forget=accuracy(ranks_of_truth(logits, labels)),
            gap=least_gap(logits, labels),
            utility=None,
        )

    def _forget_logits(self, step: float) -> Tensor:
        """Return the cosines of the forget images with all names after a step."""
        group = self.evaluation.forget
        with edited(self.evaluation.model, self.score.layer, self.stepped(step)):
            if self.score.tower is Tower.VISION:
                return group.images.after_edit(self.stage) @ group.prompts.embeddings.T
            embeddings = self._embeddings[step] = group.prompts.after_edit(self.stage)
        return group.images.features @ embeddings.T

    def class_embeddings(self, prompts: PromptSide, step: float) -> Tensor:
        """Return the classes after a step of a text layer, which must be in place."""
        if prompts is self.evaluation.forget.prompts and step in self._embeddings:
            return self._embeddings[step]
        return prompts.after_edit(self.stage)


@dataclass(slots=True)
class UtilityMeter:
    """Measures what a step keeps, and stops where it can no longer reach the best so far."""

    evaluation: Evaluation
    _lead: dict[str, Tensor] = field(init=False, default_factory=dict)

    def measure(self, probe: Probe, step: float, *, beat: float) -> dict[str, Accuracy] | None:
        """Return the accuracy on each evaluation set, or None once it must stay under `beat`.

        `beat` is a mean top-1 accuracy in percent.
        """
        with edited(self.evaluation.model, probe.score.layer, probe.stepped(step)):
            if probe.score.tower is Tower.VISION:
                return self._after_vision_edit(probe.stage, beat)
            return {
                name: accuracy(
                    group.ranks(group.images.features, probe.class_embeddings(group.prompts, step))
                )
                for name, group in self.evaluation.utility.items()
            }

    def _after_vision_edit(self, stage: int, beat: float) -> dict[str, Accuracy] | None:
        groups = self.evaluation.utility
        ranks = {name: torch.full_like(group.images.labels, -1) for name, group in groups.items()}
        missed = dict.fromkeys(groups, 0)
        for name, rows in self._parts(stage):
            group = groups[name]
            logits = group.images.after_edit(stage, rows) @ group.prompts.embeddings.T
            found = ranks_of_truth(logits, group.images.labels[rows])
            self._lead[name][rows] = margins(logits, group.images.labels[rows])
            ranks[name][rows] = found
            missed[name] += int((found > 0).sum())
            bound = sum(1 - missed[n] / len(g.images) for n, g in groups.items()) / len(groups)
            if 100 * bound < beat - 1e-9:
                return None
        return {name: accuracy(found) for name, found in ranks.items()}

    def _parts(self, stage: int) -> Iterator[tuple[str, Tensor]]:
        """Yield rows of the sets in turn, those most likely missed first where that is free.

        The guess is the margin by which the true class led when the row was last looked
        at, by the original model or after the last edit that was measured.
        """
        queues = []
        for name, group in self.evaluation.utility.items():
            if name not in self._lead:
                logits = group.images.features @ group.prompts.embeddings.T
                self._lead[name] = margins(logits, group.images.labels)
            lead = self._lead[name]
            free = group.images.keeps(stage)
            rows = torch.argsort(lead) if free else torch.arange(len(lead), device=lead.device)
            size = max(MIN_ROWS, -(-len(rows) // PARTS))
            queues.append([(name, part) for part in torch.split(rows, size)])
        for turn in range(max(map(len, queues))):
            yield from (queue[turn] for queue in queues if turn < len(queue))


def mean_top1(utility: dict[str, Accuracy]) -> float:
    """Return the figure that utility is compared by: the mean top-1 over the sets."""
    return sum(found.top1 for found in utility.values()) / len(utility)
