"""A model with edits in place, which runs unchanged stages no second time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slsgu_cli.checkpoints.edits import Edit, by_layer
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.stored_layer import moved_values, recognised
from slsgu_cli.clip.evaluation import Evaluation, EvaluationSet, SharedEvaluation
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.in_place import edited
from slsgu_cli.clip.metrics import ranks_of_truth
from slsgu_cli.clip.zeroshot import ImageSide, PromptSide
from slsgu_cli.errors import StaleError
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import Tower


@dataclass(frozen=True, slots=True)
class EditedModel:
    """The model with several layers changed.

    Features and class embeddings are computed from the first changed stage of each tower; those
    of an unchanged tower are the ones of the base pass.
    """

    stages: Mapping[Tower, int] = field(default_factory=dict)
    _embeddings: dict[int, Tensor] = field(default_factory=dict)

    def accuracies(self, groups: Mapping[str, EvaluationSet]) -> dict[str, Accuracy]:
        """Return the accuracy on each set."""
        return {name: groups[name].accuracy_of(each) for name, each in self.ranks(groups).items()}

    def ranks(self, groups: Mapping[str, EvaluationSet]) -> dict[str, Tensor]:
        """Return the rank of the true class of every image of each set."""
        return {name: ranks_of_truth(*self.cosines(group)) for name, group in groups.items()}

    def forget_figures(self, group: EvaluationSet) -> tuple[Accuracy, float]:
        """Return the accuracy on the images of a concept, and the concept's gap."""
        logits, labels = self.cosines(group)
        return group.accuracy_of(ranks_of_truth(logits, labels)), group.least_gap(logits)

    def cosines(self, group: EvaluationSet) -> tuple[Tensor, Tensor]:
        """Return the cosines of images with all names, and the label of each."""
        cosines = group.cosines(self.features(group.images), self.classes(group.prompts))
        return cosines, group.images.labels

    def features(self, images: ImageSide) -> Tensor:
        """Return the features of images."""
        stage = self.stages.get(Tower.VISION)
        return images.features if stage is None else images.after_edit(stage)

    def classes(self, prompts: PromptSide) -> Tensor:
        """Return the class embeddings of prompts."""
        stage = self.stages.get(Tower.TEXT)
        if stage is None:
            return prompts.embeddings
        if id(prompts) not in self._embeddings:
            self._embeddings[id(prompts)] = prompts.after_edit(stage)
        return self._embeddings[id(prompts)]


# The model as it was in the base pass.
UNEDITED = EditedModel()


@contextmanager
def edited_model(
    evaluation: Evaluation | SharedEvaluation, values: Mapping[str, Tensor]
) -> Iterator[EditedModel]:
    """Replace the values of layers of an evaluation's model within the context."""
    stages: dict[Tower, int] = {}
    for name in values:
        tower = Layer.parse(name).recorded_tower
        stage = evaluation.tower(tower).stage_of(name)
        stages[tower] = min(stages.get(tower, stage), stage)
    with counted_by(f"with other {', '.join(values)}"), edited(evaluation.model, values):
        yield EditedModel(stages)


def add_edits(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Apply edits to a model for good. Raises StaleError as `edited_values` does."""
    for name, new in edited_values(model, edits).items():
        layer = Layer.parse(name)
        parameter = model.get_parameter(layer.parameter)
        parameter.data = layer.replaced(parameter.data, new=new)


def edited_values(model: nn.Module, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Return the values of layers with edits, as `apply` computes them in fp32.

    Raises StaleError if a layer is not the one that an edit was made for.
    """
    parameters = dict(model.named_parameters())
    new = {}
    for name, group in by_layer(edits).items():
        layer = Layer.parse(name)
        parameter = parameters.get(layer.parameter)
        if parameter is not None:
            values = layer.rows(parameter.data.cpu().numpy())
        others = [
            edit.header
            for edit in group
            if parameter is None or not recognised(values, "F32", edit.header.digests)
        ]
        if parameter is None or others:
            raise StaleError(
                f"the edit {others[0].name} was made for another {name} than this model has",
                hint=f"use it with sets built for {others[0].model}",
            )
        deltas = [(edit.factor, edit.delta()) for edit in group]
        new[name] = torch.from_numpy(moved_values(values, deltas, "F32")[0]).to(parameter.device)
    return new
