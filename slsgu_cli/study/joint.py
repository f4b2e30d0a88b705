"""`search --joint`: forget several concepts together, with balanced step sizes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from shlex import join
from typing import Self

import numpy as np
import torch
from torch import Tensor

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import write_edit
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.clip.evaluation import EvaluationSet, SharedEvaluation
from slsgu_cli.clip.in_place import changed_values
from slsgu_cli.clip.metrics import margins, ranks_of_truth
from slsgu_cli.engine.choice import residual, utility_of
from slsgu_cli.engine.edited_model import UNEDITED, EditedModel, edited_model
from slsgu_cli.engine.effect import class_effects
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.gradient_pass import arithmetic
from slsgu_cli.engine.plots import write_plots
from slsgu_cli.engine.search import SetSearch, searched_edit
from slsgu_cli.engine.search_plan import (
    SearchPlan,
    read_plans,
    report_evaluation,
    require_alike,
    share_evaluation,
)
from slsgu_cli.engine.shown_classes import ShownClasses, choose_shown
from slsgu_cli.engine.utility import SPREAD, expected_hits, retained_names
from slsgu_cli.errors import NotForgottenError, UsageError
from slsgu_cli.figures.curves import several_plot
from slsgu_cli.figures.pictures import CosineMap, cosine_maps
from slsgu_cli.records.codec import digest
from slsgu_cli.records.figures import Figures, Report
from slsgu_cli.records.method import Criterion, JointRef, Tower, Trial, Trials
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.sets import FORGET
from slsgu_cli.records.studies import JointMove, JointSearch, JointTrial
from slsgu_cli.store.artifacts import Artifact, joint_label, resume
from slsgu_cli.store.store import Store
from slsgu_cli.study.balanced_steps import RAISE, BalancedSteps
from slsgu_cli.text import listed

# Rounds of balancing for each of `--steps`.
ROUNDS = 2
# Balancing ends when the cost falls by less than this share in PATIENCE rounds, or after
# WORSE rounds without an improvement.
SETTLED, PATIENCE, WORSE = 0.02, 3, 6
# The cost of moving cosines of retained images by as much as similar images differ.
PRICE_OF_MOVING = 0.1
# The retained images of a set in the cost, if each has to be run again.
RETAINED_IMAGES = 256
# The least spread of margins among similar images, as cosines.
LEAST_SPREAD = 1e-6
# With more concepts, only the first and the last cosine map are drawn, and stages have
# 1, 2, 5, 10, 20, 50, ... and all concepts.
MOST_MAPS = 10
Moves = tuple[JointMove, ...]


@dataclass(frozen=True, slots=True)
class JointConcept:
    """A concept with its own search, and the layer and direction of its part of the edit.

    `alone` is the shortest step in that direction that forgets the concept, or the best trial
    if none does.
    """

    plan: SearchPlan
    record: Trials
    evaluator: Evaluator
    alone: Trial

    def move(self, step: float) -> JointMove:
        """Return the concept's part of a joint edit for a step."""
        alone = self.alone
        share = alone.share * step / alone.step
        return JointMove(self.plan.name, alone.layer, alone.tower, alone.direction, step, share)


def search_alone(store: Store, plan: SearchPlan, shared: SharedEvaluation) -> JointConcept:
    """Search for one concept alone, and choose its layer and direction in the joint edit.

    Choose those with the lowest cost at their shortest forgetting step, overshoot included. One
    edit hardly costs any accuracy, but the effects of many on retained images add up.
    """
    evaluation, options = shared.of(plan.manifest, resumed=True), plan.options
    worth = {}
    with SetSearch(store, Artifact.TRIALS, plan, evaluation) as run:
        for evaluator in plan.evaluators(store, evaluation):
            run.along(evaluator)
        for move, evaluator in run.evaluators.items():
            if (step := run.shortest(move)) is not None:
                trial = run.trials[run.key(move, run.overshoot * step)]
                if trial.moved is None:
                    trial = run.with_utility(evaluator, replace(trial, utility=None))
                moved = 100 * PRICE_OF_MOVING * (trial.moved or 0.0)
                worth[move, step] = utility_of(trial, options.utility) - moved, -trial.share
        alone = run.trials[max(worth, key=lambda key: worth[key])] if worth else run.choose()
    # Another evaluation releases the cached activations of this search.
    evaluator = replace(run.evaluators[alone.move], evaluation=shared.of(plan.manifest))
    return JointConcept(plan, run.record, evaluator, alone)


@dataclass(frozen=True, slots=True)
class RetainedImages:
    """Images of an evaluation set to retain, and their figures with the original model.

    `hits` are the probabilities that similar images are recognised, `cosines` those with the
    retained `names` (indices of classes).
    """

    group: EvaluationSet
    names: Tensor
    hits: Tensor
    cosines: Tensor


@dataclass(slots=True)
class JointCost:
    """The cost that balances steps: recognised images of concepts, and lost retained images.

    The sum of three means: over concepts, the expected share of a concept's images that are
    recognised by the first or the first five guesses; over evaluation sets, the expected share
    of retained images that are lost, without gains; and over these, PRICE_OF_MOVING times the
    mean square move of the cosines of retained images with retained names. Expectations are
    over similar images, whose margins differ by `spread`, which is also the unit of moves.

    If images move, not only names, `retained` has RETAINED_IMAGES of each set.
    """

    options: SearchOptions
    spread: float
    retained: tuple[RetainedImages, ...]

    @classmethod
    def of(
        cls,
        evaluation: SharedEvaluation,
        concepts: Mapping[str, JointConcept],
        options: SearchOptions,
    ) -> Self:
        """Return the cost of moves of some concepts."""
        sets = evaluation.utility([each.plan.manifest for each in concepts.values()])
        if any(each.alone.tower is Tower.VISION for each in concepts.values()):
            # RETAINED_IMAGES of each set, evenly spaced.
            for name, group in sets.items():
                rows = np.linspace(0, len(group.images) - 1, RETAINED_IMAGES).round().astype(int)
                sets[name] = group.some(np.unique(rows))
        leads = [margins(*UNEDITED.cosines(group)) for group in sets.values()]
        deviations = [float(each.double().std(correction=0)) for each in leads]
        spread = max(SPREAD * sum(deviations) / len(deviations), LEAST_SPREAD)
        retained = []
        for group, lead in zip(sets.values(), leads, strict=True):
            names = retained_names(group, evaluation.forget.values())
            cosines = UNEDITED.cosines(group)[0][:, names]
            retained.append(RetainedImages(group, names, expected_hits(lead, spread), cosines))
        return cls(options, spread, tuple(retained))

    def recognised(self, group: EvaluationSet, logits: Tensor) -> Tensor:
        """Return the expected share of a concept's images that are recognised."""
        if self.options.criterion is Criterion.FA1:
            leads = margins(logits, group.labels)
        else:
            leads = -group.gaps(logits)
        if self.options.criterion is Criterion.MARGIN:
            leads = leads + self.options.margin
        return expected_hits(leads, self.spread).mean()

    def of_retained(self, model: EditedModel) -> Tensor:
        """Return the cost of the moves in place on retained images."""
        return torch.stack([self._of(model, images) for images in self.retained]).mean()

    def _of(self, model: EditedModel, images: RetainedImages) -> Tensor:
        logits, labels = model.cosines(images.group)
        lost = (images.hits - expected_hits(margins(logits, labels), self.spread)).clamp(min=0)
        moved = (logits[:, images.names] - images.cosines).double() / self.spread
        return lost.mean() + PRICE_OF_MOVING * moved.square().mean()


@dataclass(slots=True)
class JointSearchRun:
    """The state of a joint search: its concepts, and trials by their moves.

    `write` records the trials so far.
    """

    evaluation: SharedEvaluation
    concepts: Mapping[str, JointConcept]
    options: SearchOptions
    cost: JointCost
    trials: dict[Moves, JointTrial]
    write: Callable[[Iterable[JointTrial]], object]

    def run(self) -> JointTrial:
        """Balance the steps of all concepts, extend insufficient ones, and return the best trial.

        Steps start from those of each concept alone, with the overshoot. Balanced steps need no
        further overshoot, because the cost includes similar images.
        """
        found = [each.alone.forget for each in self.concepts.values()]
        overshoot = self.options.factor(of_prompts=any(each.of_prompts for each in found))
        rounds = ROUNDS * self.options.steps
        steps = BalancedSteps({n: overshoot * each.alone.step for n, each in self.concepts.items()})
        tried: list[JointTrial] = []
        with progress.bar("joint", rounds + self.options.steps) as ticker:
            for _ in range(rounds):
                trial = self._trial(steps.steps, slopes=True)
                tried.append(trial)
                ticker.advance()
                if self._settled(tried):
                    break
                steps.observe(trial.slopes or {}, self._residuals(trial))
            trial = min(tried, key=self._price)
            for _ in range(self.options.steps):
                if self.forgets(trial):
                    break
                left = self._residuals(trial)
                longer = {m.name: m.step * (RAISE if left[m.name] else 1) for m in trial.moves}
                trial = self._trial(longer)
                tried.append(trial)
                ticker.advance()
        return min(tried, key=self._price)

    def _settled(self, balanced: Sequence[JointTrial]) -> bool:
        """Return whether balancing has converged or stopped improving."""
        best = min(range(len(balanced)), key=lambda at: self._price(balanced[at]))
        if len(balanced) > best + WORSE:
            return True
        if len(balanced) <= PATIENCE or not self.forgets(balanced[-1]):
            return False
        before, now = (balanced[at].cost or 0.0 for at in (-1 - PATIENCE, -1))
        return self.forgets(balanced[-1 - PATIENCE]) and before - now < SETTLED * before

    def _price(self, trial: JointTrial) -> float:
        """Return the cost of a trial plus the share of concepts that are still recognised.

        One of two concepts may cost half of all other images, one of a hundred a hundredth.
        """
        left = self._residuals(trial).values()
        return (trial.cost or 0.0) + sum(each > 0 for each in left) / len(left)

    def forgets(self, trial: JointTrial) -> bool:
        """Return whether a trial meets the criterion for all its concepts."""
        return not any(self._residuals(trial).values())

    def _residuals(self, trial: JointTrial) -> dict[str, float]:
        criterion, margin = self.options.criterion, self.options.margin
        return {
            name: residual(accuracy, trial.gaps[name], criterion, margin)
            for name, accuracy in trial.forget.items()
        }

    def _trial(self, steps: Mapping[str, float], *, slopes: bool = False) -> JointTrial:
        """Return the trial of some steps; measure what is missing."""
        moves = tuple(self.concepts[name].move(step) for name, step in steps.items())
        known = self.trials.get(moves)
        if known is not None and known.cost is not None and (known.slopes or not slopes):
            return known
        trial = self.trials[moves] = self._measured(moves, slopes=slopes)
        self.write(self.trials.values())
        return trial

    def _measured(self, moves: Moves, *, slopes: bool) -> JointTrial:
        """Measure moves, on demand with the slopes of the cost."""
        forget, gap, recognised = {}, {}, []
        with (
            _edited(self.evaluation, self.concepts, moves) as model,
            torch.set_grad_enabled(slopes),
        ):
            for move in moves:
                group = self.evaluation.forget[move.name]
                logits, labels = model.cosines(group)
                recognised.append(self.cost.recognised(group, logits))
                forget[move.name] = group.accuracy_of(ranks_of_truth(logits.detach(), labels))
                gap[move.name] = group.least_gap(logits.detach())
            cost = torch.stack(recognised).mean() + self.cost.of_retained(model)
            by_step = self._slopes(moves, cost) if slopes else None
        return JointTrial(moves, forget, gap, None, float(cost.detach()), by_step)

    def _slopes(self, moves: Moves, cost: Tensor) -> dict[str, float]:
        """Return the slope of the cost along the logarithm of each step.

        A layer's change is the sum of its steps times their directions, so a slope is the inner
        product of the layer's gradient with the change by that step.
        """
        model = self.evaluation.model
        layers = {move.layer: Layer.parse(move.layer) for move in moves}
        parameters = sorted({layer.parameter for layer in layers.values()})
        weights = [model.get_parameter(name) for name in parameters]
        gradients = dict(zip(parameters, torch.autograd.grad(cost, weights), strict=True))
        slopes = {}
        for move in moves:
            layer = layers[move.layer]
            along = self.concepts[move.name].evaluator.along
            gradient = layer.rows(gradients[layer.parameter])
            slopes[move.name] = move.step * float((gradient.double() * along.double()).sum())
        return slopes


def _edited(
    evaluation: SharedEvaluation, concepts: Mapping[str, JointConcept], moves: Moves
) -> AbstractContextManager[EditedModel]:
    """Apply moves to the model of an evaluation within the context."""
    changes = [concepts[move.name].evaluator.change(move.step) for move in moves]
    return edited_model(evaluation, changed_values(evaluation.model, changes))


@dataclass(frozen=True, slots=True)
class JointResult:
    """A joint search, the number of trials from earlier runs, and the paths of its plots."""

    record: JointSearch
    forgotten: bool
    reused: int
    plots: list[str]

    @property
    def chosen(self) -> JointTrial:
        """The trial behind the written edits, on test rows."""
        return self.record.stages[-1]


def joint_search(store: Store, names: Sequence[str], *, options: SearchOptions) -> JointResult:
    """Search for one edit per set that forget all concepts together; record and write them.

    Raises UsageError, MissingError, StaleError, and InputError unless all sets use the same
    evaluation rows and the same model.
    """
    if len(names) < 2:
        raise UsageError("--joint needs several names", hint="slsgu search A B --joint")
    if options.after:
        raise UsageError(
            "--after applies to separate searches; a joint search starts from the original model",
            hint=f"name them all: `slsgu search {join([*options.after, *names])} --joint`",
        )
    plans = read_plans(store, names, options=options)
    require_alike({plan.name: plan.base_pass_digest for plan in plans})
    options, label = plans[0].options, joint_label(names)
    with torch.no_grad(), arithmetic(options.precision):
        shared = share_evaluation(store, plans)
        reported = report_evaluation(store, plans, shared)
        concepts = {}
        with progress.bar("each alone", len(plans)) as ticker:
            for plan in plans:
                concepts[plan.name] = search_alone(store, plan, shared)
                ticker.advance()
        fresh = _fresh(concepts, reported, options)
        recorded = resume(store, Artifact.JOINT, label, fresh).trials

        def write(trials: Iterable[JointTrial], stages: Sequence[JointTrial] = ()) -> JointSearch:
            record = replace(fresh, trials=tuple(trials), stages=tuple(stages))
            store.write_record(Artifact.JOINT.path(label), record)
            return record

        known = {trial.moves: trial for trial in recorded}
        cost = JointCost.of(shared, concepts, options)
        run = JointSearchRun(shared, concepts, options, cost, known, write)
        chosen = run.run()
        manifests = [plan.manifest for plan in plans]
        shown, utility = choose_shown(reported, manifests), reported.utility(manifests)
        stages, maps = [], [CosineMap("original", shown.cosines(), ())]
        for count in growth(len(chosen.moves)):
            moves, forgotten = chosen.moves[:count], shown.names[:count]
            with _edited(reported, concepts, moves) as model:
                stage, ranks = _reported(reported, model, moves, utility)
                stages.append(stage)
                maps.append(CosineMap(f"{count} forgotten", shown.cosines(model), forgotten))
        _write_edits(store, run, reported, fresh, chosen, stages[-1], ranks)
        record = write(run.trials.values(), stages)
    return JointResult(
        record, run.forgets(chosen), len(recorded), _draw(store, record, shown, maps)
    )


def require_joint(result: JointResult) -> None:
    """Raise NotForgottenError unless all concepts meet the criterion."""
    if result.forgotten:
        return
    worst = sorted(result.chosen.forget.items(), key=lambda pair: (-pair[1].top1, -pair[1].top5))
    left = [f"{name} FA@1 {each.top1:.1f} and FA@5 {each.top5:.1f}" for name, each in worst]
    raise NotForgottenError(
        f"no steps forget {listed(result.record.names)} together; the best leave {listed(left)}",
        hint="the trials and the edits are saved; try the same with --joint --steps 20",
    )


def growth(count: int) -> list[int]:
    """Return the numbers of concepts for the stages."""
    if count <= MOST_MAPS:
        return list(range(1, count + 1))
    rounds = [first * 10**power for power in range(len(str(count))) for first in (1, 2, 5)]
    return [*(number for number in rounds if number < count), count]


def _fresh(
    concepts: Mapping[str, JointConcept], reported: SharedEvaluation, options: SearchOptions
) -> JointSearch:
    """Return a record of the inputs, without trials.

    Figures of the original model are those on test rows.
    """
    first = next(iter(concepts.values())).plan
    records = {name: concept.record for name, concept in concepts.items()}
    shown = {f"{FORGET} {name}": record.evals[FORGET] for name, record in records.items()}
    manifests = [concept.plan.manifest for concept in concepts.values()]
    return JointSearch(
        names=tuple(concepts),
        concepts=tuple(manifest.concept for manifest in manifests),
        gradients={name: each.plan.pointer.forget for name, each in concepts.items()},
        retain_data={n: record.retain_data for n, record in records.items() if record.retain_data},
        model=first.pointer.model,
        model_fingerprint=first.pointer.model_fingerprint,
        evals=first.manifest.measured_on() | shown,
        precision=options.precision,
        criterion=options.criterion,
        margin=records[first.name].margin,
        baseline_forget={n: reported.forget[n].base_accuracy() for n in records},
        baseline_utility={
            name: group.base_accuracy() for name, group in reported.utility(manifests).items()
        },
        stages=(),
        trials=(),
        version=slsgu_cli.__version__,
    )


def _reported(
    evaluation: SharedEvaluation,
    model: EditedModel,
    moves: Moves,
    utility: Mapping[str, EvaluationSet],
) -> tuple[JointTrial, dict[str, Tensor]]:
    """Return the figures of moves that are in place, and the ranks of retained images."""
    figures = {move.name: model.forget_figures(evaluation.forget[move.name]) for move in moves}
    ranks = model.ranks(utility)
    retained = {name: utility[name].accuracy_of(each) for name, each in ranks.items()}
    forget = {name: accuracy for name, (accuracy, _) in figures.items()}
    return JointTrial(moves, forget, {n: gap for n, (_, gap) in figures.items()}, retained), ranks


def _write_edits(
    store: Store,
    run: JointSearchRun,
    reported: SharedEvaluation,
    record: JointSearch,
    chosen: JointTrial,
    stage: JointTrial,
    ranks: Mapping[str, Tensor],
) -> None:
    """Write each concept's edit, with the figures of all edits in place."""
    joint = JointRef(record.names, digest([record.gradients, record.retain_data, chosen.moves]))
    utility = reported.utility([concept.plan.manifest for concept in run.concepts.values()])
    before = UNEDITED.ranks(utility)
    for move in chosen.moves:
        concept, name = run.concepts[move.name], move.name
        most, nearest = class_effects(utility, before, ranks, reported.forget[name], UNEDITED)
        effect = Report(
            Figures(record.baseline_forget[name], record.baseline_utility),
            Figures(stage.forget[name], stage.utility or {}),
            most,
            nearest,
        )
        trial = replace(
            concept.alone,
            step=move.step,
            share=move.share,
            forget=chosen.forget[name],
            gap=chosen.gaps[name],
        )
        edit = searched_edit(concept.plan, concept.evaluator, concept.record, trial, effect, joint)
        write_edit(store, edit)


def _draw(
    store: Store, record: JointSearch, shown: ShownClasses, maps: Sequence[CosineMap]
) -> list[str]:
    """Draw utility against the number of concepts, and the cosine matrix at each number."""
    if len(record.names) > MOST_MAPS:
        maps = [maps[0], maps[-1]]
    drawn = {
        "several": several_plot(record),
        "cosines": cosine_maps(
            maps, shown.names, thumbnails=shown.thumbnails if shown.has_images else None
        ),
    }
    return write_plots(store, joint_label(record.names), drawn)
