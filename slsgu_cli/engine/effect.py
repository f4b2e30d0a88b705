"""The effect of an edit on the concept, on other classes and on earlier edits."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from slsgu_cli.checkpoints.edits import Edit, by_layer, edit_digests, original_values
from slsgu_cli.clip.evaluation import (
    Evaluation,
    EvaluationSet,
    SharedEvaluation,
    by_nearness,
    class_losses,
)
from slsgu_cli.clip.in_place import Change, changed_values
from slsgu_cli.engine.choice import residual
from slsgu_cli.engine.edited_model import UNEDITED, EditedModel, edited_model
from slsgu_cli.records.figures import (
    Accuracy,
    BaseEdits,
    ClassLoss,
    EarlierEdit,
    Figures,
    Report,
    harmed,
)
from slsgu_cli.records.method import Criterion
from slsgu_cli.store.artifacts import set_of

# Classes that a report names: those with the largest loss, and those with the nearest names.
NAMED = 20


@dataclass(frozen=True, slots=True)
class EarlierConcepts:
    """The concepts of earlier edits, which are applied to the model."""

    evaluation: SharedEvaluation
    edits: Sequence[Edit]

    def returned(self, change: Change) -> list[str]:
        """Return the edits whose residual grows with a change."""
        before = residuals(self.evaluation, self.edits, UNEDITED)
        values = changed_values(self.evaluation.model, [change])
        with edited_model(self.evaluation, values) as model:
            after = residuals(self.evaluation, self.edits, model)
        return [name for name in before if after[name] > before[name]]

    def recognised(self, model: EditedModel) -> dict[str, Accuracy]:
        """Return the forget accuracy of each concept, by the name of its edit."""
        forget = self.evaluation.forget
        names = [edit.header.name for edit in self.edits]
        return {name: model.forget_figures(forget[set_of(name)])[0] for name in names}

    def undone(self) -> AbstractContextManager[EditedModel]:
        """Restore the original values of the edited layers within the context."""
        device = next(self.evaluation.model.parameters()).device
        originals = {
            name: torch.from_numpy(original_values(group)).float().to(device)
            for name, group in by_layer(self.edits).items()
        }
        return edited_model(self.evaluation, originals)


def residuals(
    evaluation: SharedEvaluation, edits: Sequence[Edit], model: EditedModel
) -> dict[str, float]:
    """Return the residual of each edit's concept by its criterion, by the name of the edit."""
    of_edits = {}
    for header in (edit.header for edit in edits):
        accuracy, gap = model.forget_figures(evaluation.forget[set_of(header.name)])
        criterion = header.criterion or Criterion.FA1
        of_edits[header.name] = residual(accuracy, gap, criterion, header.margin)
    return of_edits


def report(
    evaluation: Evaluation, changes: Iterable[Change], earlier: EarlierConcepts | None = None
) -> Report:
    """Return the effect of changes on the rows of an evaluation, after its base pass.

    With `earlier` edits, the edited model is compared with the original one, without them.
    """
    groups, concept = {"": evaluation.forget} | evaluation.utility, evaluation.forget

    def figures(ranks: Mapping[str, Tensor]) -> Figures:
        accuracy = {name: groups[name].accuracy_of(each) for name, each in ranks.items()}
        return Figures(accuracy.pop(""), accuracy)

    present = before = UNEDITED.ranks(groups)
    with edited_model(evaluation, changed_values(evaluation.model, changes)) as model:
        after = model.ranks(groups)
        earlier_after = earlier.recognised(model) if earlier else {}
    base_edits = None
    with earlier.undone() if earlier else nullcontext(UNEDITED) as model:
        if earlier:
            before = model.ranks(groups)
            original, now = earlier.recognised(model), earlier.recognised(UNEDITED)
            of_edits = {
                name: EarlierEdit(made, original[name], now[name], earlier_after[name])
                for name, made in edit_digests(earlier.edits).items()
            }
            base_edits = BaseEdits(of_edits, figures(present))
        most, nearest = class_effects(evaluation.utility, before, after, concept, model)
    words = word_accuracies(concept, before[""], after[""])
    return Report(figures(before), figures(after), most, nearest, words, base_edits)


def word_accuracies(concept: EvaluationSet, before: Tensor, after: Tensor) -> tuple[ClassLoss, ...]:
    """Return the forget accuracy of each word of a concept of several, the least forgotten first.

    `before` and `after` are ranks of the concept. It is empty for a concept of one word.
    """
    losses = class_losses(concept, before == 0, after == 0)
    if len(losses) < 2:
        return ()
    return tuple(sorted(losses, key=lambda loss: (-loss.after, loss.name)))


def class_effects(
    utility: Mapping[str, EvaluationSet],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    concept: EvaluationSet,
    original: EditedModel,
) -> tuple[tuple[ClassLoss, ...], tuple[ClassLoss, ...]]:
    """Return the most harmed classes, and those with the names nearest to the concept's.

    `before` and `after` are ranks of the true classes. `original` has the embeddings of names.
    """
    losses = {
        (name, loss.name): loss
        for name, group in utility.items()
        for loss in class_losses(group, before[name] == 0, after[name] == 0)
    }
    embedding = original.classes(concept.prompts)[torch.unique(concept.labels)].mean(dim=0)
    by_name = by_nearness(utility, embedding, original.classes)
    names = [(name, utility[name].names[i]) for _, name, i in by_name]
    nearest = [losses[key] for key in names if key in losses]
    return tuple(harmed(losses.values())[:NAMED]), tuple(nearest[:NAMED])
