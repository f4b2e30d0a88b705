"""The effect of an edit on test images: on the concept, other classes and earlier edits."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from slsgu_cli.checkpoints.edits import (
    Edit,
    by_layer,
    edit_digests,
    original_values,
)
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.clip.evaluation import (
    Evaluation,
    SharedEvaluation,
    by_nearness,
    class_losses,
)
from slsgu_cli.clip.in_place import edited
from slsgu_cli.engine.choice import residual_of
from slsgu_cli.engine.moved_model import UNMOVED, MovedModel, Moves, model_with, moved_model
from slsgu_cli.records.figures import (
    Accuracy,
    BaseEdits,
    EarlierEdit,
    Figures,
    Report,
    harmed,
)
from slsgu_cli.records.method import (
    Criterion,
)
from slsgu_cli.store.artifacts import set_of

# Classes that a report names: those with the largest loss, and those with the nearest names.
NAMED = 20


@dataclass(frozen=True, slots=True)
class EarlierConcepts:
    """The concepts of earlier edits, which are applied to the model."""

    evaluation: SharedEvaluation
    edits: Sequence[Edit]

    def returned(self, moves: Moves) -> list[str]:
        """Return the edits whose residual grows with some moves."""
        before = residuals(self.evaluation, self.edits, UNMOVED)
        with moved_model(self.evaluation, moves) as model:
            after = residuals(self.evaluation, self.edits, model)
        return [name for name in before if after[name] > before[name]]

    def recognised(self, model: MovedModel) -> dict[str, Accuracy]:
        """Return the forget accuracy of each concept, by the name of its edit."""
        forget = self.evaluation.forget
        names = [edit.header.name for edit in self.edits]
        return {name: model.forget_figures(forget[set_of(name)])[0] for name in names}

    @contextmanager
    def undone(self) -> Iterator[MovedModel]:
        """Restore the original values of the edited layers within the context."""
        model = self.evaluation.model
        with ExitStack() as stack:
            for name, group in by_layer(self.edits).items():
                values = torch.from_numpy(original_values(group)).float()
                device = model.get_parameter(Layer.parse(name).parameter).device
                stack.enter_context(edited(model, name, values.to(device)))
            yield model_with(self.evaluation, self.edits)


def residuals(
    evaluation: SharedEvaluation, edits: Sequence[Edit], model: MovedModel
) -> dict[str, float]:
    """Return the residual of each edit's concept by its criterion, by the name of the edit."""
    of_edits = {}
    for header in (edit.header for edit in edits):
        accuracy, gap = model.forget_figures(evaluation.forget[set_of(header.name)])
        criterion = header.criterion or Criterion.FA1
        of_edits[header.name] = residual_of(accuracy, gap, criterion, header.margin)
    return of_edits


def report(
    evaluation: Evaluation, moves: Moves | MovedModel, earlier: EarlierConcepts | None = None
) -> Report:
    """Return the effect of several moves on the rows of an evaluation, after its base pass.

    A MovedModel has its moves in place already. With `earlier` edits, the edited model is
    compared with the original one, without them.
    """
    groups = {"": evaluation.forget} | evaluation.utility

    def ranks(model: MovedModel) -> dict[str, Tensor]:
        return {
            name: group.ranks(model.features(group.images), model.classes(group.prompts))
            for name, group in groups.items()
        }

    as_it_was = ranks(UNMOVED)
    placed: AbstractContextManager[MovedModel] = (
        nullcontext(moves) if isinstance(moves, MovedModel) else moved_model(evaluation, moves)
    )
    with placed as model:
        after = ranks(model)
        earlier_after = earlier.recognised(model) if earlier else {}
    with earlier.undone() if earlier else nullcontext(UNMOVED) as model:
        before = ranks(model) if earlier else as_it_was
        earlier_original = earlier.recognised(model) if earlier else {}
        concept = model.classes(evaluation.forget.prompts)[int(evaluation.forget.images.labels[0])]
        nearness = by_nearness(evaluation.utility, concept, model.classes)

    def figures(ranks: Mapping[str, Tensor]) -> Figures:
        kept = {name: groups[name].accuracy_of(each) for name, each in ranks.items()}
        return Figures(kept.pop(""), kept)

    losses = {
        (name, loss.name): loss
        for name, group in evaluation.utility.items()
        for loss in class_losses(group, before[name] == 0, after[name] == 0)
    }
    named = [(name, groups[name].names[i]) for _, name, i in nearness]
    nearest = [losses[key] for key in named if key in losses]
    most = harmed(losses.values())[:NAMED]
    base_edits = None
    if earlier:
        earlier_before = earlier.recognised(UNMOVED)
        of_edits = {
            name: EarlierEdit(
                made, earlier_original[name], earlier_before[name], earlier_after[name]
            )
            for name, made in edit_digests(earlier.edits).items()
        }
        base_edits = BaseEdits(of_edits, figures(as_it_was))
    return Report(figures(before), figures(after), tuple(most), tuple(nearest[:NAMED]), base_edits)
