"""`search --joint`: concepts joined one by one, their steps adjusted together."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from shlex import join

import torch

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import write_edit
from slsgu_cli.clip.evaluation import Evaluation, EvaluationSet, SharedEvaluation
from slsgu_cli.errors import NotForgottenError, UsageError
from slsgu_cli.figures.curves import several_plot
from slsgu_cli.figures.pictures import CosineMap, cosine_maps
from slsgu_cli.method.evaluate import choose_shown
from slsgu_cli.method.gradient_pass import arithmetic
from slsgu_cli.method.scoring import JointSteps, kept, left_of, mean_top1
from slsgu_cli.method.search import Line, SetSearch, line_of, searched_edit
from slsgu_cli.method.search_plan import (
    SearchPlan,
    read_plans,
    require_alike,
    share_evaluation,
    to_report_on,
)
from slsgu_cli.method.trial import UNMOVED, MovedModel, Probe, moved_model, report
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import JointRef, Trial
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.studies import JointMove, JointSearch, JointTrial
from slsgu_cli.store.artifacts import FORGET, Artifact, joint_label, plot_path, resume
from slsgu_cli.store.store import Store

# Points of mean TA@1 that sharing a layer must keep over the best layer nobody moves.
WORTH_SHARING = 0.1
# Of more concepts the maps of the original and of all are drawn, and none of those between.
MOST_MAPS = 10
Moves = tuple[JointMove, ...]


@dataclass(frozen=True, slots=True)
class SingleSearch:
    """The search of one concept by itself, and the trials it may join others with, by line.

    `trials` has the shortest step of each line that forgets the concept when it is alone,
    and `too_short` the longest one known not to. If no line forgets it, there is one
    trial: the one that its search chose.
    """

    run: SetSearch
    trials: dict[Line, Trial]
    too_short: dict[Line, float]

    @property
    def plan(self) -> SearchPlan:
        """The set, and what was searched of it."""
        return self.run.plan

    def by_worth(self) -> list[Trial]:
        """Return the trials, the one that keeps most first."""
        by = self.plan.options.keep
        return sorted(self.trials.values(), key=lambda trial: (-kept(trial, by), trial.share))


def search_alone(
    store: Store,
    plan: SearchPlan,
    shared: SharedEvaluation,
    reported: Callable[[], SharedEvaluation],
) -> SingleSearch:
    """Search one concept by itself, and measure what each line's shortest step keeps."""
    evaluation = shared.of(plan.manifest, resumed=True)
    run = SetSearch(store, Artifact.TRIALS, plan, evaluation)
    chosen = run.run(plan.probes(store, evaluation), reported).chosen
    trials, too_short = {}, {}
    for line, probe in run.probes.items():
        along = (trial for trial in run.trials.values() if line_of(trial) == line)
        steps = sorted(along, key=lambda trial: trial.step)
        left = [run.left(trial) for trial in steps]
        if 0 not in left:
            continue
        trials[line] = trial = run.with_utility(probe, steps[left.index(0)])
        too_short[line] = max((t.step for t in steps if t.step < trial.step), default=0.0)
    run.write()
    if not trials:
        trials = {line_of(chosen): chosen}
        too_short = dict.fromkeys(trials, 0.0)
    return SingleSearch(run, trials, too_short)


@dataclass(slots=True)
class JointSearchRun:
    """The state of a joint search: what joined, trials by their moves, a stage per concept.

    `utility` leaves out the images of all concepts, of those that are to join as well, so
    that the stages can be compared.
    """

    evaluation: SharedEvaluation
    utility: Mapping[str, EvaluationSet]
    options: SearchOptions
    trials: dict[Moves, JointTrial]
    stages: list[JointTrial] = field(default_factory=list)
    singles: dict[str, SingleSearch] = field(default_factory=dict)
    _too_short: dict[str, float] = field(default_factory=dict)

    @property
    def manifests(self) -> list[SetManifest]:
        """The sets that have joined."""
        return [single.plan.manifest for single in self.singles.values()]

    def join(self, single: SingleSearch) -> None:
        """Add a concept by the best layer nobody moves, or by its best if that is worth it."""
        self.singles[single.plan.name] = single
        moved_layers = {move.layer for move in self.stages[-1].moves} if self.stages else set()
        ordered = single.by_worth()
        free = [trial for trial in ordered if trial.layer not in moved_layers]
        wanted = {line_of(trial): trial for trial in [*free[:1], ordered[0]]}
        adjusted = {line: self._adjust(single, trial) for line, trial in wanted.items()}

        def worth(line: Line) -> tuple[bool, float]:
            trial = adjusted[line][0]
            keeps = mean_top1(trial.utility or {})
            return self.forgets(trial), keeps - WORTH_SHARING * (line[0] in moved_layers)

        stage, self._too_short = adjusted[max(adjusted, key=worth)]
        self.stages.append(stage)

    def forgets(self, trial: JointTrial) -> bool:
        """Return whether a trial brings the steered accuracy of all its concepts to 0."""
        return not any(self._left(trial).values())

    def in_place(self, moves: Moves) -> AbstractContextManager[MovedModel]:
        """Put moves into the model for the length of a block."""
        return moved_model(self.evaluation, self.probed(moves))

    def probed(self, moves: Moves) -> list[tuple[Probe, float]]:
        """Return the probe and the step of each move."""
        return [(self.singles[move.name].run.probes[line_of(move)], move.step) for move in moves]

    def _left(self, trial: JointTrial) -> dict[str, float]:
        steer, margin = self.options.steer, self.options.margin
        return {
            name: left_of(accuracy, trial.gaps[name], steer, margin)
            for name, accuracy in trial.forget.items()
        }

    def _adjust(self, single: SingleSearch, alone: Trial) -> tuple[JointTrial, dict[str, float]]:
        """Adjust all steps with one more move; return the best trial, and steps too short."""
        name = single.plan.name
        new = JointMove(name, alone.layer, alone.tower, alone.ridge, alone.step, alone.share)
        moves = (*(self.stages[-1].moves if self.stages else ()), new)
        too_short = self._too_short | {name: single.too_short[line_of(alone)]}
        steps = JointSteps({move.name: move.step for move in moves}, too_short)
        trials = []
        for _ in range(self.options.steps):
            trial = self._measured(_at(moves, steps.steps))
            trials.append(trial)
            steps.observe(self._left(trial))
            if steps.done:
                break
        if steps.forgetting is not None:
            chosen = self._measured(_at(moves, steps.forgetting), utility=True)
        else:
            least = min(trials, key=lambda trial: sum(self._left(trial).values()))
            chosen = self._measured(least.moves, utility=True)
        return chosen, steps.too_short

    def _measured(self, moves: Moves, *, utility: bool = False) -> JointTrial:
        """Return the trial of some moves, measured now as far as it was not before."""
        known = self.trials.get(moves)
        if known is not None and (known.utility is not None or not utility):
            return known
        with self.in_place(moves) as model:
            left = {move.name: model.left(*self.evaluation.shown(move.name)) for move in moves}
            kept = model.accuracies(self.utility) if utility else None
        forget = {name: accuracy for name, (accuracy, _) in left.items()}
        gaps = {name: gap for name, (_, gap) in left.items()}
        trial = self.trials[moves] = JointTrial(moves, forget, gaps, kept)
        return trial


def _at(moves: Sequence[JointMove], steps: Mapping[str, float]) -> Moves:
    """Return the moves at other steps."""
    return tuple(
        replace(move, step=steps[move.name], share=move.share * steps[move.name] / move.step)
        for move in moves
    )


@dataclass(frozen=True, slots=True)
class JointResult:
    """A joint search, how many of its trials were on record before, and where its plots are."""

    record: JointSearch
    forgotten: bool
    reused: int
    plots: tuple[str, ...]

    @property
    def chosen(self) -> JointTrial:
        """The trial that was written as edits."""
        return self.record.stages[-1]


def joint_search(store: Store, names: Sequence[str], *, options: SearchOptions) -> JointResult:
    """Search for one edit per set that forget all concepts together; record and write them.

    Raises UsageError, MissingError, StaleError, and InputError where the sets are not
    measured on the same rows of the same model.
    """
    if len(names) < 2:
        raise UsageError("--joint goes with several names", hint="slsgu search A B --joint")
    if options.after:
        raise UsageError(
            "--after is for a search of each concept by itself; a joint search starts from the "
            "original model",
            hint=f"name them all: `slsgu search {join([*options.after, *names])} --joint`",
        )
    plans = read_plans(store, names, options=options)
    require_alike({plan.name: plan.base_pass_digest for plan in plans})
    options = plans[0].options
    with torch.no_grad(), arithmetic(options.precision):
        shared = share_evaluation(store, plans)
        reported = to_report_on(store, plans, shared)
        singles = [search_alone(store, plan, shared, reported) for plan in plans]
        fresh = _fresh(singles, reported(), options)
        recorded = resume(store, Artifact.JOINT, joint_label(names), fresh).trials
        utility = shared.utility([plan.manifest for plan in plans])
        run = JointSearchRun(shared, utility, options, {trial.moves: trial for trial in recorded})
        with progress.bar("joint", len(singles)) as ticker:
            for single in singles:
                run.join(single)
                ticker.advance()
        stages = tuple(_reported(run, reported(), stage) for stage in run.stages)
        record = replace(fresh, stages=stages, trials=tuple(run.trials.values()))
        store.write_record(Artifact.JOINT.path(joint_label(names)), record)
        _write_edits(store, run, reported(), record)
        plots = _draw(store, run, reported(), record)
    return JointResult(record, run.forgets(run.stages[-1]), len(recorded), plots)


def require_joint(result: JointResult) -> None:
    """Raise NotForgottenError unless every concept's steered accuracy is 0."""
    if result.forgotten:
        return
    names = result.record.names
    left = ", ".join(
        f"{name} FA@1 {accuracy.top1:.1f} and FA@5 {accuracy.top5:.1f}"
        for name, accuracy in result.chosen.forget.items()
    )
    raise NotForgottenError(
        f"no steps forget {' and '.join(names)} together; the best leave {left}",
        hint=f"the trials and the edits are kept; try `slsgu search {join(names)} --joint "
        "--steps 20`",
    )


def _fresh(
    singles: Sequence[SingleSearch], reported: SharedEvaluation, options: SearchOptions
) -> JointSearch:
    """Return a record without trials, with what they will be made from.

    Figures of the original model are of the rows to report on.
    """
    first = singles[0].plan
    evals = first.manifest.measured_on()
    records = {single.plan.name: single.run.record for single in singles}
    for name, record in records.items():
        evals[f"{FORGET} {name}"] = record.evals[FORGET]
    kept = reported.utility([single.plan.manifest for single in singles])
    return JointSearch(
        names=tuple(records),
        concepts=tuple(single.plan.manifest.concept for single in singles),
        gradients={single.plan.name: single.plan.pointer.forget for single in singles},
        retain_data={n: record.retain_data for n, record in records.items() if record.retain_data},
        model=first.pointer.model,
        model_fingerprint=first.pointer.model_fingerprint,
        evals=evals,
        precision=options.precision,
        steer=options.steer,
        margin=records[first.name].margin,
        baseline_forget={n: reported.forget[n].base_accuracy() for n in records},
        baseline_utility={name: group.base_accuracy() for name, group in kept.items()},
        stages=(),
        trials=(),
        version=slsgu_cli.__version__,
    )


def _reported(run: JointSearchRun, reported: SharedEvaluation, stage: JointTrial) -> JointTrial:
    """Return a stage with the reserve, and the figures of the rows to report on."""
    reserve = run.options.reserve if run.forgets(stage) else 1.0
    moves = _at(stage.moves, {move.name: reserve * move.step for move in stage.moves})
    with moved_model(reported, run.probed(moves)) as model:
        left = {move.name: model.left(reported.forget[move.name]) for move in moves}
        kept = model.accuracies(reported.utility(run.manifests))
    return replace(
        stage,
        moves=moves,
        forget={name: accuracy for name, (accuracy, _) in left.items()},
        gaps={name: gap for name, (_, gap) in left.items()},
        utility=kept,
    )


def _write_edits(
    store: Store, run: JointSearchRun, reported: SharedEvaluation, record: JointSearch
) -> None:
    """Write each concept's edit, with the figures of all edits in place."""
    chosen = record.stages[-1]
    joint = JointRef(record.names, digest([record.gradients, record.retain_data, chosen.moves]))
    utility = reported.utility(run.manifests)
    for move in chosen.moves:
        single = run.singles[move.name]
        trial = Trial(
            layer=move.layer,
            tower=move.tower,
            ridge=move.ridge,
            step=move.step,
            share=move.share,
            forget=chosen.forget[move.name],
            gap=chosen.gaps[move.name],
            utility=chosen.utility,
        )
        measured = Evaluation(
            reported.model, reported.vision, reported.text, reported.forget[move.name], utility
        )
        effect = report(measured, run.probed(chosen.moves))
        probe = single.run.probes[line_of(move)]
        edit = searched_edit(single.plan, probe, single.run.record, trial, effect, joint)
        write_edit(store, edit)


def _draw(
    store: Store, run: JointSearchRun, reported: SharedEvaluation, record: JointSearch
) -> tuple[str, ...]:
    """Draw utility against the number of concepts, and the cosine matrix at each number."""
    shown = choose_shown(reported, run.manifests)
    maps = [CosineMap("original", shown.cosines(UNMOVED), ())]
    stages = list(enumerate(record.stages, start=1))
    for count, stage in stages if len(stages) <= MOST_MAPS else stages[-1:]:
        with moved_model(reported, run.probed(stage.moves)) as model:
            forgotten = shown.names[:count]
            maps.append(CosineMap(f"{count} forgotten", shown.cosines(model), forgotten))
    drawn = {
        "several": several_plot(record),
        "cosines": cosine_maps(maps, shown.names, thumbnails=shown.thumbnails),
    }
    paths = {kind: plot_path(joint_label(record.names), kind) for kind in drawn}
    for kind, path in paths.items():
        store.write_bytes(path, drawn[kind])
    return tuple(store.where(path) for path in paths.values())
