"""Searches over steps with given margins: nothing runs, and the rows looked at are counted.

Each step gives the margins of all images of some sets. All images have the same true class, so
a margin is their cosine with it.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

from slsgu_cli.clip.evaluation import EvaluationSet
from slsgu_cli.engine.choice import utility_of
from slsgu_cli.engine.edited_model import UNEDITED
from slsgu_cli.engine.layer_search import LayerSearch
from slsgu_cli.engine.utility import UtilityMeter
from slsgu_cli.records.directions import FALLBACK
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import Tower, Trial, UtilityMetric
from slsgu_cli.records.options import SearchOptions

Margins = Mapping[str, torch.Tensor]


@dataclass
class Images:
    """Images of a set, with the margins under the current step."""

    world: "GivenFigures"
    name: str
    block = SimpleNamespace(has_images=True)

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
    """An evaluation with the margins of the original model and of each step.

    `rows` numbers the images of a set; `seen` has those that were looked at.
    """

    original: Margins
    steps: Sequence[Margins]
    towers: Sequence[Tower] = ()
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    looked: int = 0
    seen: set[tuple[str, int]] = field(default_factory=set)
    placed: Margins | None = None
    utility: dict[str, EvaluationSet] = field(init=False)
    # The concept is not among the classes.
    forget: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(prompts=None, of_prompts=False)
    )

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
        """Return the chosen step, and the search, which starts with the recorded `trials`.

        `seed` determines the order of rows.
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
        """Return the utility of each step, in percent."""
        meter = UtilityMeter(self, utility)
        return [
            utility_of(meter.measure(evaluator, evaluator.measure(1.0)), utility)
            for evaluator in self.evaluators()
        ]

    def evaluators(self):
        return [Given(self, index) for index in range(len(self.steps))]


@dataclass
class Given:
    """One of the given steps; it forgets."""

    world: GivenFigures
    index: int

    def __post_init__(self):
        self.move = f"layer {self.index}", FALLBACK
        tower = self.world.towers[self.index] if self.world.towers else Tower.VISION
        self.tower, self.stage = tower, 0

    def measure(self, step):
        return Trial(
            layer=self.move[0],
            tower=self.tower,
            direction=FALLBACK,
            step=step,
            share=float(self.index + 1),
            forget=Accuracy(0.0, 0.0, 8),
            gap=0.1,
            utility=None,
        )

    @contextmanager
    def stepped(self, step):
        self.world.placed = self.world.steps[self.index]
        yield UNEDITED
        self.world.placed = None


def made_up(seed: int, *, steps=8, sizes=(300, 900)) -> GivenFigures:
    """Return steps that harm different images: few or many, certain or uncertain ones."""
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
                # Those that the original model is most certain of.
                rows = margins >= margins.quantile(1 - hurt)
            left[name] = torch.where(rows, -margins.abs(), moved)
        after.append(left)
    return GivenFigures(original, after)
