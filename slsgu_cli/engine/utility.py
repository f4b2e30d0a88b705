"""The utility of a step, measured until it can no longer be the best."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import ceil, isfinite

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slsgu_cli import processes
from slsgu_cli.clip.evaluation import (
    Evaluation,
    EvaluationSet,
    class_losses,
)
from slsgu_cli.clip.metrics import margins, ranks_of_truth
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.race import Race, RowDraw
from slsgu_cli.method.scores import Vector
from slsgu_cli.records.figures import (
    Accuracy,
    ClassLoss,
)
from slsgu_cli.records.method import (
    Measurement,
    Tower,
    TrialKey,
    UtilityMetric,
)

# Images in a round of a vision trial, at least: measured in full, and in a race.
MIN_ROWS, ROWS_A_ROUND = 16, 32
# Points of utility within which two steps are equally good, and the seed of the order of rows.
TOLERANCE, DRAW_SEED = 0.05, 0
# Rounding error of a sum of fractions.
ROUNDING = 1e-11
# Images whose cosines with all classes are in memory together.
ROWS_AT_ONCE = 8192
# Images that a class needs for its loss to say something.
LEAST_ROWS = 5
# Spread of the margins of similar images, as a fraction of that of the original model's.
SPREAD = 0.5


@dataclass(frozen=True, slots=True)
class StepUtility:
    """The accuracy on each evaluation set after a step, and the class with the largest loss.

    Classes with at least LEAST_ROWS images count, by the expected loss of similar images.
    `expected` and `moved` are as in a trial.
    """

    utility: dict[str, Accuracy]
    worst: ClassLoss | None
    expected: float
    moved: float


def expected_hits(leads: Tensor, spread: Tensor | float) -> Tensor:
    """Return the probability that similar images are recognised, fp64: Phi(lead / spread).

    `leads` are the margins of the true class, in cosines. A similar image has the same margin
    with a normal error of that spread.
    """
    hits: Tensor = torch.special.ndtr(leads.double() / spread)
    return hits.nan_to_num(0.0)


@dataclass(frozen=True, slots=True)
class Bar:
    """The utility that a step must exceed to be measured in full, in percent.

    A race also stops a step whose utility is at most TOLERANCE above `beat`, with an error
    probability of `risk`; at 0 there is no race. `least` is the lowest `beat` of all races. Rows
    are compared with the original model's, and with those of the step of a `rival`.
    """

    beat: float = float("-inf")
    least: float = float("-inf")
    risk: float = 0.0
    rival: tuple[Evaluator, float] | None = None


def names_kept(group: EvaluationSet, concepts: Iterable[EvaluationSet]) -> Tensor:
    """Return the indices of the classes of a set without those of the concepts."""
    forgotten = {int(c.images.labels[0]) for c in concepts if c.prompts is group.prompts}
    names = [index for index in range(len(group.names)) if index not in forgotten]
    return torch.tensor(names, device=group.images.labels.device)


@dataclass(slots=True)
class _Look:
    """The images of all sets after an edit, as far as they were evaluated.

    Each has the rank and the margin of its class, and the mean squared change of its cosines
    with `names` (indices of classes).
    """

    groups: Mapping[str, EvaluationSet]
    names: Mapping[str, Tensor]
    ranks: dict[str, Tensor] = field(init=False)
    leads: dict[str, Tensor] = field(init=False)
    moved: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        labels = {name: group.images.labels for name, group in self.groups.items()}
        self.ranks = {name: torch.full_like(each, -1) for name, each in labels.items()}
        self.leads = {
            name: torch.zeros_like(each, dtype=torch.float) for name, each in labels.items()
        }
        self.moved = {name: each.clone() for name, each in self.leads.items()}

    def after_vision_edit(self, name: str, rows: Tensor, stage: int) -> None:
        """Evaluate some images of a set, in the order of their rows, which reads fastest."""
        group, rows = self.groups[name], rows.sort().values
        self._see(name, rows, group.images.after_edit(stage, rows), group.prompts.embeddings)

    def after_text_edit(self, name: str, classes: Tensor) -> None:
        """Evaluate all images of a set with new class embeddings."""
        images = self.groups[name].images
        places = torch.arange(len(images), device=images.labels.device)
        for rows in torch.split(places, ROWS_AT_ONCE):
            self._see(name, rows, images.features[rows], classes)

    def _see(self, name: str, rows: Tensor, features: Tensor, classes: Tensor) -> None:
        group, kept = self.groups[name], self.names[name]
        logits, labels = features @ classes.T, group.images.labels[rows]
        self.leads[name][rows] = margins(logits, labels)
        self.ranks[name][rows] = ranks_of_truth(logits, labels)
        before = group.images.features[rows] @ group.prompts.embeddings[kept].T
        self.moved[name][rows] = (logits[:, kept] - before).square().mean(dim=1)


@dataclass(slots=True)
class UtilityMeter:
    """Measures the utility of a step, and stops once it cannot reach the best so far.

    `seed` draws the order of rows in races.
    """

    evaluation: Evaluation
    utility: UtilityMetric = UtilityMetric.EXPECTED
    seed: int = DRAW_SEED
    _lead: dict[str, Tensor] = field(init=False, default_factory=dict)
    _spread: dict[str, Tensor] = field(init=False, default_factory=dict)
    _base_hits: dict[str, Tensor] = field(init=False, default_factory=dict)
    _names: dict[str, Tensor] = field(init=False, default_factory=dict)
    # The figure of each row after steps that were measured in full, and the draws by rival.
    _row_figures: dict[TrialKey, Vector] = field(init=False, default_factory=dict)
    _draws: dict[TrialKey | None, RowDraw] = field(init=False, default_factory=dict)

    def measure(
        self, evaluator: Evaluator, step: float, *, bar: Bar | None = None
    ) -> StepUtility | Measurement:
        """Return the utility of a step, or why its measurement stopped."""
        groups, bar = self.evaluation.utility, bar or Bar()
        if not self._lead:
            self._look_at_original()
        look, by_rows = _Look(groups, self._names), self._all_rows
        if bar.risk > 0 and isfinite(bar.beat):
            by_rows = partial(self._race, draw=self._draw_against(bar.rival))
        with evaluator.stepped(step):
            if evaluator.score.tower is Tower.VISION:
                if below := by_rows(look, evaluator.stage, bar):
                    return below
                left = torch.cat([self._figures(look, name, slice(None)) for name in groups])
                self._row_figures[evaluator.move, step] = processes.agreed(left.cpu().numpy())
            else:
                for name, group in groups.items():
                    look.after_text_edit(name, evaluator.class_embeddings(group.prompts, step))
        hits = {name: self._hits(name, each) for name, each in look.leads.items()}
        moved = [
            float(each.double().mean() / self._spread[name] ** 2)
            for name, each in look.moved.items()
        ]
        losses = [
            loss
            for name, group in groups.items()
            for loss in class_losses(group, self._base_hits[name], hits[name])
            if loss.rows >= LEAST_ROWS
        ]
        return StepUtility(
            {name: groups[name].accuracy_of(each) for name, each in look.ranks.items()},
            max(losses, key=lambda loss: loss.lost, default=None),
            100 * sum(float(each.mean()) for each in hits.values()) / len(hits),
            sum(moved) / len(moved),
        )

    def _look_at_original(self) -> None:
        for name, group in self.evaluation.utility.items():
            logits = group.images.features @ group.prompts.embeddings.T
            self._lead[name] = leads = margins(logits, group.images.labels)
            self._spread[name] = (SPREAD * leads.double().std(correction=0)).clamp(min=1e-6)
            self._base_hits[name] = self._hits(name, leads)
            self._names[name] = names_kept(group, [self.evaluation.forget])

    def _hits(self, name: str, leads: Tensor) -> Tensor:
        return expected_hits(leads, self._spread[name])

    def _all_rows(self, look: _Look, stage: int, bar: Bar) -> Measurement | None:
        """Evaluate the same fraction of every set, the rows that most likely fail first.

        Rows are ordered by the original model's margin, so the measurement of an edit does not
        depend on earlier ones, and a resumed search ends like an uninterrupted one. Each round
        evaluates at least as many rows as would have to fail to rule the step out, and a
        sixteenth of those before it.
        """
        order = {name: torch.argsort(lead) for name, lead in self._lead.items()}
        sizes = {name: len(rows) for name, rows in order.items()}
        least = MIN_ROWS / sum(sizes.values())
        looked, missed = 0.0, 0.0
        while (slack := 1 - missed - max(bar.beat, 0) / 100) >= -ROUNDING:
            if looked >= 1:
                return None
            before, looked = looked, min(1, looked + max(slack, looked / 16, least))
            for name, size in sizes.items():
                start, stop = (ceil(share * size) for share in (before, looked))
                if start < stop:
                    rows = order[name][start:stop]
                    look.after_vision_edit(name, rows, stage)
                    hits = self._figures(look, name, rows)
                    missed += float((1 - hits).sum()) / size / len(sizes)
            missed = processes.agreed(missed)
        return Measurement.RULED_OUT

    def _race(self, look: _Look, stage: int, bar: Bar, *, draw: RowDraw) -> Measurement | None:
        """Evaluate rows of all sets in one random order, the same for all edits with this rival."""
        sizes = {name: len(lead) for name, lead in self._lead.items()}
        order, tolerance = draw.order, TOLERANCE / 100
        race = Race(draw, bar.beat / 100 + tolerance, bar.least / 100 + tolerance)
        while race.looked < len(order):
            rows, start = order[race.looked :][: max(ROWS_A_ROUND, race.looked // 8)], 0
            figures = np.zeros(len(rows))
            for name, size in sizes.items():
                of_set = (rows >= start) & (rows < start + size)
                chosen = torch.from_numpy(rows[of_set] - start).to(self._lead[name].device)
                if len(chosen):
                    look.after_vision_edit(name, chosen, stage)
                    figures[of_set] = self._figures(look, name, chosen).cpu().numpy()
                start += size
            race.look(processes.agreed(figures))
            if race.missed > 1 - max(bar.beat, 0) / 100 + ROUNDING:
                return Measurement.RULED_OUT
            if race.looked < len(order) and race.lost(bar.risk):
                return Measurement.EARLY_STOPPED
        return None

    def _draw_against(self, rival: tuple[Evaluator, float] | None) -> RowDraw:
        """Return the draw of rows against a rival, whose figures are measured if necessary."""
        key = (rival[0].move, rival[1]) if rival else None
        if key not in self._draws:
            known = [torch.cat(list(self._base_hits.values())).cpu().numpy()]
            if rival and key:
                if key not in self._row_figures:  # It is on file, by an earlier search.
                    self.measure(*rival)
                known.append(self._row_figures[key])
            sizes = [len(lead) for lead in self._lead.values()]
            weights = np.concatenate([np.full(size, 1 / size / len(sizes)) for size in sizes])
            self._draws[key] = RowDraw.of(weights, np.stack(known), self._waits())
        return self._draws[key]

    def _waits(self) -> npt.NDArray[np.float64]:
        """Return the waiting time drawn for each row, independent of the rows that are left out.

        So concepts evaluate the same rows first, and share their cached activations.
        """
        waits = []
        for number, group in enumerate(self.evaluation.utility.values()):
            rows = group.images.rows
            drawn = np.random.default_rng([self.seed, number]).exponential(size=rows.max() + 1)
            waits.append(drawn[rows])
        return np.concatenate(waits)

    def _figures(self, look: _Look, name: str, rows: Tensor | slice) -> Tensor:
        """Return the figure of evaluated rows of a set, in [0, 1]."""
        if self.utility is UtilityMetric.EXPECTED:
            return self._hits(name, look.leads[name][rows])
        return (look.ranks[name][rows] == 0).double()
