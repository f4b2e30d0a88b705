"""The utility of a step, measured until it can no longer be the best."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, isfinite

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slsgu_cli import processes
from slsgu_cli.clip.evaluation import Evaluation, EvaluationSet, class_losses
from slsgu_cli.clip.metrics import margins, ranks_of_truth
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.race import Race, RowDraw
from slsgu_cli.method.scores import Vector
from slsgu_cli.records.method import Measurement, Tower, Trial, TrialKey, UtilityMetric

# Images in a round of a vision trial, at least: measured in full, and in a race.
MIN_ROWS, ROWS_A_ROUND = 16, 32
# Points of utility within which two steps are equally good, and the seed of the order of rows.
TOLERANCE, DRAW_SEED = 0.05, 0
# Rounding error of a sum of fractions.
ROUNDING = 1e-11
# Images whose cosines with all classes are in memory together.
ROWS_AT_ONCE = 8192
# A class with fewer images has no reliable loss.
LEAST_ROWS = 5
# Spread of the margins of similar images, as a fraction of that of the original model's.
SPREAD = 0.5


def expected_hits(leads: Tensor, spread: Tensor | float) -> Tensor:
    """Return the probability that similar images are recognised, fp64: Phi(lead / spread).

    `leads` are the margins of the true class, in cosines. A similar image has the same margin
    with a normal error of that spread.
    """
    hits: Tensor = torch.special.ndtr(leads.double() / spread)
    return hits.nan_to_num(0.0)


def retained_names(group: EvaluationSet, concepts: Iterable[EvaluationSet]) -> Tensor:
    """Return the indices of the classes of a set without those of the concepts."""
    forgotten = {
        int(label)
        for concept in concepts
        if concept.prompts is group.prompts
        for label in concept.labels
    }
    names = [index for index in range(len(group.names)) if index not in forgotten]
    return torch.tensor(names, device=group.images.labels.device)


@dataclass(frozen=True, slots=True)
class Bar:
    """The utility that a step must exceed to be measured in full, in percent.

    A race also stops a step whose utility is at most TOLERANCE above `beat`, with an error
    probability of `risk`; at 0 there is no race. `least` is the lowest `beat` of all races. Rows
    are compared with the original model's, and with those of the trial of a `rival`.
    """

    beat: float = float("-inf")
    least: float = float("-inf")
    risk: float = 0.0
    rival: tuple[Evaluator, Trial] | None = None


@dataclass(slots=True)
class _Original:
    """An evaluation set with the original model: margins and hits of similar images.

    `names` are the indices of the classes to retain.
    """

    group: EvaluationSet
    names: Tensor
    leads: Tensor = field(init=False)
    spread: Tensor = field(init=False)
    hits: Tensor = field(init=False)

    def __post_init__(self) -> None:
        images = self.group.images
        self.leads = margins(images.features @ self.group.prompts.embeddings.T, images.labels)
        self.spread = (SPREAD * self.leads.double().std(correction=0)).clamp(min=1e-6)
        self.hits = expected_hits(self.leads, self.spread)


@dataclass(slots=True)
class _Edited:
    """The images of an evaluation set after an edit, as far as they were evaluated.

    Each has the rank and the margin of its class, and the mean squared change of its cosines
    with the names to retain.
    """

    original: _Original
    ranks: Tensor = field(init=False)
    leads: Tensor = field(init=False)
    changes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = torch.full_like(self.original.group.images.labels, -1)
        self.leads = torch.zeros_like(self.ranks, dtype=torch.float)
        self.changes = torch.zeros_like(self.leads)

    def after_vision_edit(self, rows: Tensor, stage: int) -> None:
        """Evaluate some images, in the order of their rows, which reads fastest."""
        group, rows = self.original.group, rows.sort().values
        self._evaluate(rows, group.images.after_edit(stage, rows), group.prompts.embeddings)

    def after_text_edit(self, classes: Tensor) -> None:
        """Evaluate all images with new class embeddings."""
        images = self.original.group.images
        every = torch.arange(len(images), device=images.labels.device)
        for rows in torch.split(every, ROWS_AT_ONCE):
            self._evaluate(rows, images.features[rows], classes)

    def _evaluate(self, rows: Tensor, features: Tensor, classes: Tensor) -> None:
        group, names = self.original.group, self.original.names
        logits, labels = features @ classes.T, group.images.labels[rows]
        self.leads[rows] = margins(logits, labels)
        self.ranks[rows] = ranks_of_truth(logits, labels)
        before = group.images.features[rows] @ group.prompts.embeddings[names].T
        self.changes[rows] = (logits[:, names] - before).square().mean(dim=1)

    def hits(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return the probabilities that images similar to those of `rows` are recognised."""
        return expected_hits(self.leads[rows], self.original.spread)


@dataclass(slots=True)
class UtilityMeter:
    """Measures the utility of a step, and stops once it cannot reach the best so far.

    `seed` draws the order of rows in races.
    """

    evaluation: Evaluation
    utility: UtilityMetric = UtilityMetric.EXPECTED
    seed: int = DRAW_SEED
    _sets: dict[str, _Original] = field(init=False)
    # The figure of each row after steps that were measured in full, and the draws by rival.
    _row_figures: dict[TrialKey, Vector] = field(init=False, default_factory=dict)
    _draws: dict[TrialKey | None, RowDraw] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        forget = self.evaluation.forget
        self._sets = {
            name: _Original(group, retained_names(group, [forget]))
            for name, group in self.evaluation.utility.items()
        }

    def measure(self, evaluator: Evaluator, trial: Trial, *, bar: Bar | None = None) -> Trial:
        """Return a trial with its utility, or with the reason why its measurement stopped."""
        sets = {name: _Edited(original) for name, original in self._sets.items()}
        bar = bar or Bar()
        raced = bar.risk > 0 and isfinite(bar.beat)
        draw = self._draw_against(bar.rival) if raced else None
        with evaluator.stepped(trial.step) as model:
            if evaluator.tower is Tower.VISION:
                stage = evaluator.stage
                stopped = (
                    self._race(sets, stage, bar, draw) if draw else self._run(sets, stage, bar)
                )
                if stopped:
                    return replace(trial, worst=None, expected=None, measurement=stopped)
                figures = torch.cat([self._figures(each, slice(None)) for each in sets.values()])
                self._row_figures[evaluator.move, trial.step] = processes.agreed(
                    figures.cpu().numpy()
                )
            else:
                for each in sets.values():
                    each.after_text_edit(model.classes(each.original.group.prompts))
        losses, expected, moved = [], [], []
        for each in sets.values():
            original, hits = each.original, each.hits()
            losses += class_losses(original.group, original.hits, hits)
            expected.append(float(hits.mean()))
            moved.append(float(each.changes.double().mean() / original.spread**2))
        losses = [loss for loss in losses if loss.rows >= LEAST_ROWS]
        return replace(
            trial,
            utility={n: each.original.group.accuracy_of(each.ranks) for n, each in sets.items()},
            worst=max(losses, key=lambda loss: loss.lost, default=None),
            expected=100 * sum(expected) / len(expected),
            moved=sum(moved) / len(moved),
            measurement=Measurement.COMPLETE,
        )

    def _run(self, sets: Mapping[str, _Edited], stage: int, bar: Bar) -> Measurement | None:
        """Evaluate the same fraction of every set, the rows that most likely fail first.

        Rows are ordered by the original model's margin, so the measurement of an edit does not
        depend on earlier ones, and a resumed search ends like an uninterrupted one. Each round
        evaluates at least as many rows as would have to fail to rule the step out, and a
        sixteenth of those before it.
        """
        order = {name: torch.argsort(each.leads) for name, each in self._sets.items()}
        least = MIN_ROWS / sum(map(len, order.values()))
        looked, missed = 0.0, 0.0
        while (slack := 1 - missed - max(bar.beat, 0) / 100) >= -ROUNDING:
            if looked >= 1:
                return None
            before, looked = looked, min(1, looked + max(slack, looked / 16, least))
            for name, every in order.items():
                start, stop = (ceil(share * len(every)) for share in (before, looked))
                if start < stop:
                    rows = every[start:stop]
                    sets[name].after_vision_edit(rows, stage)
                    hits = self._figures(sets[name], rows)
                    missed += float((1 - hits).sum()) / len(every) / len(sets)
            missed = processes.agreed(missed)
        return Measurement.RULED_OUT

    def _race(
        self, sets: Mapping[str, _Edited], stage: int, bar: Bar, draw: RowDraw
    ) -> Measurement | None:
        """Evaluate rows of all sets in one random order, the same for all edits with this rival."""
        order, tolerance = draw.order, TOLERANCE / 100
        race = Race(draw, bar.beat / 100 + tolerance, bar.least / 100 + tolerance)
        while race.looked < len(order):
            rows, start = order[race.looked :][: max(ROWS_A_ROUND, race.looked // 8)], 0
            figures = np.zeros(len(rows))
            for each in sets.values():
                size = len(each.leads)
                of_set = (rows >= start) & (rows < start + size)
                chosen = torch.from_numpy(rows[of_set] - start).to(each.leads.device)
                if len(chosen):
                    each.after_vision_edit(chosen, stage)
                    figures[of_set] = self._figures(each, chosen).cpu().numpy()
                start += size
            race.look(processes.agreed(figures))
            if race.missed > 1 - max(bar.beat, 0) / 100 + ROUNDING:
                return Measurement.RULED_OUT
            if race.looked < len(order) and race.lost(bar.risk):
                return Measurement.EARLY_STOPPED
        return None

    def _draw_against(self, rival: tuple[Evaluator, Trial] | None) -> RowDraw:
        """Return the draw of rows against a rival, whose figures are measured if necessary."""
        key = (rival[0].move, rival[1].step) if rival else None
        if key not in self._draws:
            known = [torch.cat([each.hits for each in self._sets.values()]).cpu().numpy()]
            if rival and key:
                if key not in self._row_figures:  # An earlier search recorded the rival.
                    self.measure(*rival)
                known.append(self._row_figures[key])
            sizes = [len(each.leads) for each in self._sets.values()]
            weights = np.concatenate([np.full(size, 1 / size / len(sizes)) for size in sizes])
            self._draws[key] = RowDraw.of(weights, np.stack(known), self._waits())
        return self._draws[key]

    def _waits(self) -> npt.NDArray[np.float64]:
        """Return the waiting time drawn for each row, independent of the rows that are left out.

        So concepts evaluate the same rows first, and share their cached activations.
        """
        waits = []
        for number, each in enumerate(self._sets.values()):
            rows = each.group.images.rows
            drawn = np.random.default_rng([self.seed, number]).exponential(size=rows.max() + 1)
            waits.append(drawn[rows])
        return np.concatenate(waits)

    def _figures(self, edited: _Edited, rows: Tensor | slice) -> Tensor:
        """Return the figure of evaluated rows of a set, in [0, 1]."""
        if self.utility is UtilityMetric.EXPECTED:
            return edited.hits(rows)
        return (edited.ranks[rows] == 0).double()
