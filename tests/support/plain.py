"""The search of the paper, written plainly: a reference for the tests.

Every figure comes from open_clip's own forward over all images and all prompts at full
length, with the model as it is; nothing is kept, shared or left out.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import erf, sqrt

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from slsgu_cli.method.trial import LEAST_ROWS, SPREAD
from slsgu_cli.records.method import Criterion, UtilityMetric
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock


@dataclass(frozen=True)
class Figures:
    """Accuracies in percent as (top-1, top-5): of the concept, and of each evaluation set.

    `margins` are those of the true class of each set's images, `labels` say which that is.
    """

    forget: tuple[float, float]
    utility: dict[str, tuple[float, float]]
    margins: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]

    def mean(self) -> float:
        return sum(top1 for top1, _ in self.utility.values()) / len(self.utility)

    def expected(self, original: "Figures") -> float:
        """Return the TA@1 expected of like images, each with a normal error of its margin."""
        means = [100 * np.mean(hits) for hits in self._hits(original).values()]
        return float(np.mean(means))

    def largest_loss(self, original: "Figures") -> float:
        """Return what the class lost that lost most of it, of classes with enough images."""
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


@dataclass
class Plain:
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
        """Classify every image as the model is now."""
        concept = self.manifest.concept
        utility, margins, others, forget = {}, {}, {}, None
        for name, block in self.blocks.items():
            labels = block.labels
            logits = self._logits(block, block.class_names, block)
            ranks = ranks_of(logits, labels)
            shows = labels == -2
            if name == self.manifest.forget_eval:
                shows = labels == block.class_names.index(concept)
                forget = accuracy(ranks[shows])
            utility[name] = accuracy(ranks[~shows])
            margins[name] = margins_of(logits, labels)[~shows]
            others[name] = np.asarray(labels)[~shows]
        if forget is None:
            first = next(iter(self.blocks.values()))
            block = DataBlock.open(self.world.store, self.manifest.forget)
            names = [*first.class_names, concept]
            labels = np.full(block.rows, len(names) - 1)
            forget = accuracy(ranks_of(self._logits(block, names, first), labels))
        return Figures(forget, utility, margins, others)

    @cached_property
    def original(self) -> Figures:
        """The figures of the model as it is at first."""
        return self.figures()

    def after(self, layer: str, step: float) -> Figures:
        """Return the figures after a step of ascent along the forget gradient."""
        _ = self.original
        if (layer, step) not in self.known:
            parameter = self.model.get_parameter(layer)
            original = parameter.data.clone()
            parameter.data.add_(torch.from_numpy(self.gradient[layer]), alpha=step)
            self.known[layer, step] = self.figures()
            parameter.data.copy_(original)
        return self.known[layer, step]

    def algorithm3(
        self, layer: str, steps: int, criterion: Criterion
    ) -> list[tuple[float, Figures]]:
        """Return the steps tried on one layer, in order, with all figures."""
        weight = self.model.get_parameter(layer).data.double().norm().item()
        step = 0.1 * weight / np.linalg.norm(self.gradient[layer].astype(float)).item()
        low, high, tried = 0.0, None, []
        for _ in range(steps):
            found = self.after(layer, step)
            tried.append((step, found))
            if found.forget[criterion is Criterion.FA5] == 0:
                high = step
            else:
                low = step
            step = step * 2 if high is None else (low + high) / 2
        return tried

    def algorithm1(
        self,
        layers: list[str],
        steps: int,
        criterion: Criterion,
        utility: UtilityMetric = UtilityMetric.TA1,
    ):
        """Return every (layer, step, figures), and the best of them."""

        def kept(figures: Figures) -> float:
            by_count = utility is UtilityMetric.TA1
            return figures.mean() if by_count else figures.expected(self.original)

        trials = [
            (layer, step, found)
            for layer in layers
            for step, found in self.algorithm3(layer, steps, criterion)
        ]
        chosen = trials[0]
        for trial in trials[1:]:
            new, best = (t[2].forget[criterion is Criterion.FA5] for t in (trial, chosen))
            if new < best or (new == best and kept(trial[2]) > kept(chosen[2])):
                chosen = trial
        return trials, chosen

    @torch.no_grad()
    def _logits(self, block, names, prompts):
        spec = self.manifest.input
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
        pixels = torch.from_numpy(block.images(0, block.rows)).permute(0, 3, 1, 2) / 255
        v = self.model.encode_image((pixels - mean) / std, normalize=True)
        texts = [template.format(name) for name in names for template in prompts.templates]
        t = self.model.encode_text(self.tokenize(texts), normalize=True)
        means = F.normalize(t.reshape(len(names), -1, t.shape[1]).mean(1), dim=-1)
        return (v @ means.T).numpy()


def figures_without(world, model, names):
    """Return (FA by set, TA by evaluation set) by plain forwards, without the concepts' images."""
    forget, kept = {}, {}
    worlds = [replace(world, name=name) for name in names]
    for own in worlds:
        forget[own.name] = Plain(own, model).figures().forget
    plain = Plain(worlds[0], model)
    for name, block in plain.blocks.items():
        labels = block.labels
        ranks = ranks_of(plain._logits(block, block.class_names, block), labels)
        gone = [block.class_names.index(n) for n in names if n in block.class_names]
        others = ranks[~np.isin(labels, gone)]
        kept[name] = tuple(100 * float(np.mean(others < k)) for k in (1, 5))
    return forget, kept


def ranks_of(logits: np.ndarray, labels) -> np.ndarray:
    """Return for each row how many classes come before the true one."""
    order = np.argsort(-logits, axis=1, kind="stable")
    return (order == np.asarray(labels)[:, None]).argmax(1)


def margins_of(logits: np.ndarray, labels) -> np.ndarray:
    """Return for each row by how much the true class leads the best other one."""
    rows = np.arange(len(logits))
    others = logits.copy()
    others[rows, labels] = -np.inf
    return logits[rows, labels] - others.max(1)


def accuracy(ranks: np.ndarray) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy in percent."""
    return tuple(100 * float(np.mean(ranks < k)) for k in (1, 5))
