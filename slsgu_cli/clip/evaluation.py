"""A model and a set's evaluation data, joined: forget accuracy and utility.

The forget images are the rows of one evaluation set that show the concept; they are left
out of that set's own accuracy, which says what was kept. Several concepts can share the
model, its evaluation sets and its base pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from shlex import quote

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.clip.inputs import pixel_normalizer, to_tokens
from slsgu_cli.clip.models import Tokenize
from slsgu_cli.clip.towers import CacheBudget, SplitTower, text_tower, vision_tower
from slsgu_cli.clip.zeroshot import (
    ImageSide,
    PromptSide,
    accuracies,
    class_accuracies,
    ranks_of_truth,
)
from slsgu_cli.errors import InputError
from slsgu_cli.records.method import Accuracy, ClassLoss, Tower
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.sources.classes import find_class
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

Ints = npt.NDArray[np.integer]


@dataclass(slots=True)
class EvaluationSet:
    """Images and the classes they are told apart among; `names` are those classes."""

    images: ImageSide
    prompts: PromptSide
    names: tuple[str, ...]

    def base_accuracy(self) -> Accuracy:
        """Return the accuracy of the original model."""
        return accuracy(self.base_ranks())

    def base_ranks(self) -> Tensor:
        """Return the rank of the true class of every image, by the original model."""
        return self.ranks(self.images.features, self.prompts.embeddings)

    def some(self, rows: Ints) -> "EvaluationSet":
        """Return the set with some of its images only."""
        return EvaluationSet(self.images.some(rows), self.prompts, self.names)

    def ranks(self, features: Tensor, embeddings: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the rank of the true class for the features of `rows` (default: all)."""
        labels = self.images.labels if rows is None else self.images.labels[rows]
        return ranks_of_truth(features @ embeddings.T, labels)


@dataclass(slots=True)
class _Measured:
    """A model in split form, and what is measured on it."""

    model: nn.Module
    vision: SplitTower
    text: SplitTower

    def groups(self) -> tuple[list[EvaluationSet], list[EvaluationSet]]:
        """Return the concepts' images, which every trial runs over, and all others.

        What is kept of the former does not depend on the others, which share what memory
        is left.
        """
        raise NotImplementedError

    def base_pass(self, layers: Iterable[str], *, cache_bytes: int) -> None:
        """Run the original model once, keeping what edits of `layers` will resume from."""
        budget, (concepts, others), names = CacheBudget(cache_bytes), self.groups(), set(layers)
        stages = {
            tower: sorted(
                {self.tower(tower).stage_of(n) for n in names if Layer.parse(n).tower is tower}
            )
            for tower in Tower
        }
        groups = [*concepts, *others]
        total, waiting = (sum(len(group.images) for group in part) for part in (groups, others))
        vision = stages[Tower.VISION]
        with torch.no_grad(), progress.bar("original model", total) as ticker:
            for prompts in {id(group.prompts): group.prompts for group in groups}.values():
                prompts.base_pass(stages[Tower.TEXT], budget)
            for group in concepts:
                for count in group.images.base_pass(vision, budget):
                    ticker.advance(count)
            for group in others:
                share = len(group.images) / waiting
                waiting -= len(group.images)
                classes = group.prompts.embeddings
                for count in group.images.base_pass(vision, budget, classes, share):
                    ticker.advance(count)

    def tower(self, tower: Tower) -> SplitTower:
        """Return the split form of a tower."""
        return self.vision if tower is Tower.VISION else self.text


@dataclass(slots=True)
class Evaluation(_Measured):
    """Everything the search measures on. `forget` holds the images of the concept."""

    forget: EvaluationSet
    utility: dict[str, EvaluationSet]

    def groups(self) -> tuple[list[EvaluationSet], list[EvaluationSet]]:
        """Return the concept's images, and all others."""
        return [self.forget], list(self.utility.values())


@dataclass(slots=True)
class SharedEvaluation(_Measured):
    """A model and the evaluation sets that several concepts are measured on.

    `sets` have all their rows. `forget` has the images of each concept, by the name of its
    set: part of one of `sets`, or the forget set's own where no evaluation set knows it.
    """

    sets: dict[str, EvaluationSet]
    forget: dict[str, EvaluationSet]

    def groups(self) -> tuple[list[EvaluationSet], list[EvaluationSet]]:
        """Return the concepts' images, and all images, theirs among them."""
        return list(self.forget.values()), list(self.sets.values())

    def of(self, manifest: SetManifest) -> Evaluation:
        """Return what one concept is measured on. Raises InputError."""
        forget, utility = self.forget[manifest.name], self.utility([manifest])
        return Evaluation(self.model, self.vision, self.text, forget, utility)

    def utility(self, manifests: Sequence[SetManifest]) -> dict[str, EvaluationSet]:
        """Return the sets without the images that show any of the concepts. Raises InputError."""
        kept = {}
        for name, group in self.sets.items():
            shown = np.zeros(len(group.images), bool)
            for manifest in manifests:
                shown |= _shown(name, group, manifest)
            if not shown.all():
                kept[name] = group.some(np.flatnonzero(~shown))
        if not kept:
            names = " and ".join(manifest.name for manifest in manifests)
            concepts = " and ".join(repr(manifest.concept) for manifest in manifests)
            raise InputError(
                f"the evaluation sets of {names} show nothing but {concepts}, so "
                "what is kept cannot be measured",
                hint=f"add --eval NAME=SOURCE of other classes to `slsgu build-sets "
                f"{quote(manifests[0].name)}`",
            )
        return kept


def accuracy(ranks: Tensor) -> Accuracy:
    """Return the accuracy that the ranks of the true classes amount to."""
    top1, top5 = accuracies(ranks)
    return Accuracy(top1, top5, int(ranks.numel()))


def class_losses(group: EvaluationSet, before: Tensor, after: Tensor) -> list[ClassLoss]:
    """Return what each class that has images lost, the largest loss first, ties by name.

    `before` and `after` are the ranks of the true class of the group's images.
    """
    labels, classes = group.images.labels, len(group.names)
    was, rows = class_accuracies(before, labels, classes)
    now, _ = class_accuracies(after, labels, classes)
    figures = zip(group.names, rows.tolist(), was.tolist(), now.tolist(), strict=True)
    losses = [ClassLoss(*each) for each in figures if each[1]]
    return sorted(losses, key=lambda loss: (-loss.lost, loss.name))


def prepare(
    store: Store, manifest: SetManifest, model: nn.Module, *, tokenize: Tokenize, device: str
) -> Evaluation:
    """Open the evaluation sets of `manifest` for `model`. Raises InputError without any."""
    shared = prepare_shared(store, [manifest], model, tokenize=tokenize, device=device)
    return shared.of(manifest)


def prepare_shared(
    store: Store,
    manifests: Sequence[SetManifest],
    model: nn.Module,
    *,
    tokenize: Tokenize,
    device: str,
) -> SharedEvaluation:
    """Open the evaluation sets that all of `manifests` have. Raises InputError without any.

    Their evaluation sets must be the same: the first one's are opened.
    """
    first = manifests[0]
    if not first.evals:
        raise InputError(
            f"set {first.name} has nothing to measure on",
            hint=f"run `slsgu build-sets {quote(first.name)} ... --eval NAME=SOURCE`",
        )
    vision, text = vision_tower(model), text_tower(model)
    blocks = {name: DataBlock.open(store, ref) for name, ref in sorted(first.evals.items())}
    normalize = pixel_normalizer(first.input, device)

    def opened(
        block: DataBlock, labels: Ints, extra: Sequence[str], prompted: DataBlock
    ) -> EvaluationSet:
        rows = np.arange(block.rows)
        images = ImageSide(vision, block, rows, to_tokens(labels, device), normalize)
        names = (*prompted.class_names, *extra)
        prompts = prompt_side(text, names, prompted.templates, tokenize=tokenize, device=device)
        return EvaluationSet(images, prompts, names)

    sets = {name: opened(block, block.labels, (), block) for name, block in blocks.items()}
    forget = {}
    for manifest in manifests:
        if manifest.forget_eval is not None:
            group = sets[manifest.forget_eval]
            shown = _shown(manifest.forget_eval, group, manifest)
            forget[manifest.name] = group.some(np.flatnonzero(shown))
        else:
            prompted = next(iter(blocks.values()))
            block = DataBlock.open(store, manifest.forget)
            labels = np.full(block.rows, len(prompted.class_names))
            forget[manifest.name] = opened(block, labels, (manifest.concept,), prompted)
    return SharedEvaluation(model, vision, text, sets, forget)


def _shown(name: str, group: EvaluationSet, manifest: SetManifest) -> npt.NDArray[np.bool_]:
    """Return which rows of the set called `name` measure the forget accuracy of a concept."""
    labels = group.images.labels.cpu().numpy()
    if manifest.forget_eval != name:
        return np.zeros(len(labels), bool)
    shown: npt.NDArray[np.bool_] = labels == find_class(group.names, manifest.concept)
    return shown


def prompt_side(
    text: SplitTower,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    tokenize: Tokenize,
    device: str,
) -> PromptSide:
    """Return the prompts of some classes: each name in each template."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    owners = np.repeat(np.arange(len(names)), len(templates))
    tokens = to_tokens(tokenize(texts), device)
    return PromptSide(text, tokens, to_tokens(owners, device), len(names))
