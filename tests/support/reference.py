"""The plain core on the data of a world: figures by whole forwards, and the paper's search."""

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from math import erf, sqrt

import numpy as np
import open_clip
import torch

from slsgu_cli.engine.utility import LEAST_ROWS, SPREAD
from slsgu_cli.method.edits import LayerEdit
from slsgu_cli.method.evaluation import LabelledImages, accuracy
from slsgu_cli.method.scores import norm
from slsgu_cli.method.step_search import best, bisection, first_step
from slsgu_cli.records.method import Criterion, UtilityMetric
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock


@dataclass(frozen=True)
class Figures:
    """Accuracies in percent as (top-1, top-5), of the concept and of each evaluation set.

    `margins` has the margin of the true class for each set's images, `labels` the true class.
    """

    forget: tuple[float, float]
    utility: dict[str, tuple[float, float]]
    margins: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]

    def residual(self, criterion: Criterion) -> float:
        return self.forget[criterion is Criterion.FA5]

    def mean(self) -> float:
        return sum(top1 for top1, _ in self.utility.values()) / len(self.utility)

    def expected(self, original: "Figures") -> float:
        """Return the expected TA@1 of images whose margins have a normal error."""
        means = [100 * np.mean(hits) for hits in self._hits(original).values()]
        return float(np.mean(means))

    def largest_loss(self, original: "Figures") -> float:
        """Return the largest loss of a class with enough images."""
        before, after = original._hits(original), self._hits(original)
        return max(
            100 * (np.mean(before[name][labels == each]) - np.mean(after[name][labels == each]))
            for name, labels in self.labels.items()
            for each in set(labels)
            if (labels == each).sum() >= LEAST_ROWS
        )

    def _hits(self, original: "Figures") -> dict[str, np.ndarray]:
        hits = {}
        for name, margins in self.margins.items():
            spread = SPREAD * np.std(original.margins[name])
            hits[name] = np.array([(1 + erf(m / spread / sqrt(2))) / 2 for m in margins])
        return hits


@dataclass(frozen=True)
class Tried:
    """A step of a layer, and the figures of the model with it."""

    layer: str
    step: float
    figures: Figures


@dataclass
class Reference:
    """A model and the evaluation data of a world."""

    world: object
    model: torch.nn.Module = None
    known: dict = field(default_factory=dict)

    def __post_init__(self):
        self.manifest = self.world.manifest
        identifier = self.world.model.name
        self.model = self.model or open_clip.create_model(identifier).eval()
        self.tokenize = open_clip.get_tokenizer(identifier)
        self.blocks = {
            name: DataBlock.open(self.world.store, ref)
            for name, ref in sorted(self.manifest.evals.items())
        }

    @cached_property
    def gradient(self):
        return self.world.store.read_tensors(Artifact.GRADIENT.path(self.world.pointer.forget))

    def figures(self) -> Figures:
        """Classify every image with the current weights."""
        concept = self.manifest.concept
        utility, margins, others, forget = {}, {}, {}, None
        for name, block in self.blocks.items():
            labels = np.asarray(block.labels)
            ranks, lead = self._classified(block, block.class_names, block, labels)
            shows = labels == -2
            if name == self.manifest.forget_eval:
                shows = labels == block.class_names.index(concept)
                forget = both(ranks[shows])
            utility[name] = both(ranks[~shows])
            margins[name] = lead[~shows]
            others[name] = labels[~shows]
        if forget is None:
            first = next(iter(self.blocks.values()))
            block = DataBlock.open(self.world.store, self.manifest.forget)
            names = [*first.class_names, concept]
            labels = np.full(block.rows, len(names) - 1)
            forget = both(self._classified(block, names, first, labels)[0])
        return Figures(forget, utility, margins, others)

    @cached_property
    def original(self) -> Figures:
        """The figures of the original model."""
        return self.figures()

    def after(self, layer: str, step: float) -> Figures:
        """Return the figures after a step along the forget gradient."""
        _ = self.original
        if (layer, step) not in self.known:
            weight = self.model.get_parameter(layer).detach().clone()
            with LayerEdit(layer, step, torch.from_numpy(self.gradient[layer]), weight).in_place(
                self.model
            ):
                self.known[layer, step] = self.figures()
        return self.known[layer, step]

    def algorithm3(self, layer: str, steps: int, criterion: Criterion) -> list[Tried]:
        """Return the trials of one layer in order."""

        def measure(step: float) -> Tried:
            return Tried(layer, step, self.after(layer, step))

        weight = norm(self.model.get_parameter(layer).detach().numpy())
        first = first_step(weight, norm(self.gradient[layer]))
        trials = bisection(measure, lambda tried: tried.figures.residual(criterion), first)
        return list(islice(trials, steps))

    def algorithm1(
        self,
        layers: list[str],
        steps: int,
        criterion: Criterion,
        utility: UtilityMetric = UtilityMetric.TA1,
    ) -> tuple[list[Tried], Tried]:
        """Return all trials, and the best."""
        trials = [tried for layer in layers for tried in self.algorithm3(layer, steps, criterion)]
        if utility is UtilityMetric.TA1:
            figure = Figures.mean
        else:
            figure = partial(Figures.expected, original=self.original)
        figures = [(tried.figures.residual(criterion), figure(tried.figures)) for tried in trials]
        return trials, trials[best(figures)]

    def _classified(self, block, names, prompts, labels) -> tuple[torch.Tensor, np.ndarray]:
        """Return the rank and the margin of the true class for a block's images."""
        images = labelled(self, block, names, prompts, labels)
        cosines = images.cosines(self.model)
        return images.ranks(cosines), margins_of(cosines.numpy(), labels)


def labelled(reference, block, names, prompts, labels) -> LabelledImages:
    """Return the preprocessed images of a block, and prompts for some names."""
    spec = reference.manifest.input
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
    pixels = torch.from_numpy(block.images(0, block.rows)).permute(0, 3, 1, 2) / 255
    texts = [template.format(name) for name in names for template in prompts.templates]
    tokens = reference.tokenize(texts).unflatten(0, (len(names), len(prompts.templates)))
    return LabelledImages((pixels - mean) / std, torch.as_tensor(labels), tokens)


def figures_without(world, model, names):
    """Return (FA by set, TA by evaluation set) by plain forwards, without the concepts' images."""
    forget, kept = {}, {}
    worlds = [replace(world, name=name) for name in names]
    for own in worlds:
        forget[own.name] = Reference(own, model).figures().forget
    reference = Reference(worlds[0], model)
    for name, block in reference.blocks.items():
        labels = np.asarray(block.labels)
        ranks, _ = reference._classified(block, block.class_names, block, labels)
        gone = [block.class_names.index(n) for n in names if n in block.class_names]
        kept[name] = both(ranks[~np.isin(labels, gone)])
    return forget, kept


def margins_of(cosines: np.ndarray, labels) -> np.ndarray:
    """Return the lead of the true class over the best other one, for each row."""
    rows = np.arange(len(cosines))
    others = cosines.copy()
    others[rows, labels] = -np.inf
    return cosines[rows, labels] - others.max(1)


def both(ranks: torch.Tensor) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy in percent."""
    return accuracy(ranks), accuracy(ranks, 5)
