"""A model and a set's evaluation data, joined: forget accuracy and utility.

The forget images are the rows of one evaluation set that show the concept; they are left
out of that set's own accuracy, which says what was kept.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from shlex import quote

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli.batches import pixel_normalizer, to_tokens
from slsgu_cli.console import Console
from slsgu_cli.errors import InputError
from slsgu_cli.metrics import accuracies, ranks_of_truth
from slsgu_cli.models import Tokenize
from slsgu_cli.prompts import find_class
from slsgu_cli.records import Accuracy, SetManifest, Tower
from slsgu_cli.sets import DataBlock
from slsgu_cli.store import Store
from slsgu_cli.towers import SplitTower, text_tower, vision_tower
from slsgu_cli.zeroshot import CacheBudget, ImageSide, PromptSide

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
        images = self.images
        labels = images.labels[torch.from_numpy(rows).to(images.labels.device)]
        fewer = ImageSide(images.tower, images.block, images.rows[rows], labels, images.normalize)
        return EvaluationSet(fewer, self.prompts, self.names)

    def ranks(self, features: Tensor, embeddings: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the rank of the true class for the features of `rows` (default: all)."""
        labels = self.images.labels if rows is None else self.images.labels[rows]
        return ranks_of_truth(features @ embeddings.T, labels)


@dataclass(slots=True)
class Evaluation:
    """Everything the search measures on. `forget` holds the images of the concept."""

    model: nn.Module
    vision: SplitTower
    text: SplitTower
    forget: EvaluationSet
    utility: dict[str, EvaluationSet]
    _budget: CacheBudget = field(init=False)

    def base_pass(self, layers: Iterable[str], *, cache_bytes: int, console: Console) -> None:
        """Run the original model once, keeping what edits of `layers` will resume from."""
        self._budget = CacheBudget(cache_bytes)
        stages: dict[bool, set[int]] = {True: set(), False: set()}
        for layer in layers:
            vision = layer.startswith("visual.")
            stages[vision].add((self.vision if vision else self.text).stage_of(layer))
        everything = [self.forget, *self.utility.values()]
        total = sum(len(group.images) for group in everything)
        with torch.no_grad(), console.progress("original model", total) as ticker:
            for prompts in {id(group.prompts): group.prompts for group in everything}.values():
                prompts.base_pass(sorted(stages[False]), self._budget)
            for group in everything:
                for count in group.images.base_pass(sorted(stages[True]), self._budget):
                    ticker.advance(count)

    def tower(self, tower: Tower) -> SplitTower:
        """Return the split form of a tower."""
        return self.vision if tower is Tower.VISION else self.text


def accuracy(ranks: Tensor) -> Accuracy:
    """Return the accuracy that the ranks of the true classes amount to."""
    top1, top5 = accuracies(ranks)
    return Accuracy(top1, top5, int(ranks.numel()))


def prepare(
    store: Store, manifest: SetManifest, model: nn.Module, *, tokenize: Tokenize, device: str
) -> Evaluation:
    """Open the evaluation sets of `manifest` for `model`. Raises InputError without any."""
    if not manifest.evals:
        raise InputError(
            f"set {manifest.name} has nothing to measure on",
            hint=f"run `slsgu build-sets {quote(manifest.name)} ... --eval NAME=SOURCE`",
        )
    vision, text = vision_tower(model), text_tower(model)
    blocks = {name: DataBlock.open(store, ref) for name, ref in sorted(manifest.evals.items())}
    prompts = {name: _prompts(text, block, (), tokenize, device) for name, block in blocks.items()}
    normalize = pixel_normalizer(manifest.input, device)

    def images(block: DataBlock, rows: Ints, labels: Ints) -> ImageSide:
        return ImageSide(vision, block, rows, to_tokens(labels, device), normalize)

    utility, forget = {}, None
    for name, block in blocks.items():
        own = find_class(block.class_names, manifest.concept)
        is_forget = name == manifest.forget_eval
        shows = block.labels == own if is_forget else np.zeros(block.rows, bool)
        kept, gone = np.flatnonzero(~shows), np.flatnonzero(shows)
        if kept.size:
            utility[name] = EvaluationSet(
                images(block, kept, block.labels[kept]), prompts[name], block.class_names
            )
        if is_forget:
            forget = EvaluationSet(
                images(block, gone, block.labels[gone]), prompts[name], block.class_names
            )
    if not utility:
        raise InputError(
            f"the evaluation sets of {manifest.name} show nothing but {manifest.concept!r}, so "
            "what is kept cannot be measured",
            hint=f"add --eval NAME=SOURCE of other classes to `slsgu build-sets "
            f"{quote(manifest.name)}`",
        )
    if forget is None:
        first = next(iter(blocks.values()))
        names = (*first.class_names, manifest.concept)
        block = DataBlock.open(store, manifest.forget)
        rows = np.arange(block.rows)
        forget = EvaluationSet(
            images(block, rows, np.full(block.rows, len(names) - 1)),
            _prompts(text, first, (manifest.concept,), tokenize, device),
            names,
        )
    return Evaluation(model, vision, text, forget, utility)


def _prompts(
    text: SplitTower, block: DataBlock, extra: Sequence[str], tokenize: Tokenize, device: str
) -> PromptSide:
    names = [*block.class_names, *extra]
    texts = [template.replace("{}", name) for name in names for template in block.templates]
    owners = np.repeat(np.arange(len(names)), len(block.templates))
    tokens = to_tokens(tokenize(texts), device)
    return PromptSide(text, tokens, to_tokens(owners, device), len(names))
