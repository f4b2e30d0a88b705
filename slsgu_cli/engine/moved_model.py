"""The model with several layers moved at once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slsgu_cli.checkpoints.edits import (
    Edit,
    by_layer,
    moved_values,
    recognised,
)
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.clip.evaluation import (
    Evaluation,
    EvaluationSet,
    SharedEvaluation,
)
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.in_place import moved
from slsgu_cli.clip.metrics import least_gap, ranks_of_truth
from slsgu_cli.clip.zeroshot import ImageSide, PromptSide
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.errors import StaleError
from slsgu_cli.records.figures import (
    Accuracy,
)
from slsgu_cli.records.method import (
    Tower,
)

Moves = Sequence[tuple[Evaluator, float]]


@dataclass(frozen=True, slots=True)
class MovedModel:
    """The model with several moves in place; unchanged stages are not run again.

    Features and class embeddings are computed from the first stage of each tower that a move
    changes; those of an unchanged tower are the original model's.
    """

    stages: Mapping[Tower, int]
    embeddings: dict[int, Tensor]

    def accuracies(self, groups: Mapping[str, EvaluationSet]) -> dict[str, Accuracy]:
        """Return the accuracy on each set."""
        return {
            name: group.accuracy(self.features(group.images), self.classes(group.prompts))
            for name, group in groups.items()
        }

    def forget_figures(self, group: EvaluationSet) -> tuple[Accuracy, float]:
        """Return the accuracy on the images of a concept, and the concept's gap."""
        logits, labels = self.cosines(group)
        return group.accuracy_of(ranks_of_truth(logits, labels)), least_gap(logits, labels)

    def cosines(self, group: EvaluationSet) -> tuple[Tensor, Tensor]:
        """Return the cosines of images with all names, and the label of each."""
        return self.features(group.images) @ self.classes(group.prompts).T, group.images.labels

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
UNMOVED = MovedModel({}, {})


def model_with(evaluation: Evaluation | SharedEvaluation, edits: Iterable[Edit]) -> MovedModel:
    """Return the model of an evaluation while layers of some edits have other values."""
    headers = [edit.header for edit in edits]
    return MovedModel(
        _first_stages((h.tower, evaluation.tower(h.tower).stage_of(h.layer)) for h in headers), {}
    )


def _first_stages(places: Iterable[tuple[Tower, int]]) -> dict[Tower, int]:
    """Return the first stage of each tower among some."""
    stages: dict[Tower, int] = {}
    for tower, stage in places:
        stages[tower] = min(stages.get(tower, stage), stage)
    return stages


def add_edits(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Move the layers of edits to what `apply` makes of them in fp32.

    Raises StaleError where a layer is not the one that an edit was made for.
    """
    for name, values, group in fitting(model, edits):
        layer = Layer.parse(name)
        deltas = [(edit.factor, edit.delta()) for edit in group]
        new = torch.from_numpy(moved_values(values, deltas, "F32")[0])
        new = new.to(model.get_parameter(layer.parameter).device)
        parameter = model.get_parameter(layer.parameter)
        parameter.data = layer.replaced(parameter.data, new=new)


def fitting(model: nn.Module, edits: Sequence[Edit]) -> list[tuple[str, Floats, list[Edit]]]:
    """Return the layers of edits with their values in a model and the edits of each.

    Raises StaleError where a layer is not the one that an edit was made for.
    """
    parameters = {name for name, _ in model.named_parameters()}
    layers = []
    for name, group in by_layer(edits).items():
        layer = Layer.parse(name)
        values = None
        if layer.parameter in parameters:
            values = layer.rows(model.get_parameter(layer.parameter).data.cpu().numpy())
        others = [
            edit.header
            for edit in group
            if values is None or not recognised(values, "F32", edit.header.digests)
        ]
        if values is None or others:
            raise StaleError(
                f"the edit {others[0].name} was made for another {name} than this model has",
                hint=f"use it with sets built for {others[0].model}",
            )
        layers.append((name, values, group))
    return layers


@contextmanager
def moved_model(evaluation: Evaluation | SharedEvaluation, moves: Moves) -> Iterator[MovedModel]:
    """Put several moves into the model for the length of a block."""
    stages = _first_stages((evaluator.score.tower, evaluator.stage) for evaluator, _ in moves)
    changes = ((evaluator.score.layer, evaluator.along, step) for evaluator, step in moves)
    label = ", ".join(f"{evaluator.score.layer} at step {step:.4g}" for evaluator, step in moves)
    with counted_by(label), moved(evaluation.model, changes):
        yield MovedModel(stages, {})
