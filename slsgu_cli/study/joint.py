"""`search --joint`: concepts joined one by one, their steps adjusted together."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from shlex import join

import torch

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import write_edit
from slsgu_cli.clip.evaluation import EvaluationSet, SharedEvaluation
from slsgu_cli.errors import NotForgottenError, UsageError
from slsgu_cli.figures.curves import several_plot
from slsgu_cli.figures.pictures import CosineMap, cosine_maps
from slsgu_cli.method.evaluate import choose_shown
from slsgu_cli.method.gradient_pass import arithmetic
from slsgu_cli.method.scoring import JointSteps, left_of, left_to_forget
from slsgu_cli.method.search import read_plans, require_alike, search, share_evaluation, shares
from slsgu_cli.method.search_plan import FORGET, SearchOptions, SearchPlan, searched_edit
from slsgu_cli.method.trial import UNMOVED, MovedModel, Probe, UtilityMeter, mean_top1, moved_model
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import JointRef, Trial, Trials
from slsgu_cli.records.studies import JointMove, JointSearch, JointTrial
from slsgu_cli.store.artifacts import joint_label, joint_path, plot_path, recorded, trials_path
from slsgu_cli.store.store import Store

# Points of mean TA@1 that sharing a layer must keep over the best layer nobody moves.
WORTH_SHARING = 0.1
NO_BAR = float("-inf")
Moves = tuple[JointMove, ...]

# A layer, and the ridge that whitened its direction; None for the gradient.
Line = tuple[str, float | None]


@dataclass(frozen=True, slots=True)
class SingleSearch:
    """What a concept brings from its own search: by layer, a trial and its probe.

    `trials` has the shortest step of each layer that forgets the concept when it is alone,
    and `too_short` the longest one known not to. If no layer forgets it, there is one
    trial: the one that its search chose.
    """

    case: SearchPlan
    record: Trials
    probes: dict[Line, Probe]
    trials: dict[Line, Trial]
    too_short: dict[Line, float]

    def by_worth(self) -> list[Trial]:
        """Return the trials, the one that keeps most first."""
        return sorted(self.trials.values(), key=lambda t: (-mean_top1(t.utility or {}), t.share))


def search_alone(store: Store, case: SearchPlan, shared: SharedEvaluation) -> SingleSearch:
    """Search one concept by itself, and measure what each layer's shortest step keeps."""
    options, evaluation = case.options, shared.of(case.manifest)
    result = search(store, case.name, options=options, evaluation=evaluation)
    found = {(*line_of(trial), trial.step): trial for trial in result.trials.trials}
    probes = {(p.score.layer, p.ridge): p for p in case.probes(store, evaluation)}
    meter = UtilityMeter(evaluation)
    trials, too_short = {}, {}
    for line, probe in probes.items():
        steps = sorted((t for t in found.values() if line_of(t) == line), key=lambda t: t.step)
        left = [left_to_forget(trial, options.steer, options.margin) for trial in steps]
        if 0 not in left:
            continue
        trial = steps[left.index(0)]
        if trial.utility is None:
            kept = meter.measure(probe, trial.step, beat=NO_BAR)
            trial = found[*line, trial.step] = replace(trial, utility=kept)
        trials[line] = trial
        too_short[line] = max((t.step for t in steps if t.step < trial.step), default=0.0)
    record = replace(result.trials, trials=tuple(found.values()))
    store.write_record(trials_path(case.name), record)
    if not trials:
        trials = {line_of(result.chosen): result.chosen}
        too_short = dict.fromkeys(trials, 0.0)
    return SingleSearch(case, record, probes, trials, too_short)


def line_of(move: Trial | JointMove) -> Line:
    """Return the layer and the ridge of a move."""
    return move.layer, move.ridge


@dataclass(slots=True)
class JointSearchRun:
    """The state of a joint search: what joined, trials by their moves, a stage per concept.

    `utility` leaves out the images of all concepts, of those that are to join as well, so
    that the stages can be compared.
    """

    evaluation: SharedEvaluation
    utility: Mapping[str, EvaluationSet]
    options: SearchOptions
    found: dict[Moves, JointTrial]
    stages: list[JointTrial] = field(default_factory=list)
    owns: dict[str, SingleSearch] = field(default_factory=dict)
    _too_short: dict[str, float] = field(default_factory=dict)

    def join(self, own: SingleSearch) -> None:
        """Add a concept by the best layer nobody moves, or by its best if that is worth it."""
        self.owns[own.case.name] = own
        taken = {move.layer for move in self.stages[-1].moves} if self.stages else set()
        ordered = own.by_worth()
        free = [trial for trial in ordered if trial.layer not in taken]
        wanted = {line_of(trial): trial for trial in [*free[:1], ordered[0]]}
        adjusted = {line: self._adjust(own, trial) for line, trial in wanted.items()}

        def worth(line: Line) -> tuple[bool, float]:
            trial = adjusted[line][0]
            kept = mean_top1(trial.utility or {})
            return self.forgets(trial), kept - WORTH_SHARING * (line[0] in taken)

        stage, self._too_short = adjusted[max(adjusted, key=worth)]
        self.stages.append(stage)

    def forgets(self, trial: JointTrial) -> bool:
        """Return whether a trial brings the steered accuracy of all its concepts to 0."""
        return not any(self._left(trial).values())

    def in_place(self, moves: Moves) -> AbstractContextManager[MovedModel]:
        """Put moves into the model for the length of a block."""
        probes = [(self.owns[move.name].probes[line_of(move)], move.step) for move in moves]
        return moved_model(self.evaluation, probes)

    def _left(self, trial: JointTrial) -> dict[str, float]:
        steer, margin = self.options.steer, self.options.margin
        return {
            name: left_of(found, trial.gaps[name], steer, margin)
            for name, found in trial.forget.items()
        }

    def _adjust(self, own: SingleSearch, alone: Trial) -> tuple[JointTrial, dict[str, float]]:
        """Adjust all steps with one more move; return the best trial, and steps too short."""
        name = own.case.name
        new = JointMove(name, alone.layer, alone.tower, alone.ridge, alone.step, alone.share)
        moves = (*(self.stages[-1].moves if self.stages else ()), new)
        too_short = self._too_short | {name: own.too_short[line_of(alone)]}
        steps = JointSteps({move.name: move.step for move in moves}, too_short)
        tried = []
        for _ in range(self.options.steps):
            trial = self._measured(_at(moves, steps.steps))
            tried.append(trial)
            steps.observe(self._left(trial))
            if steps.done:
                break
        if steps.forgetting is not None:
            chosen = self._measured(_at(moves, steps.forgetting), utility=True)
        else:
            least = min(tried, key=lambda trial: sum(self._left(trial).values()))
            chosen = self._measured(least.moves, utility=True)
        return chosen, steps.too_short

    def _measured(self, moves: Moves, *, utility: bool = False) -> JointTrial:
        """Return the trial of some moves, measured now as far as it was not before."""
        known = self.found.get(moves)
        if known is not None and (known.utility is not None or not utility):
            return known
        with self.in_place(moves) as model:
            left = {move.name: model.left(self.evaluation.forget[move.name]) for move in moves}
            kept = model.accuracies(self.utility) if utility else None
        forget = {name: found for name, (found, _) in left.items()}
        gaps = {name: gap for name, (_, gap) in left.items()}
        trial = self.found[moves] = JointTrial(moves, forget, gaps, kept)
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

    found: JointSearch
    forgotten: bool
    reused: int
    plots: tuple[str, ...]

    @property
    def chosen(self) -> JointTrial:
        """The trial that was written as edits."""
        return self.found.stages[-1]


def joint_search(store: Store, names: Sequence[str], *, options: SearchOptions) -> JointResult:
    """Search for one edit per set that forget all concepts together; record and write them.

    Raises UsageError, MissingError, StaleError, and InputError where the sets are not
    measured on the same rows of the same model.
    """
    if len(names) < 2:
        raise UsageError("--joint goes with several names", hint="slsgu search A B --joint")
    cases = read_plans(store, names, options=options)
    require_alike({case.name: shares(case) for case in cases})
    options = cases[0].options
    with torch.no_grad(), arithmetic(options.precision):
        shared = share_evaluation(store, cases)
        owns = [search_alone(store, case, shared) for case in cases]
        fresh = _fresh(owns, shared, options)
        recorded = _recorded(store, fresh)
        utility = shared.utility([case.manifest for case in cases])
        joining = JointSearchRun(
            shared, utility, options, {trial.moves: trial for trial in recorded}
        )
        with progress.bar("joint", len(owns)) as ticker:
            for own in owns:
                joining.join(own)
                ticker.advance()
        found = replace(fresh, stages=tuple(joining.stages), trials=tuple(joining.found.values()))
        store.write_record(joint_path(names), found)
        _write_edits(store, owns, found)
        plots = _draw(store, joining, cases, found)
    return JointResult(found, joining.forgets(found.stages[-1]), len(recorded), plots)


def require_joint(result: JointResult) -> None:
    """Raise NotForgottenError unless every concept's steered accuracy is 0."""
    if result.forgotten:
        return
    names = result.found.names
    left = ", ".join(
        f"{name} FA@1 {found.top1:.1f} and FA@5 {found.top5:.1f}"
        for name, found in result.chosen.forget.items()
    )
    raise NotForgottenError(
        f"no steps forget {' and '.join(names)} together; the best leave {left}",
        hint=f"the trials and the edits are kept; try `slsgu search {join(names)} --joint "
        "--steps 20`",
    )


def _fresh(
    owns: Sequence[SingleSearch], shared: SharedEvaluation, options: SearchOptions
) -> JointSearch:
    """Return a record without trials, with what they will be made from."""
    first = owns[0].case
    shown = {f"{FORGET} {own.case.name}": own.record.evals[FORGET] for own in owns}
    kept = shared.utility([own.case.manifest for own in owns])
    return JointSearch(
        names=tuple(own.case.name for own in owns),
        concepts=tuple(own.case.manifest.concept for own in owns),
        gradients={own.case.name: own.case.pointer.forget for own in owns},
        retain_data={
            own.case.name: own.record.retain_data for own in owns if own.record.retain_data
        },
        model=first.pointer.model,
        model_fingerprint=first.pointer.model_fingerprint,
        evals={n: ref.fingerprint for n, ref in sorted(first.manifest.evals.items())} | shown,
        precision=options.precision,
        steer=options.steer,
        margin=owns[0].record.margin,
        baseline_forget={own.case.name: own.record.baseline_forget for own in owns},
        baseline_utility={name: group.base_accuracy() for name, group in kept.items()},
        stages=(),
        trials=(),
        version=slsgu_cli.__version__,
    )


def _recorded(store: Store, fresh: JointSearch) -> tuple[JointTrial, ...]:
    """Return the trials on record, if they were made from the same things."""
    unusable = "recorded trials cannot be used and are made again"
    old = recorded(store, joint_path(fresh.names), JointSearch, unusable=unusable)
    return old.trials if old and _made_from(old) == _made_from(fresh) else ()


def _made_from(found: JointSearch) -> tuple[object, ...]:
    data = found.gradients, found.retain_data, found.evals
    return *data, found.model_fingerprint, found.precision


def _write_edits(store: Store, owns: Sequence[SingleSearch], found: JointSearch) -> None:
    """Write each concept's edit, with the figures of all edits in place."""
    chosen = found.stages[-1]
    joint = JointRef(found.names, digest([found.gradients, found.retain_data, chosen.moves]))
    for own, move in zip(owns, chosen.moves, strict=True):
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
        record = replace(own.record, baseline_utility=found.baseline_utility)
        probe = own.probes[line_of(move)]
        write_edit(store, searched_edit(own.case, probe, record, trial, joint))


def _draw(
    store: Store, joining: JointSearchRun, cases: Sequence[SearchPlan], found: JointSearch
) -> tuple[str, ...]:
    """Draw utility against the number of concepts, and the cosine matrix at each number."""
    shown = choose_shown(joining.evaluation, [case.manifest for case in cases])
    maps = [CosineMap("original", shown.cosines(UNMOVED), ())]
    for count, stage in enumerate(found.stages, start=1):
        with joining.in_place(stage.moves) as model:
            forgotten = shown.names[:count]
            maps.append(CosineMap(f"{count} forgotten", shown.cosines(model), forgotten))
    drawn = {
        "several": several_plot(found),
        "cosines": cosine_maps(maps, shown.names, thumbnails=shown.thumbnails),
    }
    paths = {kind: plot_path(joint_label(found.names), kind) for kind in drawn}
    for kind, path in paths.items():
        store.write_bytes(path, drawn[kind])
    return tuple(store.where(path) for path in paths.values())
