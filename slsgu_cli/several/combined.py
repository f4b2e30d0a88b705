"""Measuring several edits in place at once: the moves of a layer are summed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from slsgu_cli.evaluation import EvaluationSet, SharedEvaluation, accuracy
from slsgu_cli.metrics import least_gap, ranks_of_truth
from slsgu_cli.records import Accuracy, Tower
from slsgu_cli.trial import Probe
from slsgu_cli.zeroshot import ImageSide, PromptSide, moved

Moves = Sequence[tuple[Probe, float]]


@dataclass(frozen=True, slots=True)
class Combined:
    """The model with several moves in place; what they leave as it was is not run again.

    Features and class embeddings are computed from the first stage of each tower that any
    of the moves acts in; those of a tower that none moves are the original model's.
    """

    stages: Mapping[Tower, int]
    embeddings: dict[int, Tensor]

    def accuracies(self, groups: Mapping[str, EvaluationSet]) -> dict[str, Accuracy]:
        """Return the accuracy on each set."""
        return {
            name: accuracy(group.ranks(self.features(group.images), self.classes(group.prompts)))
            for name, group in groups.items()
        }

    def left(self, group: EvaluationSet) -> tuple[Accuracy, float]:
        """Return the accuracy on the images of a concept, and the concept's gap."""
        logits = self.features(group.images) @ self.classes(group.prompts).T
        labels = group.images.labels
        return accuracy(ranks_of_truth(logits, labels)), least_gap(logits, labels)

    def features(self, images: ImageSide) -> Tensor:
        """Return the features of images."""
        stage = self.stages.get(Tower.VISION)
        return images.features if stage is None else images.after_edit(stage)

    def classes(self, prompts: PromptSide) -> Tensor:
        """Return the class embeddings of prompts."""
        stage = self.stages.get(Tower.TEXT)
        if stage is None:
            return prompts.embeddings
        if id(prompts) not in self.embeddings:
            self.embeddings[id(prompts)] = prompts.after_edit(stage)
        return self.embeddings[id(prompts)]


# The model with its weights as they were when the base pass ran.
UNMOVED = Combined({}, {})


@contextmanager
def combined(evaluation: SharedEvaluation, moves: Moves) -> Iterator[Combined]:
    """Put several moves into the model for the length of a block."""
    stages: dict[Tower, int] = {}
    for probe, _ in moves:
        tower = probe.score.tower
        stages[tower] = min(stages.get(tower, probe.stage), probe.stage)
    changes = ((probe.score.layer, probe.direction, step) for probe, step in moves)
    with moved(evaluation.model, changes):
        yield Combined(stages, {})
