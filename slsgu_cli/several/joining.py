"""Concepts joined one by one into edits that forget all of them, measured together.

The concept that joins brings the layer that keeps most by its own search, preferably one
that no concept before it moves. Then the steps of all are adjusted until every forget
accuracy is 0 with all edits in place.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from slsgu_cli.cases import Case, SearchOptions
from slsgu_cli.evaluation import EvaluationSet, SharedEvaluation
from slsgu_cli.layout import trials_path
from slsgu_cli.records import Trial, Trials
from slsgu_cli.search import search
from slsgu_cli.several.combined import Combined, combined
from slsgu_cli.several.records import JointMove, JointTrial
from slsgu_cli.several.steps import JointSteps
from slsgu_cli.stepsize import left_of, left_to_forget
from slsgu_cli.store import Store
from slsgu_cli.trial import Probe, UtilityMeter, mean_top1

# Points of mean TA@1 that sharing a layer must keep over the best layer nobody moves.
WORTH_SHARING = 0.1
NO_BAR = float("-inf")
Moves = tuple[JointMove, ...]
# A layer, and the ridge that whitened its direction; None for the gradient.
Line = tuple[str, float | None]


@dataclass(frozen=True, slots=True)
class Own:
    """What a concept brings from its own search: by layer, a trial and its probe.

    `trials` has the shortest step of each layer that forgets the concept when it is alone,
    and `too_short` the longest one known not to. If no layer forgets it, there is one
    trial: the one that its search chose.
    """

    case: Case
    record: Trials
    probes: dict[Line, Probe]
    trials: dict[Line, Trial]
    too_short: dict[Line, float]

    def by_worth(self) -> list[Trial]:
        """Return the trials, the one that keeps most first."""
        return sorted(self.trials.values(), key=lambda t: (-mean_top1(t.utility or {}), t.share))


def search_alone(store: Store, case: Case, shared: SharedEvaluation) -> Own:
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
    return Own(case, record, probes, trials, too_short)


def line_of(move: Trial | JointMove) -> Line:
    """Return the layer and the ridge of a move."""
    return move.layer, move.ridge


@dataclass(slots=True)
class Joining:
    """The state of a joint search: what joined, trials by their moves, a stage per concept.

    `utility` leaves out the images of all concepts, of those that are to join as well, so
    that the stages can be compared.
    """

    evaluation: SharedEvaluation
    utility: Mapping[str, EvaluationSet]
    options: SearchOptions
    found: dict[Moves, JointTrial]
    stages: list[JointTrial] = field(default_factory=list)
    owns: dict[str, Own] = field(default_factory=dict)
    _too_short: dict[str, float] = field(default_factory=dict)

    def join(self, own: Own) -> None:
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

    def in_place(self, moves: Moves) -> AbstractContextManager[Combined]:
        """Put moves into the model for the length of a block."""
        probes = [(self.owns[move.name].probes[line_of(move)], move.step) for move in moves]
        return combined(self.evaluation, probes)

    def _left(self, trial: JointTrial) -> dict[str, float]:
        steer, margin = self.options.steer, self.options.margin
        return {
            name: left_of(found, trial.gaps[name], steer, margin)
            for name, found in trial.forget.items()
        }

    def _adjust(self, own: Own, alone: Trial) -> tuple[JointTrial, dict[str, float]]:
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
