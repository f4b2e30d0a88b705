"""Forget accuracy after a step of one layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.clip.evaluation import Evaluation
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.in_place import Change, edited
from slsgu_cli.clip.metrics import ranks_of_truth
from slsgu_cli.engine.edited_model import EditedModel
from slsgu_cli.errors import NotFiniteError
from slsgu_cli.method.scores import norm
from slsgu_cli.method.step_search import first_step
from slsgu_cli.records.directions import FALLBACK, DirectionSpec
from slsgu_cli.records.method import Move, Tower, Trial


@dataclass(slots=True)
class Evaluator:
    """Measures steps of one layer of the CLIP along a tensor of its shape.

    `weight_norm` is the norm of the layer, which a step is relative to.
    """

    evaluation: Evaluation
    layer: str
    weight_norm: float
    along: Tensor
    direction: DirectionSpec = FALLBACK
    tower: Tower = field(init=False)
    weight: Tensor = field(init=False)
    norm: float = field(init=False)
    stage: int = field(init=False)
    # The edited models by step, with their class embeddings.
    _models: dict[float, EditedModel] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        layer = Layer.parse(self.layer)
        self.tower = layer.recorded_tower
        self.weight = layer.rows(self.evaluation.model.get_parameter(layer.parameter).data)
        self.stage = self.evaluation.tower(self.tower).stage_of(self.layer)
        self.norm = norm(self.along.cpu().numpy())
        if not isfinite(self.norm):
            raise NotFiniteError(
                f"the direction of {self.layer} is not finite: a gradient it is made from "
                "is damaged",
                hint="remove that gradient from the store and run `slsgu grad` again",
            )

    @property
    def move(self) -> Move:
        """The layer and the direction that it moves in."""
        return self.layer, self.direction

    @property
    def first(self) -> float:
        """The first step to try."""
        return first_step(self.weight_norm, self.norm)

    def change(self, step: float) -> Change:
        """Return the change of the layer by a step; a positive one ascends the forget loss."""
        return self.layer, self.along, step

    @contextmanager
    def stepped(self, step: float) -> Iterator[EditedModel]:
        """Take a step within the context."""
        values = torch.add(self.weight, self.along, alpha=step)
        with (
            counted_by(f"{self.layer} at step {step:.4g}"),
            edited(self.evaluation.model, {self.layer: values}),
        ):
            yield self._models.setdefault(step, EditedModel({self.tower: self.stage}))

    def measure(self, step: float) -> Trial:
        """Return the trial of a step, without its utility."""
        forget = self.evaluation.forget
        with self.stepped(step) as model:
            logits, labels = model.cosines(forget)
        return Trial(
            layer=self.layer,
            tower=self.tower,
            direction=self.direction,
            step=step,
            share=step * self.norm / self.weight_norm,
            forget=forget.accuracy_of(ranks_of_truth(logits, labels)),
            gap=forget.least_gap(logits),
            utility=None,
        )
