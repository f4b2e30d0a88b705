"""Steps measured: one move of one layer, or several in place together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import ceil, isfinite

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli.checkpoints.edits import (
    Edit,
    by_layer,
    edit_digests,
    moved_values,
    original_values,
    recognised,
)
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.clip import processes
from slsgu_cli.clip.evaluation import (
    Evaluation,
    EvaluationSet,
    SharedEvaluation,
    by_nearness,
    class_losses,
)
from slsgu_cli.clip.zeroshot import (
    ImageSide,
    PromptSide,
    counted_by,
    edited,
    least_gap,
    margins,
    moved,
    ranks_of_truth,
)
from slsgu_cli.errors import NotFiniteError, StaleError
from slsgu_cli.method.scoring import Draw, Race, Vector, first_step, left_of, norm
from slsgu_cli.records.figures import (
    Accuracy,
    ClassLoss,
    EarlierEdit,
    Figures,
    Ground,
    Report,
    harmed,
)
from slsgu_cli.records.method import (
    Criterion,
    Key,
    LayerScore,
    Line,
    Settled,
    Tower,
    Trial,
    UtilityMetric,
)
from slsgu_cli.store.artifacts import set_of

# A vision trial's images are looked at in rounds of at least this many, or when it is raced.
MIN_ROWS, ROWS_A_ROUND = 16, 32
# Points of what is kept below which two steps are as good, and the seed of the order of rows.
TOLERANCE, DRAW_SEED = 0.05, 0
# By how much a sum of shares may be off.
ROUNDING = 1e-11
# Images whose cosines with all classes are in memory at once.
ROWS_AT_ONCE = 8192
# Of fewer images than this, what a class loses says little.
LEAST_ROWS = 5
# By how much margins of like images differ, as a share of how much the original's differ.
SPREAD = 0.5


@dataclass(slots=True)
class Probe:
    """A move on the CLIP: one layer, its original values and the direction it moves in.

    `damping` is what whitened the direction, None for the gradient itself.
    """

    evaluation: Evaluation
    score: LayerScore
    direction: Tensor
    damping: float | None = None
    weight: Tensor = field(init=False)
    norm: float = field(init=False)
    stage: int = field(init=False)
    _embeddings: dict[float, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        layer = Layer.parse(self.score.layer)
        self.weight = layer.rows(processes.whole(self.evaluation.model, layer.parameter))
        self.stage = self.evaluation.tower(self.score.tower).stage_of(self.score.layer)
        self.norm = norm(self.direction.cpu().numpy())
        if not isfinite(self.norm):
            raise NotFiniteError(
                f"the direction of {self.score.layer} is not finite: a gradient it is made from "
                "is damaged",
                hint="remove that gradient from the store and run `slsgu grad` again",
            )

    @property
    def line(self) -> Line:
        """The layer and the damping, which tell its trials from those of other moves."""
        return self.score.layer, self.damping

    @property
    def first(self) -> float:
        """The first step to try."""
        return first_step(self.score.weight_norm, self.norm)

    @contextmanager
    def stepped(self, step: float) -> Iterator[None]:
        """Take a step for the length of a block; a positive one ascends the forget loss."""
        values = torch.add(self.weight, self.direction, alpha=step)
        with (
            counted_by(f"{self.score.layer} at step {step:.4g}"),
            edited(self.evaluation.model, self.score.layer, values),
        ):
            yield

    def measure(self, step: float) -> Trial:
        """Return how well the concept is still recognised after a step; utility is left out."""
        forget, logits = self.evaluation.forget, self._forget_logits(step)
        labels = forget.images.labels
        return Trial(
            layer=self.score.layer,
            tower=self.score.tower,
            damping=self.damping,
            step=step,
            share=step * self.norm / self.score.weight_norm,
            forget=forget.accuracy_of(ranks_of_truth(logits, labels)),
            gap=least_gap(logits, labels),
            utility=None,
        )

    def _forget_logits(self, step: float) -> Tensor:
        """Return the cosines of the forget images with all names after a step."""
        images, prompts = self.evaluation.forget.images, self.evaluation.forget.prompts
        with self.stepped(step):
            if self.score.tower is Tower.VISION:
                return images.after_edit(self.stage) @ prompts.embeddings.T
            embeddings = self._embeddings[step] = prompts.after_edit(self.stage)
        return images.features @ embeddings.T

    def class_embeddings(self, prompts: PromptSide, step: float) -> Tensor:
        """Return the classes after a step of a text layer, which must be in place."""
        if prompts is self.evaluation.forget.prompts and step in self._embeddings:
            return self._embeddings[step]
        return prompts.after_edit(self.stage)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a step keeps: the accuracy on each evaluation set, and the class that lost most.

    Of classes, those with at least LEAST_ROWS count, by what like images lose. `expected` and
    `moved` are as a trial has them.
    """

    utility: dict[str, Accuracy]
    worst: ClassLoss | None
    expected: float
    moved: float


def expected_hits(leads: Tensor, spread: Tensor | float) -> Tensor:
    """Return how likely images like these are recognised, fp64: Phi(lead / spread).

    `leads` are the margins of the true class, in cosines. An image like another one is taken
    to have its margin but for a normal error of that spread.
    """
    hits: Tensor = torch.special.ndtr(leads.double() / spread)
    return hits.nan_to_num(0.0)


@dataclass(frozen=True, slots=True)
class Bar:
    """What a step must keep to be measured to the end, in percent.

    A step that is raced is also left where it keeps no more than TOLERANCE above `beat`, but
    for a chance of `risk`. `least` is the lowest `beat` of all steps that are raced; a risk of
    0 races none. Rows are compared with what the original model makes of them, and with what
    the step of a `rival` does.
    """

    beat: float = float("-inf")
    least: float = float("-inf")
    risk: float = 0.0
    rival: tuple[Probe, float] | None = None


def names_kept(group: EvaluationSet, concepts: Iterable[EvaluationSet]) -> Tensor:
    """Return the indices of the classes of a set that none of the concepts is."""
    forgotten = {int(c.images.labels[0]) for c in concepts if c.prompts is group.prompts}
    names = [index for index in range(len(group.names)) if index not in forgotten]
    return torch.tensor(names, device=group.images.labels.device)


@dataclass(slots=True)
class _Look:
    """The images of all sets as an edit leaves them, as far as they were looked at.

    Of each there are the rank and the margin of its class, and the mean square of how far its
    cosines with `names` (indices of classes) moved.
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
        """Look at some images of a set, which are read fastest in the order of their rows."""
        group, rows = self.groups[name], rows.sort().values
        self._see(name, rows, group.images.after_edit(stage, rows), group.prompts.embeddings)

    def after_text_edit(self, name: str, classes: Tensor) -> None:
        """Look at all images of a set, whose classes are others now."""
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
    """Measures what a step keeps, and stops where it can no longer reach the best so far.

    `keep` says which figure that is reached in, `seed` draws the order of rows in races.
    """

    evaluation: Evaluation
    utility: UtilityMetric = UtilityMetric.EXPECTED
    seed: int = DRAW_SEED
    _lead: dict[str, Tensor] = field(init=False, default_factory=dict)
    _spread: dict[str, Tensor] = field(init=False, default_factory=dict)
    _base_hits: dict[str, Tensor] = field(init=False, default_factory=dict)
    _names: dict[str, Tensor] = field(init=False, default_factory=dict)
    # What steps that were measured to the end left of each row, and the draws beside them.
    _left: dict[Key, Vector] = field(init=False, default_factory=dict)
    _draws: dict[Key | None, Draw] = field(init=False, default_factory=dict)

    def measure(self, probe: Probe, step: float, *, bar: Bar | None = None) -> Kept | Settled:
        """Return what a step keeps; by what it is known to be too little, once it is."""
        groups, bar = self.evaluation.utility, bar or Bar()
        if not self._lead:
            self._look_at_original()
        look, by_rows = _Look(groups, self._names), self._all_rows
        if bar.risk > 0 and isfinite(bar.beat):
            by_rows = partial(self._race, draw=self._drawn_beside(bar.rival))
        with probe.stepped(step):
            if probe.score.tower is Tower.VISION:
                if below := by_rows(look, probe.stage, bar):
                    return below
                left = torch.cat([self._figures(look, name, slice(None)) for name in groups])
                self._left[probe.line, step] = processes.agreed(left.cpu().numpy())
            else:
                for name, group in groups.items():
                    look.after_text_edit(name, probe.class_embeddings(group.prompts, step))
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
        return Kept(
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

    def _all_rows(self, look: _Look, stage: int, bar: Bar) -> Settled | None:
        """Look at the same share of every set, the rows most likely missed first.

        The guess is the margin by which the true class led by the original model: what is
        measured of an edit does not depend on which others were before it, so a search that
        goes on with trials on file ends as one that ran through. Each round looks at no fewer
        rows than could show the misses that are wanting, nor than a sixteenth of those before
        it.
        """
        order = {name: torch.argsort(lead) for name, lead in self._lead.items()}
        sizes = {name: len(rows) for name, rows in order.items()}
        least = MIN_ROWS / sum(sizes.values())
        looked, missed = 0.0, 0.0
        while (wanting := 1 - missed - max(bar.beat, 0) / 100) >= -ROUNDING:
            if looked >= 1:
                return None
            before, looked = looked, min(1, looked + max(wanting, looked / 16, least))
            for name, size in sizes.items():
                start, stop = (ceil(share * size) for share in (before, looked))
                if start < stop:
                    rows = order[name][start:stop]
                    look.after_vision_edit(name, rows, stage)
                    hits = self._figures(look, name, rows)
                    missed += float((1 - hits).sum()) / size / len(sizes)
            missed = processes.agreed(missed)
        return Settled.BOUND

    def _race(self, look: _Look, stage: int, bar: Bar, *, draw: Draw) -> Settled | None:
        """Look at rows of all sets in one random order, the same for every edit beside a rival."""
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
                return Settled.BOUND
            if race.looked < len(order) and race.lost(bar.risk):
                return Settled.RACE
        return None

    def _drawn_beside(self, rival: tuple[Probe, float] | None) -> Draw:
        """Return the draw of rows beside a rival, whose figures are measured if they were not."""
        key = (rival[0].line, rival[1]) if rival else None
        if key not in self._draws:
            known = [torch.cat(list(self._base_hits.values())).cpu().numpy()]
            if rival and key:
                if key not in self._left:  # It is on file, by an earlier search.
                    self.measure(*rival)
                known.append(self._left[key])
            sizes = [len(lead) for lead in self._lead.values()]
            weights = np.concatenate([np.full(size, 1 / size / len(sizes)) for size in sizes])
            self._draws[key] = Draw.of(weights, np.stack(known), self._waits())
        return self._draws[key]

    def _waits(self) -> npt.NDArray[np.float64]:
        """Return what is drawn for each row, alike for concepts that leave out other rows.

        Of the rows that one has looked at another then finds what enters its layers.
        """
        waits = []
        for number, group in enumerate(self.evaluation.utility.values()):
            rows = group.images.rows
            drawn = np.random.default_rng([self.seed, number]).exponential(size=rows.max() + 1)
            waits.append(drawn[rows])
        return np.concatenate(waits)

    def _figures(self, look: _Look, name: str, rows: Tensor | slice) -> Tensor:
        """Return what the rows of a set that were looked at count for, in [0, 1]."""
        if self.utility is UtilityMetric.EXPECTED:
            return self._hits(name, look.leads[name][rows])
        return (look.ranks[name][rows] == 0).double()


Moves = Sequence[tuple[Probe, float]]


@dataclass(frozen=True, slots=True)
class MovedModel:
    """The model with several moves in place; what they leave as it was is not run again.

    Features and class embeddings are computed from the first stage of each tower that any
    of the moves acts in; those of a tower that none moves are the original model's.
    """

    stages: Mapping[Tower, int]
    embeddings: dict[int, Tensor]

    def accuracies(self, groups: Mapping[str, EvaluationSet]) -> dict[str, Accuracy]:
        """Return the accuracy on each set."""
        return {
            name: group.accuracy(self.features(group.images), self.classes(group.prompts))
            for name, group in groups.items()
        }

    def left(self, group: EvaluationSet) -> tuple[Accuracy, float]:
        """Return the accuracy on the images of a concept, and the concept's gap."""
        logits, labels = self.cosines(group)
        return group.accuracy_of(ranks_of_truth(logits, labels)), least_gap(logits, labels)

    def cosines(self, group: EvaluationSet) -> tuple[Tensor, Tensor]:
        """Return the cosines of images with all names, and the label of each."""
        return self.features(group.images) @ self.classes(group.prompts).T, group.images.labels

    def features(self, images: ImageSide) -> Tensor:
        """Return the features of images."""
        stage = self.stages.get(Tower.VISION)
        return images.features if stage is None else images.after_edit(stage)

    def classes(self, prompts: PromptSide) -> Tensor:
        """Return the class embeddings of prompts."""
        stage = self.stages.get(Tower.TEXT)
        if stage is None:
            return prompts.embeddings
        if id(prompts) not in self.embeddings:
            self.embeddings[id(prompts)] = prompts.after_edit(stage)
        return self.embeddings[id(prompts)]


# The model with its weights as they were when the base pass ran.
UNMOVED = MovedModel({}, {})


# Classes that a report names: those harmed most, and those with the nearest names.
NAMED = 20


@dataclass(frozen=True, slots=True)
class EarlierConcepts:
    """The concepts of edits that the model of an evaluation has in it."""

    evaluation: SharedEvaluation
    edits: Sequence[Edit]

    def returned(self, moves: Moves) -> list[str]:
        """Return the edits whose concept some moves bring back, by what each was searched for."""
        before = self._left(UNMOVED)
        with moved_model(self.evaluation, moves) as model:
            after = self._left(model)
        return [name for name in before if after[name] > before[name]]

    def recognised(self, model: MovedModel) -> dict[str, Accuracy]:
        """Return how well each concept is recognised, by the name of its edit."""
        forget = self.evaluation.forget
        names = [edit.header.name for edit in self.edits]
        return {name: model.left(forget[set_of(name)])[0] for name in names}

    def _left(self, model: MovedModel) -> dict[str, float]:
        left = {}
        for header in (edit.header for edit in self.edits):
            accuracy, gap = model.left(self.evaluation.forget[set_of(header.name)])
            criterion = header.criterion or Criterion.FA1
            left[header.name] = left_of(accuracy, gap, criterion, header.margin or 0.0)
        return left

    @contextmanager
    def undone(self) -> Iterator[MovedModel]:
        """Give the edited layers their original values for the length of a block."""
        model = self.evaluation.model
        with ExitStack() as stack:
            for name, group in by_layer(self.edits).items():
                values = torch.from_numpy(original_values(group)).float()
                device = model.get_parameter(Layer.parse(name).parameter).device
                stack.enter_context(edited(model, name, values.to(device)))
            yield model_with(self.evaluation, self.edits)


def model_with(evaluation: Evaluation | SharedEvaluation, edits: Iterable[Edit]) -> MovedModel:
    """Return the model of an evaluation while layers of some edits have other values."""
    headers = [edit.header for edit in edits]
    return MovedModel(
        _first_stages((h.tower, evaluation.tower(h.tower).stage_of(h.layer)) for h in headers), {}
    )


def _first_stages(places: Iterable[tuple[Tower, int]]) -> dict[Tower, int]:
    """Return the first stage of each tower among some."""
    stages: dict[Tower, int] = {}
    for tower, stage in places:
        stages[tower] = min(stages.get(tower, stage), stage)
    return stages


def add_edits(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Move the layers of edits to what `apply` makes of them in fp32.

    Raises StaleError where a layer is not the one that an edit was made for.
    """
    for name, values, group in fitting(model, edits):
        layer = Layer.parse(name)
        deltas = [(edit.factor, edit.delta()) for edit in group]
        new = torch.from_numpy(moved_values(values, deltas, "F32")[0])
        new = new.to(model.get_parameter(layer.parameter).device)
        processes.exchange(model, layer.parameter, partial(layer.replaced, new=new))


def fitting(model: nn.Module, edits: Sequence[Edit]) -> list[tuple[str, Floats, list[Edit]]]:
    """Return the layers of edits with their values in a model and the edits of each.

    Raises StaleError where a layer is not the one that an edit was made for.
    """
    parameters = {name for name, _ in model.named_parameters()}
    layers = []
    for name, group in by_layer(edits).items():
        layer = Layer.parse(name)
        values = None
        if layer.parameter in parameters:
            values = layer.rows(processes.whole(model, layer.parameter).cpu().numpy())
        others = [
            edit.header
            for edit in group
            if values is None or not recognised(values, "F32", edit.header.digests)
        ]
        if values is None or others:
            raise StaleError(
                f"the edit {others[0].name} was made for another {name} than this model has",
                hint=f"use it with sets built for {others[0].model}",
            )
        layers.append((name, values, group))
    return layers


def report(
    evaluation: Evaluation, moves: Moves | MovedModel, earlier: EarlierConcepts | None = None
) -> Report:
    """Return what moves in place together do to the rows of an evaluation, after its base pass.

    They are put in place, or are there already. With `earlier` edits in the model, it stands
    beside the original one without them.
    """
    groups = {"": evaluation.forget} | evaluation.utility

    def ranks(model: MovedModel) -> dict[str, Tensor]:
        return {
            name: group.ranks(model.features(group.images), model.classes(group.prompts))
            for name, group in groups.items()
        }

    as_it_was = ranks(UNMOVED)
    placed: AbstractContextManager[MovedModel] = (
        nullcontext(moves) if isinstance(moves, MovedModel) else moved_model(evaluation, moves)
    )
    with placed as model:
        after = ranks(model)
        earlier_after = earlier.recognised(model) if earlier else {}
    with earlier.undone() if earlier else nullcontext(UNMOVED) as model:
        before = ranks(model) if earlier else as_it_was
        earlier_original = earlier.recognised(model) if earlier else {}
        wanted = model.classes(evaluation.forget.prompts)[int(evaluation.forget.images.labels[0])]
        nearness = by_nearness(evaluation.utility, wanted, model.classes)

    def figures(ranks: Mapping[str, Tensor]) -> Figures:
        kept = {name: groups[name].accuracy_of(each) for name, each in ranks.items()}
        return Figures(kept.pop(""), kept)

    losses = {
        (name, loss.name): loss
        for name, group in evaluation.utility.items()
        for loss in class_losses(group, before[name] == 0, after[name] == 0)
    }
    named = [(name, groups[name].names[i]) for _, name, i in nearness]
    nearest = [losses[key] for key in named if key in losses]
    most = harmed(losses.values())[:NAMED]
    ground = None
    if earlier:
        earlier_before = earlier.recognised(UNMOVED)
        of_edits = {
            name: EarlierEdit(
                made, earlier_original[name], earlier_before[name], earlier_after[name]
            )
            for name, made in edit_digests(earlier.edits).items()
        }
        ground = Ground(of_edits, figures(as_it_was))
    return Report(figures(before), figures(after), tuple(most), tuple(nearest[:NAMED]), ground)


@contextmanager
def moved_model(evaluation: Evaluation | SharedEvaluation, moves: Moves) -> Iterator[MovedModel]:
    """Put several moves into the model for the length of a block."""
    stages = _first_stages((probe.score.tower, probe.stage) for probe, _ in moves)
    changes = ((probe.score.layer, probe.direction, step) for probe, step in moves)
    label = ", ".join(f"{probe.score.layer} at step {step:.4g}" for probe, step in moves)
    with counted_by(label), moved(evaluation.model, changes):
        yield MovedModel(stages, {})
