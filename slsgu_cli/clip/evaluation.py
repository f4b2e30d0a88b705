"""The evaluation of a model on a set: forget accuracy and utility.

The forget images are the rows of one evaluation set that show the concept; they do not count
for the utility on that set. Several concepts can share the model, its evaluation sets and its
base pass. `rows_for` splits rows into validation and test rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from shlex import quote

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.clip.activations import CacheBudget
from slsgu_cli.clip.batches import Pixels, pixel_normalizer, to_tokens
from slsgu_cli.clip.finite import naming_layers, require_finite_elsewhere
from slsgu_cli.clip.metrics import (
    TOP,
    accuracies,
    as_one_class,
    class_accuracies,
    gaps,
    ranks_of_truth,
)
from slsgu_cli.clip.tokenizers import Tokenize
from slsgu_cli.clip.towers import SplitTower, text_tower, vision_tower
from slsgu_cli.clip.zeroshot import ImageSide, PromptSide
from slsgu_cli.errors import InputError
from slsgu_cli.records.figures import Accuracy, ClassLoss
from slsgu_cli.records.method import Tower
from slsgu_cli.records.sets import SetManifest, Split
from slsgu_cli.sources.prompts import find_classes
from slsgu_cli.store.blocks import DataBlock, JoinedRows
from slsgu_cli.store.store import Store

Ints = npt.NDArray[np.integer]

# With fewer validation images of the concept, images of the forget set join them: a step that
# forgets a few images need not forget others.
ENOUGH_TO_CHOOSE = 12

# A prompt is forgotten once one n-th of all names is nearer than its own.
PROMPTS_BEHIND = 5

# One n-th of the cache budget is for the images of the concept under search.
CONCEPT_SHARE = 8


@dataclass(slots=True)
class EvaluationSet:
    """Images and the classes of their zero-shot classification; `names` are those classes.

    With `is_test`, these are test images: no layer or step was chosen by them. The classes of
    `as_one`, if there are several, count as one: those of a concept of many words.
    """

    images: ImageSide
    prompts: PromptSide
    names: tuple[str, ...]
    is_test: bool = False
    as_one: Tensor | None = None

    def base_accuracy(self) -> Accuracy:
        """Return the accuracy of the original model."""
        return self.accuracy(self.images.features, self.prompts.embeddings)

    def accuracy(self, features: Tensor, embeddings: Tensor) -> Accuracy:
        """Return the accuracy on all images, from features of images and classes."""
        return self.accuracy_of(ranks_of_truth(self.cosines(features, embeddings), self.labels))

    def cosines(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Return the cosines of features (rows, width) with class embeddings (names, width)."""
        cosines = features @ embeddings.T
        return cosines if self.as_one is None else as_one_class(cosines, self.labels, self.as_one)

    def gaps(self, cosines: Tensor) -> Tensor:
        """Return the gap of each image to the fifth name.

        A prompt is forgotten sooner than images are, so its gap is to the last of the nearest
        fifth of all names.
        """
        top = max(TOP, len(self.names) // PROMPTS_BEHIND) if self.of_prompts else TOP
        return gaps(cosines, self.labels, top)

    def least_gap(self, cosines: Tensor) -> float:
        """Return the smallest of the `gaps`."""
        return float(self.gaps(cosines).min())

    @property
    def labels(self) -> Tensor:
        """The class of each image."""
        return self.images.labels

    def accuracy_of(self, ranks: Tensor) -> Accuracy:
        """Return the accuracy from the ranks of the true classes."""
        top1, top5 = accuracies(ranks)
        return Accuracy(top1, top5, int(ranks.numel()), self.is_test, self.of_prompts)

    @property
    def of_prompts(self) -> bool:
        """Whether prompts stand in for images."""
        return not self.images.block.has_images

    def base_ranks(self) -> Tensor:
        """Return the rank of the true class of every image, by the original model."""
        logits = self.cosines(self.images.features, self.prompts.embeddings)
        return ranks_of_truth(logits, self.labels)

    def some(self, rows: Ints) -> "EvaluationSet":
        """Return the set with some of its images."""
        return replace(self, images=self.images.some(rows))


@dataclass(slots=True)
class _Measured:
    """A model in split form, and its evaluation data."""

    model: nn.Module
    vision: SplitTower
    text: SplitTower

    def groups(self) -> tuple[list[EvaluationSet], list[EvaluationSet]]:
        """Return the concepts' images, which every trial runs, and all others.

        The others share the cache that the former leave.
        """
        raise NotImplementedError

    def base_pass(self, layers: Iterable[str], *, cache_bytes: int) -> None:
        """Run the original model once; cache what edits of `layers` resume from."""
        budget, (concepts, others), names = CacheBudget(cache_bytes), self.groups(), list(layers)
        groups = [*concepts, *others]
        total, waiting = (sum(len(group.images) for group in part) for part in (groups, others))
        vision = self.stages(names, Tower.VISION)
        with (
            torch.no_grad(),
            progress.bar("original model", total) as ticker,
            naming_layers(self.model),
        ):
            for prompts in {id(group.prompts): group.prompts for group in groups}.values():
                prompts.base_pass(self.stages(names, Tower.TEXT), budget)
            for group in concepts:
                for count in group.images.base_pass(vision, budget):
                    ticker.advance(count)
            for group in others:
                share = len(group.images) / waiting
                waiting -= len(group.images)
                classes = group.prompts.embeddings
                for count in group.images.base_pass(vision, budget, classes, share):
                    ticker.advance(count)
            require_finite_elsewhere(self.model, self.text.token_table)

    def stages(self, layers: Iterable[str], tower: Tower) -> Counter[int]:
        """Return the first stages of layers of a tower, each with its number of layers."""
        of_tower = (name for name in layers if Layer.parse(name).tower is tower)
        return Counter(self.tower(tower).stage_of(name) for name in of_tower)

    def tower(self, tower: Tower) -> SplitTower:
        """Return the split form of a tower."""
        return self.vision if tower is Tower.VISION else self.text


@dataclass(slots=True)
class Evaluation(_Measured):
    """The evaluation data of one concept. `forget` holds the images of the concept."""

    forget: EvaluationSet
    utility: dict[str, EvaluationSet]

    def groups(self) -> tuple[list[EvaluationSet], list[EvaluationSet]]:
        """Return the concept's images, and all others."""
        return [self.forget], list(self.utility.values())

    def base_gap(self) -> float:
        """Return the smallest gap of the original model on the images of the concept."""
        forget = self.forget
        return forget.least_gap(forget.cosines(forget.images.features, forget.prompts.embeddings))


@dataclass(slots=True)
class SharedEvaluation(_Measured):
    """A model and the evaluation sets that several concepts share.

    `sets` have all their rows. `forget` maps the name of each concept's set to its images. They
    are a part of one of `sets`, or the forget set itself if no evaluation set has the concept. A
    few validation images are joined by images of the forget set.
    """

    sets: dict[str, EvaluationSet]
    forget: dict[str, EvaluationSet]
    # The stages that edits of a concept resume from, and the bytes to cache for its images.
    _resumed: tuple[Mapping[int, int], int] = field(init=False, default_factory=lambda: ({}, 0))

    def groups(self) -> tuple[list[EvaluationSet], list[EvaluationSet]]:
        """Return no concept's images, since each search runs them again, and all images."""
        return [], list(self.sets.values())

    def base_pass(self, layers: Iterable[str], *, cache_bytes: int) -> None:
        """Run the original model once, also over concepts' images that are in no evaluation set."""
        names, concepts = list(layers), cache_bytes // CONCEPT_SHARE
        _Measured.base_pass(self, names, cache_bytes=cache_bytes - concepts)
        self._resumed = self.stages(names, Tower.VISION), concepts
        groups = list(self.forget.values())
        of_sets = {id(group.prompts) for group in self.sets.values()}
        others = {id(g.prompts): g.prompts for g in groups if id(g.prompts) not in of_sets}
        with torch.no_grad(), naming_layers(self.model):
            for prompts in others.values():
                prompts.base_pass(self.stages(names, Tower.TEXT), CacheBudget(concepts))
            for group in groups:
                parts = (group.images.part_of(each.images) for each in self.sets.values())
                part = next((part for part in parts if part is not None), None)
                if part is not None:
                    group.images = part
                    continue
                for _ in group.images.base_pass({}, CacheBudget(0)):
                    pass

    def release(self) -> None:
        """Drop the cached activations of all evaluation sets."""
        for group in self.sets.values():
            group.images.release()
            group.prompts.release()

    def of(
        self, manifest: SetManifest, *, earlier: Sequence[SetManifest] = (), resumed: bool = False
    ) -> Evaluation:
        """Return the evaluation of one concept; concepts of `earlier` sets do not count.

        With `resumed`, cache the activations that edits resume from for the concept's images.
        Raises InputError.
        """
        forget, utility = self.forget[manifest.name], self.utility([manifest, *earlier])
        stages, size = self._resumed
        if resumed and stages and size:
            forget = replace(forget, images=replace(forget.images))
            with torch.no_grad():
                for _ in forget.images.base_pass(stages, CacheBudget(size)):
                    pass
        return Evaluation(self.model, self.vision, self.text, forget, utility)

    def utility(self, manifests: Sequence[SetManifest]) -> dict[str, EvaluationSet]:
        """Return the sets without the images that show any of the concepts. Raises InputError."""
        others = {}
        for name, group in self.sets.items():
            shown = np.zeros(len(group.images), bool)
            for manifest in manifests:
                shown |= _shown(name, group, manifest)
            if not shown.all():
                others[name] = group.some(np.flatnonzero(~shown))
        if not others:
            names = " and ".join(manifest.name for manifest in manifests)
            concepts = " and ".join(repr(manifest.concept) for manifest in manifests)
            raise InputError(
                f"the evaluation sets of {names} show nothing but {concepts}, so "
                "utility cannot be measured",
                hint=f"add --eval NAME=SOURCE of other classes to `slsgu build-sets "
                f"{quote(manifests[0].name)}`",
            )
        return others


def by_nearness(
    sets: Mapping[str, EvaluationSet],
    concept: Tensor,
    classes: Callable[[PromptSide], Tensor] = attrgetter("embeddings"),
) -> list[tuple[float, str, int]]:
    """Return (cosine, evaluation set, index) of every class, nearest to the concept first.

    The cosine is between the embeddings of the class, from `classes`, and the concept. Ties are
    sorted by name.
    """
    cosines = [
        (cosine, name, index)
        for name, group in sets.items()
        for index, cosine in enumerate((classes(group.prompts) @ concept).tolist())
    ]
    return sorted(cosines, key=lambda each: (-each[0], sets[each[1]].names[each[2]]))


def class_losses(group: EvaluationSet, before: Tensor, after: Tensor) -> list[ClassLoss]:
    """Return the accuracy each class with images lost, largest loss first, ties by name.

    `before` and `after` say whether, or how likely, each of the group's images is a hit.
    """
    labels, classes = group.images.labels, len(group.names)
    was, rows = class_accuracies(before, labels, classes)
    now, _ = class_accuracies(after, labels, classes)
    figures = zip(group.names, rows.tolist(), was.tolist(), now.tolist(), strict=True)
    losses = [ClassLoss(*each) for each in figures if each[1]]
    return sorted(losses, key=lambda loss: (-loss.lost, loss.name))


def prepare(
    store: Store,
    manifest: SetManifest,
    model: nn.Module,
    *,
    tokenize: Tokenize,
    device: str,
    split: Split = Split.TEST,
) -> Evaluation:
    """Open the evaluation sets of `manifest` for `model`. Raises InputError without any."""
    shared = prepare_shared(store, [manifest], model, tokenize=tokenize, device=device, split=split)
    return shared.of(manifest)


def prepare_shared(
    store: Store,
    manifests: Sequence[SetManifest],
    model: nn.Module,
    *,
    tokenize: Tokenize,
    device: str,
    split: Split = Split.TEST,
) -> SharedEvaluation:
    """Open the evaluation sets of `manifests`, which must be the same for all.

    Raises InputError without any.
    """
    first = manifests[0]
    if not first.evals:
        raise InputError(
            f"set {first.name} has nothing to measure on",
            hint=f"run `slsgu build-sets {quote(first.name)} ... --eval NAME=SOURCE`",
        )
    opening = _Opening(store, first, model, tokenize, device, split)
    sets = {name: opening.evaluation_set(name) for name in sorted(first.evals)}
    forget = {manifest.name: opening.concept(manifest, sets) for manifest in manifests}
    return SharedEvaluation(model, opening.vision, opening.text, sets, forget)


@dataclass(slots=True)
class _Opening:
    """Opens evaluation sets for a model and one split."""

    store: Store
    manifest: SetManifest
    model: nn.Module
    tokenize: Tokenize
    device: str
    split: Split
    vision: SplitTower = field(init=False)
    text: SplitTower = field(init=False)
    normalize: Pixels = field(init=False)

    def __post_init__(self) -> None:
        self.vision, self.text = vision_tower(self.model), text_tower(self.model)
        self.normalize = pixel_normalizer(self.manifest.input, self.device)

    def evaluation_set(self, name: str) -> EvaluationSet:
        """Return an evaluation set with the rows of the split."""
        named = DataBlock.open(self.store, self.manifest.evals[name])
        prompts = self.prompts(named, named.class_names)
        block, rows, is_test = serving_rows(self.store, self.manifest, name, self.split)
        images = self.images(block, rows, block.labels[rows])
        return EvaluationSet(images, prompts, named.class_names, is_test)

    def concept(self, manifest: SetManifest, sets: Mapping[str, EvaluationSet]) -> EvaluationSet:
        """Return the images of a concept in the split.

        If there are too few to split, both splits have all of them. If no evaluation set has the
        concept, both have the forget set's images. Images of the forget set, drawn by seed,
        join a validation split of fewer than ENOUGH_TO_CHOOSE images.
        """
        shown = concept_rows(self.store, manifest, self.split)
        if shown is None or manifest.forget_eval is None:
            prompted = DataBlock.open(self.store, self.manifest.evals[min(sets)])
            others = len(prompted.class_names)
            names = (*prompted.class_names, *manifest.names)
            block = DataBlock.open(self.store, manifest.forget)
            images = self.images(block, np.arange(block.rows), np.full(block.rows, others))
            as_one = self.as_one(range(others, len(names)))
            return EvaluationSet(images, self.prompts(prompted, names), names, as_one=as_one)
        block, rows, is_test = shown
        group, labels = sets[manifest.forget_eval], block.labels[rows]
        few = self.split is Split.VALIDATION and len(rows) < ENOUGH_TO_CHOOSE
        own = DataBlock.open(self.store, manifest.forget)
        if few and own.has_images and concept_is_split(self.store, manifest):
            order = np.random.default_rng(manifest.seed).permutation(own.rows)
            drawn = np.sort(order[: ENOUGH_TO_CHOOSE - len(rows)])
            joined = JoinedRows(((block, rows), (own, drawn)))
            labels = np.full(joined.rows, labels[0])
            images = self.images(joined, np.arange(joined.rows), labels)
        else:
            images = self.images(block, rows, labels)
        as_one = self.as_one(find_classes(group.names, manifest.names))
        return EvaluationSet(images, group.prompts, group.names, is_test, as_one)

    def as_one(self, classes: Sequence[int]) -> Tensor | None:
        """Return the classes of a concept if there are several."""
        return to_tokens(np.asarray(classes), self.device) if len(classes) > 1 else None

    def images(self, block: DataBlock | JoinedRows, rows: Ints, labels: Ints) -> ImageSide:
        """Return some rows of a block as images with labels."""
        labelled = to_tokens(labels, self.device)
        return ImageSide(self.vision, block, rows, labelled, self.normalize)

    def prompts(self, block: DataBlock, names: tuple[str, ...]) -> PromptSide:
        """Return the prompts of some classes, by the templates of a block."""
        return prompt_side(
            self.text, names, block.templates, tokenize=self.tokenize, device=self.device
        )


def rows_for(split: Split, manifest: SetManifest, name: str, labels: Ints) -> tuple[Ints, bool]:
    """Return the rows of evaluation set `name` in a split, and whether these are test rows.

    `labels` are those of the set, or of its test rows if these have a source of their own. Each
    class is split by the test fraction, drawn by seed; both splits get at least one row of a class
    of two rows or more. Without a test fraction, both splits have all rows.
    """
    every = np.arange(len(labels))
    if name in manifest.tests:
        return every, split is Split.TEST
    in_test = in_test_split(labels, manifest.test_fraction, manifest.seed)
    if not in_test.any() or in_test.all():
        return every, False
    return np.flatnonzero(in_test if split is Split.TEST else ~in_test), split is Split.TEST


def serving_rows(
    store: Store, manifest: SetManifest, name: str, split: Split
) -> tuple[DataBlock, Ints, bool]:
    """Return the block of evaluation set `name`, its rows in a split, and if they are test rows."""
    ref = manifest.evals[name]
    if split is Split.TEST:
        ref = manifest.tests.get(name, ref)
    block = DataBlock.open(store, ref)
    return block, *rows_for(split, manifest, name, block.labels)


def concept_rows(
    store: Store, manifest: SetManifest, split: Split
) -> tuple[DataBlock, Ints, bool] | None:
    """Return the block and rows of the concept in a split, and if they are test rows.

    None if no evaluation set contains the concept. Too few rows to split are in both splits.
    """
    name = manifest.forget_eval
    if name is None:
        return None
    block = DataBlock.open(store, manifest.evals[name])
    classes = find_classes(block.class_names, manifest.names)
    rows: Ints = np.arange(block.rows)
    is_test = False
    if concept_is_split(store, manifest):
        block, rows, is_test = serving_rows(store, manifest, name, split)
    return block, rows[np.isin(block.labels[rows], classes)], is_test


def in_test_split(labels: Ints, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return the mask of test rows: `share` of each class, drawn by seed."""
    in_test = np.zeros(len(labels), bool)
    if not share:
        return in_test
    for label in np.unique(labels):
        rng = np.random.default_rng([seed, int(label) + 1])
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = int(share * len(rows) + rng.random())
        if len(rows) > 1:
            count = min(max(count, 1), len(rows) - 1)
        in_test[rows[:count]] = True
    return in_test


def concept_is_split(store: Store, manifest: SetManifest) -> bool:
    """Return whether the concept has both validation and test images."""
    name = manifest.forget_eval
    if name is None:
        return False
    block = DataBlock.open(store, manifest.evals[name])
    classes = find_classes(block.class_names, manifest.names)
    if name in manifest.tests:
        return bool(np.isin(DataBlock.open(store, manifest.tests[name]).labels, classes).any())
    in_test = in_test_split(block.labels, manifest.test_fraction, manifest.seed)
    shown = np.isin(block.labels, classes)
    return bool((shown & in_test).any() and (shown & ~in_test).any())


def _shown(name: str, group: EvaluationSet, manifest: SetManifest) -> npt.NDArray[np.bool_]:
    """Return the mask of rows in evaluation set `name` that show a concept."""
    labels = group.images.labels.cpu().numpy()
    if manifest.forget_eval != name:
        return np.zeros(len(labels), bool)
    return np.isin(labels, find_classes(group.names, manifest.names))


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
