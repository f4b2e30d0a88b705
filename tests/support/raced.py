"""Searches of steps whose figures are given: nothing runs, and what is looked at is counted.

Each step says what margins it leaves, of all images of some sets. One class is the true one of
all of them, so a margin is the cosine with it.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

from slsgu_cli.clip.evaluation import EvaluationSet
from slsgu_cli.engine.choice import utility_of
from slsgu_cli.engine.layer_search import LayerSearch
from slsgu_cli.engine.utility import UtilityMeter
from slsgu_cli.records.directions import FALLBACK
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import Tower, Trial, UtilityMetric
from slsgu_cli.records.options import SearchOptions

Margins = Mapping[str, torch.Tensor]


@dataclass
class Images:
    """Images of a set, by the margins that the step in place leaves them."""

    world: "GivenFigures"
    name: str

    def __post_init__(self):
        self.labels = torch.zeros(len(self), dtype=torch.long)
        self.rows = self.world.rows.get(self.name, np.arange(len(self)))

    def __len__(self):
        return len(self.world.original[self.name])

    @property
    def features(self):
        margins = (self.world.placed or self.world.original)[self.name]
        return torch.stack([margins, torch.zeros_like(margins)], dim=1)

    def after_edit(self, stage, rows):
        self.world.looked += len(rows)
        self.world.seen.update((self.name, row) for row in self.rows[rows.numpy()].tolist())
        return self.features[rows]


@dataclass(eq=False)
class GivenFigures:
    """An evaluation with the margins of the original model, and steps with theirs.

    `rows` are what the images of a set are called, by its name; `seen` those looked at.
    """

    original: Margins
    steps: Sequence[Margins]
    towers: Sequence[Tower] = ()
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    looked: int = 0
    seen: set[tuple[str, int]] = field(default_factory=set)
    placed: Margins | None = None
    utility: dict[str, EvaluationSet] = field(init=False)
    # The concept is none of the classes.
    forget: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(prompts=None))

    def __post_init__(self):
        prompts = SimpleNamespace(embeddings=torch.eye(2))
        self.utility = {
            name: EvaluationSet(Images(self, name), prompts, ("this", "that"))
            for name in self.original
        }

    def base_gap(self):
        return -1.0

    def without(self, left_out: Mapping[str, np.ndarray]) -> "GivenFigures":
        """Return the same figures without some rows of each set."""
        kept = {n: np.setdiff1d(np.arange(len(m)), left_out[n]) for n, m in self.original.items()}
        parts = [{n: m[kept[n]] for n, m in each.items()} for each in (self.original, *self.steps)]
        return GivenFigures(parts[0], parts[1:], self.towers, kept)

    def searched(self, *, seed=0, trials=(), **options) -> tuple[Trial, LayerSearch]:
        """Return the step that is chosen, and the search, which goes on with `trials` on file.

        One draw of rows is that of `seed`.
        """
        self.looked = 0
        search = LayerSearch(trials, self, SearchOptions(**options))
        search._meter.seed = seed
        for index in range(len(self.steps)):
            evaluator = Given(self, index)
            search.evaluators[evaluator.move] = evaluator
            search.trial(evaluator, 1.0)
            search.path.append((evaluator.move, 1.0))
        return search.choose(), search

    def keeps(self, utility=UtilityMetric.EXPECTED) -> list[float]:
        """Return what each step keeps, in percent."""
        meter = UtilityMeter(self, utility)
        every = [(evaluator, meter.measure(evaluator, 1.0)) for evaluator in self.evaluators()]
        return [
            utility_of(evaluator.measure(1.0, found.utility, found.expected), utility)
            for evaluator, found in every
        ]

    def evaluators(self):
        return [Given(self, index) for index in range(len(self.steps))]


@dataclass
class Given:
    """A step of those given, which forgets."""

    world: GivenFigures
    index: int

    def __post_init__(self):
        self.move = f"layer {self.index}", FALLBACK
        tower = self.world.towers[self.index] if self.world.towers else Tower.VISION
        self.score, self.stage = SimpleNamespace(tower=tower), 0

    def measure(self, step, utility=None, expected=None):
        return Trial(
            layer=self.move[0],
            tower=self.score.tower,
            direction=FALLBACK,
            step=step,
            share=float(self.index + 1),
            forget=Accuracy(0.0, 0.0, 8),
            gap=0.1,
            utility=utility,
            expected=expected,
        )

    @contextmanager
    def stepped(self, step):
        self.world.placed = self.world.steps[self.index]
        yield
        self.world.placed = None

    def class_embeddings(self, prompts, step):
        return prompts.embeddings


def made_up(seed: int, *, steps=8, sizes=(300, 900)) -> GivenFigures:
    """Return steps that harm images of many kinds: few or many, certain or uncertain ones."""
    draw = torch.Generator().manual_seed(seed)

    def normal(count):
        return torch.randn(count, generator=draw)

    def share():
        return float(torch.rand((), generator=draw))

    names = [f"set {index}" for index in range(len(sizes))]
    level = 1.5 * share()
    original = {name: level + normal(size) for name, size in zip(names, sizes, strict=True)}
    after = []
    for index in range(steps):
        shift, spread, hurt = 0.3 * share() ** 2, 0.3 * share(), 0.1 * share() ** 2
        left = {}
        for name, margins in original.items():
            moved = margins - shift + spread * normal(len(margins))
            rows = torch.rand(len(margins), generator=draw) < hurt
            if index % 3 == 0:
                # Those that the original model was most certain of.
                rows = margins >= margins.quantile(1 - hurt)
            left[name] = torch.where(rows, -margins.abs(), moved)
        after.append(left)
    return GivenFigures(original, after)
