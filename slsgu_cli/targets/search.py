"""`search --target`: choose a layer and step by the outputs of a model built on CLIP."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter
from shlex import quote
from time import perf_counter
from typing import Any

import torch

import slsgu_cli
from slsgu_cli.checkpoints.edits import write_edit
from slsgu_cli.checkpoints.layers import Layer, layers_of
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.clip.evaluation import Evaluation, prepare
from slsgu_cli.clip.memory import spare
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.engine.directions import layer_gradient
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.gradients import load_graded
from slsgu_cli.engine.ranking import named_layers
from slsgu_cli.engine.step_edit import step_edit
from slsgu_cli.engine.step_trials import Candidate, StepSearch
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.method.step_search import bisection
from slsgu_cli.records.figures import Effect, JudgeFigures, Share, TargetFigures, meets
from slsgu_cli.records.method import GradientHeader, GradientPointer, TrialKey
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.targets import (
    GradientOf,
    TargetReport,
    TargetSearchOptions,
    TargetTrial,
    TargetTrials,
)
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer, resume, target_edit
from slsgu_cli.store.store import Store
from slsgu_cli.targets.judge import judge_specs
from slsgu_cli.targets.models import PIPELINES, folder_fingerprint
from slsgu_cli.targets.subjects import (
    LlavaSubject,
    PipelineSubject,
    Subject,
    TargetMove,
    by_gain,
    moves_of,
)

# Trials per layer on CLIP, for the first step on the target.
CLIP_STEPS = 7
# The shortest sufficient step is bisected to this relative accuracy, finer than the overshoot.
CLOSE = 0.1
# Parts of the overshoot to try in order, while other classes lose too much.
PARTS = (1.0, 0.5, 0.25)
# Stands for a part if even the shortest sufficient step costs others too much.
NO_ROOM = -1.0
# Trials to find the longest acceptable step.
SHORTENINGS = 4


@dataclass(frozen=True, slots=True)
class TargetSearchResult:
    """Every trial, the chosen one, whether it reaches the goal, and the edit's name.

    `figures` are those of the test split.
    """

    trials: TargetTrials
    chosen: TargetTrial
    forgotten: bool
    reused: int
    edit: str
    figures: TargetFigures
    max_loss: float


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """A set, the loaded target, and the loss whose gradient its layers follow."""

    manifest: SetManifest
    pointer: GradientPointer
    options: TargetSearchOptions
    subject: Subject
    gradient_of: GradientOf

    @classmethod
    def load(cls, store: Store, name: str, options: TargetSearchOptions) -> "TargetPlan":
        """Load the target.

        A LLaVA moves along its own gradient, and so does a pipeline for a set from words. For any
        other set, a pipeline moves along CLIP's.
        """
        manifest = read_manifest(store, name)
        pointer = read_pointer(store, manifest)
        store.require_writable(Artifact.TARGET_TRIALS.path(name))
        if read_target(options.target).family not in PIPELINES:
            if options.judges:
                raise UsageError(
                    f"{options.target} answers in words, so --judge does not apply",
                    hint="leave --judge out",
                )
            if options.applied:
                raise UsageError(
                    f"{options.target} has one CLIP, and --with takes edits of other text encoders",
                    hint="leave --with out",
                )
            llava = LlavaSubject.load(store, manifest, options)
            gradient_of = options.gradient_of or GradientOf.TARGET
            return cls(manifest, pointer, options, llava, gradient_of)
        judges = options.judges or (pointer.model,)
        header = store.read_header(Artifact.GRADIENT.path(pointer.forget), GradientHeader)
        shapes = {name: weight.shape for name, weight in header.weights.items()}
        pipeline = PipelineSubject.load(store, manifest, judges, options, shapes=shapes)
        gradient_of = options.gradient_of or GradientOf.CLIP
        if manifest.words_alone and options.gradient_of is None:
            gradient_of = GradientOf.TARGET
        with torch.no_grad():
            pipeline.remember()
        return cls(manifest, pointer, options, pipeline, gradient_of)

    def moves(self, store: Store) -> list[TargetMove]:
        """Return a move for each layer that reaches the target, best first.

        Raises StaleError, UsageError, and InputError if there is none.
        """
        options, subject, address = self.options, self.subject, self.pointer.forget
        header = store.read_header(Artifact.GRADIENT.path(address), GradientHeader)
        reached = [n for n in header.weights if subject.encoder.encoder.why_not(n) is None]
        candidates = layers_of(reached, options.qkv)
        among = f"layers that reach {options.target}"
        layers = named_layers(options.layers, candidates, among=among) or candidates
        self._require_same_clip(header, layers)
        if self.gradient_of is GradientOf.TARGET:
            gradients = (
                subject.forget_gradient(layers)
                if isinstance(subject, LlavaSubject)
                else subject.forget_gradient(layers, self.pointer.anchor)
            )
        else:
            gradients = {
                layer: torch.from_numpy(layer_gradient(store, address, layer)) for layer in layers
            }
        moves = moves_of(subject, gradients, direction=options.spec)
        if not moves:
            raise InputError(f"no layer that reaches {options.target} has a forget gradient")
        if isinstance(subject, LlavaSubject):
            moves = by_gain(subject, moves, gradients)
        goal = None if options.full else options.goal
        return [replace(move, goal=goal) for move in moves]

    def _require_same_clip(self, header: GradientHeader, layers: Sequence[str]) -> None:
        """Raise StaleError unless the target contains the CLIP of the gradients.

        Norms decide: another precision changes them by a thousandth, another model by more.
        With the target's own gradient, the tower may have been trained further, so only shapes
        have to agree.
        """
        name, further = self.manifest.name, self.gradient_of is GradientOf.TARGET
        for layer in sorted({Layer.parse(layer).parameter for layer in layers}):
            value, known = self.subject.encoder.value(layer), header.weights[layer]
            same = further or math.isclose(float(value.float().norm()), known.norm, rel_tol=0.01)
            if not same or tuple(value.shape) != tuple(known.shape):
                raise StaleError(
                    f"{self.options.target} is not built on the CLIP of the gradients of {name}: "
                    f"its {layer} differs",
                    hint=f"run `slsgu build-sets {quote(name)}` and `slsgu grad {quote(name)}` "
                    "with that CLIP",
                )

    def clip_starts(self, store: Store, moves: Sequence[TargetMove]) -> dict[str, float]:
        """Return for each layer the shortest tested step with an FA@1 of 0 on CLIP, if any."""
        device = pick_device(self.options.device)
        resolved, module = load_graded(self.pointer, device)
        whole = prepare(store, self.manifest, module, tokenize=tokenizer(resolved), device=device)
        few = Evaluation(whole.model, whole.vision, whole.text, whole.forget, {})
        few.base_pass((move.layer for move in moves), cache_bytes=spare(device))
        starts, top1 = {}, attrgetter("forget.top1")
        for move in moves:
            norm, along = float(move.weight.norm()), move.along.to(device)
            evaluator = Evaluator(few, move.layer, norm, along, move.direction)
            trials = islice(bisection(evaluator.measure, top1, move.first), CLIP_STEPS)
            enough = [trial.step for trial in trials if trial.forget.top1 == 0]
            if enough:
                starts[move.layer] = min(enough)
        return starts


class TargetSearch(StepSearch[TargetTrial]):
    """The search on one target, with its record in a store and the name of its `edit`.

    `began` is the start of the search by the performance counter, if it was earlier.
    """

    def __init__(
        self,
        store: Store,
        record: TargetTrials,
        moves: Sequence[TargetMove],
        options: TargetSearchOptions,
        *,
        began: float | None = None,
    ) -> None:
        of_layer = {move.layer: move.move for move in moves}
        trials = {
            (of_layer.get(trial.layer, (trial.layer, record.direction)), trial.step): trial
            for trial in record.trials
        }
        super().__init__(trials, self.left_to_forget)
        self.store, self.options = store, options
        self.edit = target_edit(record.name, options.target)
        self.moves = {move.layer: move for move in moves}
        self.lengthened: list[tuple[TrialKey, float]] = []
        # Includes the time of interrupted runs.
        self._began = (perf_counter() if began is None else began) - record.seconds
        self._header = record

    @property
    def record(self) -> TargetTrials:
        """The trials so far, as an artifact."""
        return replace(self._header, trials=tuple(self.trials.values()))

    def reaches(self, trial: TargetTrial) -> bool:
        """Return whether a trial reaches the goal."""
        return meets(self.options.goal, trial.concept)

    def left_to_forget(self, trial: TargetTrial) -> float:
        """Return the percentage that shows the concept; 0 once the goal is reached."""
        return 0.0 if self.reaches(trial) else trial.concept.percent or 0.0

    def lost(self, trial: TargetTrial) -> float:
        """Return how many points of accuracy others lose in a trial."""
        before, others = self._header.before, trial.others
        if before is None or others is None:
            return 0.0
        return max(0.0, (before.ira or 0.0) - (others.percent or 0.0))

    def run(self, moves: Iterable[TargetMove], starts: Mapping[str, float]) -> TargetTrial:
        """Search along moves, best first, and return the chosen trial.

        Stop after a move with the entire overshoot and no loss: no later move can beat it.
        """
        for move in moves:
            self.bisect(move, self.options.steps, starts.get(move.layer), close=CLOSE)
            if self.lengthen(move) and not self.options.full:
                break
        return self.choose()

    def trial(self, candidate: Candidate[TargetTrial], step: float) -> TargetTrial:
        """Return the trial of a step, in a full search with its retained accuracy.

        A recorded trial that stopped early for another goal is measured again.
        """
        key = self.key(candidate.move, step)
        if key in self.trials and self._cut_short(self.trials[key]):
            del self.trials[key]
        trial = super().trial(candidate, step)
        return self.with_others(trial) if self.options.full else trial

    def _cut_short(self, trial: TargetTrial) -> bool:
        whole = self._header.before.concept.total if self._header.before else trial.concept.total
        missed = not meets(self.options.goal, Share(trial.concept.count, whole))
        return trial.concept.total < whole and (self.options.full or not missed)

    def keep(self, key: TrialKey, trial: TargetTrial) -> None:
        """Record a trial at once, because each takes minutes on a large target."""
        super().keep(key, trial)
        self._write(seconds=perf_counter() - self._began)

    def _write(self, **changed: Any) -> None:
        """Change other fields of the record than its trials, and write it."""
        self._header = replace(self._header, **changed)
        self.store.write_record(Artifact.TARGET_TRIALS.path(self.edit), self.record)

    def lengthen(self, move: TargetMove) -> bool:
        """Extend the shortest sufficient step by the largest acceptable part of the overshoot.

        If that step itself costs others too much, shorten it. Return whether the entire
        overshoot applies and others lose nothing.
        """
        enough = self.shortest(move.move)
        if enough is None:
            return False
        beyond = (self.options.overshoot - 1) * enough
        for part in (*PARTS, 0.0) if beyond else (1.0, 0.0):
            trial = self.with_others(self.trial(move, enough + part * beyond))
            if self.reaches(trial) and self.lost(trial) <= self.options.max_loss:
                break
        if self.lost(trial) > self.options.max_loss:
            part, trial = NO_ROOM, self.shorten(move, enough)
        self.path.append((move.move, trial.step))
        self.lengthened.append(((move.move, trial.step), part))
        return part == 1 and self.lost(trial) == 0

    def shorten(self, move: TargetMove, enough: float) -> TargetTrial:
        """Return the longest tested step below a sufficient one with an acceptable loss.

        If no tested step is acceptable, return the shortest.
        """
        whole = replace(move, goal=None)
        low, high, longest = 0.0, enough, None
        for _ in range(SHORTENINGS):
            trial = self.with_others(self.trial(whole, (low + high) / 2))
            if self.lost(trial) <= self.options.max_loss:
                low, longest = trial.step, trial
            else:
                high = trial.step
        return longest or trial

    def choose(self) -> TargetTrial:
        """Return the extended step with the smallest loss among those with the most overshoot.

        If no acceptable step reaches the goal, return the step that forgets most. Ties go to
        the most important layer.
        """
        if not self.lengthened:
            path = [self.trials[key] for key in self.path]
            return self.with_others(min(path, key=lambda trial: trial.concept.percent or 0.0))
        most = max(part for _, part in self.lengthened)
        best = [self.trials[key] for key, part in self.lengthened if part == most]
        if most == NO_ROOM:
            return min(best, key=self.left_to_forget)
        return min(best, key=self.lost)

    def with_others(self, trial: TargetTrial) -> TargetTrial:
        """Return the trial with its retained accuracy, measured if it is missing."""
        if trial.others is None:
            move = self.moves[trial.layer]
            trial = replace(trial, others=move.others(trial.step))
            self.keep((move.move, trial.step), trial)
        return trial

    def figures(self, chosen: TargetTrial, subject: Subject) -> TargetFigures:
        """Return the effect of the chosen step in the test split, by every judge."""
        before = self._reported(None, 0.0, subject)
        after = self._reported(chosen.layer, chosen.step, subject)
        first, *further = subject.judges
        return TargetFigures(
            target=self._header.target,
            fingerprint=self._header.target_fingerprint,
            before=before[first],
            after=after[first],
            judge=first,
            is_test=subject.is_test,
            further=tuple(JudgeFigures(name, before[name], after[name]) for name in further),
            applied=subject.applied,
        )

    def write_edit(self, plan: TargetPlan, chosen: TargetTrial, figures: TargetFigures) -> None:
        """Write the edit of a chosen trial, with its figures."""
        record, move = self.record, self.moves[chosen.layer]
        edit = step_edit(
            plan.manifest,
            plan.pointer,
            chosen.layer,
            step=chosen.step,
            share=chosen.share,
            direction=move.direction,
            along=move.along.cpu().numpy(),
            before=move.weight.cpu().numpy(),
            name=self.edit,
            retain_data=record.retain_data,
            forgotten=self.reaches(chosen),
            target=figures,
        )
        write_edit(self.store, edit)

    def _reported(self, layer: str | None, step: float, subject: Subject) -> dict[str, Effect]:
        """Return the report of a step, or of the original; measure it unless it is recorded."""
        place, judges = (layer, step, subject.to_test.digest), set(subject.judges)
        for known in self._header.reports:
            if (known.layer, known.step, known.asked) == place and judges <= set(known.effects):
                return known.effects
        report = TargetReport(
            *place, subject.report() if layer is None else self.moves[layer].report(step)
        )
        self._write(reports=(*self._header.reports, report))
        return report.effects


def search_target(store: Store, name: str, *, options: TargetSearchOptions) -> TargetSearchResult:
    """Search for the layer and step that make a target forget, and write the edit.

    Raises MissingError, InputError, StaleError and UsageError.
    """
    began = perf_counter()
    options = replace(options, judges=judge_specs(store, name, options.judges))
    plan = TargetPlan.load(store, name, options)
    ranked = plan.moves(store)
    moves = ranked if options.layers else ranked[: options.top]
    with torch.no_grad():
        record = _resume(store, plan, ranked)
        starts = {}
        if plan.gradient_of is GradientOf.CLIP:
            starts = plan.clip_starts(store, moves)
        run = TargetSearch(store, record, moves, options, began=began)
        best = run.run(moves, starts)
        figures = run.figures(best, plan.subject)
        run.write_edit(plan, best, figures)
    return TargetSearchResult(
        run.record, best, run.reaches(best), len(record.trials), run.edit, figures, options.max_loss
    )


def _resume(store: Store, plan: TargetPlan, moves: Sequence[TargetMove]) -> TargetTrials:
    """Return the recorded trials if their inputs are the same, otherwise none."""
    manifest, pointer, options = plan.manifest, plan.pointer, plan.options
    fresh = TargetTrials(
        name=manifest.name,
        target=str(options.target),
        target_fingerprint=folder_fingerprint(options.target),
        gradient_of=plan.gradient_of,
        forget=pointer.forget,
        forget_data=pointer.forget_data,
        retain_data=pointer.retain_data,
        evals=manifest.measured_on(),
        direction=options.spec,
        judge=plan.subject.judges[0] if isinstance(plan.subject, PipelineSubject) else None,
        budget=options.budget,
        goal=options.goal,
        importance={move.layer: move.importance for move in moves},
        before=None,
        trials=(),
        seconds=0.0,
        version=slsgu_cli.__version__,
        asked=plan.subject.searched.digest,
        applied=plan.subject.applied,
    )
    edit = target_edit(manifest.name, options.target)
    record = resume(store, Artifact.TARGET_TRIALS, edit, fresh)
    if record.before is None:
        return replace(record, before=Effect(plan.subject.concept(), plan.subject.others()))
    return record
