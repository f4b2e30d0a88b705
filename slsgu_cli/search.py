"""What `slsgu search` does: a step size for each front layer, and the best of them.

Algorithm 3 steers on forget accuracy alone, which needs the few images of the concept.
Utility is measured afterwards, only for steps whose forget accuracy is the least of all,
and for images of an edited vision tower only until the step can no longer win. The layer
and step chosen are those that measuring everything would choose.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from shlex import quote
from typing import TYPE_CHECKING

import slsgu_cli
from slsgu_cli.console import Console
from slsgu_cli.directions import Moments, ensure_moments, forget_direction
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.gradients import load_graded
from slsgu_cli.layout import read_manifest, read_pointer, read_ranking, trials_path
from slsgu_cli.memory import spare
from slsgu_cli.models import pick_device, resolve, tokenizer
from slsgu_cli.naming import find_layers
from slsgu_cli.records import (
    Direction,
    EditHeader,
    GradientPointer,
    JointRef,
    LayerScore,
    Precision,
    Qkv,
    Ranking,
    SetManifest,
    Steer,
    Trial,
    Trials,
)
from slsgu_cli.stepsize import best, first_step, left_to_forget, next_step
from slsgu_cli.store import Store

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from slsgu_cli.edits import Edit
    from slsgu_cli.evaluation import Evaluation, SharedEvaluation
    from slsgu_cli.trial import Probe

FORGET = "(forget)"
MARGIN = 0.02
# A trial's layer, the ridge that whitened its direction, and its step.
Key = tuple[str, float | None, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How to search. `full` measures the utility of every trial, winner or not.

    `direction`, `qkv` and, of the whitened one, `ridges` are those of the ranking where none are
    given; each layer is searched with each ridge. `margin` is a cosine, for that steer.
    """

    layers: Sequence[str] = ()
    direction: Direction | None = None
    ridges: Sequence[float] = ()
    qkv: Qkv | None = None
    steer: Steer = Steer.FA1
    margin: float = MARGIN
    steps: int = 10
    full: bool = False
    device: str = "cpu"
    precision: Precision = Precision.FP32
    cache_budget: int | None = None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Every trial, the chosen one, and whether it forgets completely."""

    trials: Trials
    chosen: Trial
    forgotten: bool
    reused: int


@dataclass(frozen=True, slots=True)
class Case:
    """One set to search: its gradients, the layers to try, and the directions they move in.

    `options` have the direction, the ridges and the device that are in force.
    """

    manifest: SetManifest
    pointer: GradientPointer
    layers: tuple[LayerScore, ...]
    options: SearchOptions
    moments: Moments | None

    @property
    def name(self) -> str:
        """The name of the set."""
        return self.manifest.name

    def probes(self, store: Store, evaluation: "Evaluation") -> "Iterator[Probe]":
        """Yield a probe for every direction of every layer."""
        import torch

        from slsgu_cli.trial import Probe

        for score in self.layers:
            for ridge in self.options.ridges if self.moments else (None,):
                along = forget_direction(
                    store, self.pointer, score.layer, ridge=ridge or 0, moments=self.moments
                )
                direction = torch.from_numpy(along).to(self.options.device)
                yield Probe(evaluation, score, direction, ridge)


def read_case(store: Store, name: str, *, options: SearchOptions, console: Console) -> Case:
    """Return what to search of set `name`, with the moments its directions take.

    Raises MissingError, StaleError, InputError and UsageError.
    """
    if options.precision is Precision.BF16:
        raise UsageError(
            "a search in bf16 would count accuracies of a rounded model",
            hint="--precision fp32, or tf32 on a GPU that has it",
        )
    manifest = read_manifest(store, name)
    pointer = read_pointer(store, manifest)
    ranking = read_ranking(store, pointer)
    layers = _layers(ranking, options.layers)
    options = _resolved(options, ranking)
    moments = None
    if options.direction is Direction.WHITENED:
        names = [score.layer for score in layers]
        moments = ensure_moments(
            store, manifest, pointer, names, device=options.device, console=console
        )
    return Case(manifest, pointer, tuple(layers), options, moments)


def search(
    store: Store,
    name: str,
    *,
    options: SearchOptions,
    console: Console,
    evaluation: "Evaluation | None" = None,
    records: Store | None = None,
) -> SearchResult:
    """Search the front layers of set `name`, record the trials, write the edit.

    `evaluation` is the set's, after its base pass, where several sets share one. Trials
    are looked up and written in `records`, and so is the edit; default: the store.
    Raises MissingError, StaleError, InputError and UsageError.
    """
    import torch

    from slsgu_cli.edits import write_edit
    from slsgu_cli.gradpass import arithmetic

    records = records or store
    case = read_case(store, name, options=options, console=console)
    options = case.options
    with torch.no_grad(), arithmetic(options.precision):
        evaluation = evaluation or load_evaluation(store, case, console)
        fresh = fresh_trials(case, evaluation)
        trials = recorded_trials(records, trials_path(name), fresh, console)
        recorded = len(trials.trials)
        run = _Run(records, evaluation, trials, options, console)
        for probe in case.probes(store, evaluation):
            run.bisect(probe)
        chosen = run.choose()
        probe = run.probes[chosen.layer, chosen.ridge]
        write_edit(records, searched_edit(case, probe, run.trials, chosen))
    records.write_record(trials_path(name), run.trials)
    return SearchResult(run.trials, chosen, run.left(chosen) == 0, recorded)


class _Run:
    """The state of one search: probes, trials by their keys, and the path taken."""

    def __init__(
        self,
        store: Store,
        evaluation: "Evaluation",
        trials: Trials,
        options: SearchOptions,
        console: Console,
    ) -> None:
        self.store = store
        self.evaluation = evaluation
        self.options = options
        self.console = console
        self.probes: dict[tuple[str, float | None], Probe] = {}
        self.path: list[Key] = []
        self.found: dict[Key, Trial] = {(t.layer, t.ridge, t.step): t for t in trials.trials}
        self._header = trials

    @property
    def trials(self) -> Trials:
        """Return what was recorded so far, as an artifact."""
        return replace(self._header, trials=tuple(self.found.values()))

    def left(self, trial: Trial) -> float:
        """Return what a trial leaves to forget, by what the search steers on."""
        return left_to_forget(trial, self.options.steer, self.options.margin)

    def bisect(self, probe: "Probe") -> None:
        """Run Algorithm 3 along one direction of one layer, on what is left to forget alone."""
        layer, ridge = line = probe.score.layer, probe.ridge
        self.probes[line] = probe
        first = first_step(probe.score.weight_norm, probe.norm)
        tried: list[tuple[float, float]] = []
        with self.console.progress(layer, self.options.steps) as ticker:
            for _ in range(self.options.steps):
                step = next_step(tried, first)
                trial = self.found.get((*line, step)) or probe.trial(step)
                self.found[layer, ridge, step] = trial
                tried.append((step, self.left(trial)))
                ticker.advance()
        self.path += [(layer, ridge, step) for step, _ in tried]
        self.store.write_record(trials_path(self._header.name), self.trials)

    def choose(self) -> Trial:
        """Measure the utility of the steps that may win, and return the best (Algorithm 1)."""
        from slsgu_cli.trial import UtilityMeter, mean_top1

        least = min(self.left(self.found[key]) for key in self.path)
        meter = UtilityMeter(self.evaluation)
        beat = float("-inf")
        for key in sorted(set(self.path), key=self._cost):
            trial = self.found[key]
            may_win = self.left(trial) == least
            if trial.utility is None and (may_win or self.options.full):
                bar = float("-inf") if self.options.full else beat
                probe = self.probes[trial.layer, trial.ridge]
                found = meter.measure(probe, trial.step, beat=bar)
                self.found[key] = trial = replace(trial, utility=found)
            if may_win and trial.utility is not None:
                beat = max(beat, mean_top1(trial.utility))
        measured = [key for key in self.path if self.found[key].utility is not None]
        figures = [
            (self.left(self.found[key]), mean_top1(self.found[key].utility or {}))
            for key in measured
        ]
        return self.found[measured[best(figures)]]

    def _cost(self, key: Key) -> tuple[bool, int, float]:
        """Order trials so that the cheap ones set the mark that dear ones must reach."""
        probe = self.probes[key[:2]]
        return (probe.score.tower == "vision", -probe.stage, self.found[key].share)


def _resolved(options: SearchOptions, ranking: Ranking) -> SearchOptions:
    """Return the options with the ranking's direction and ridge, and the device.

    Raises StaleError where the layers were ranked for another direction, or other layers were.
    """
    direction = options.direction or ranking.direction
    if direction is not ranking.direction:
        raise StaleError(
            f"the layers of {ranking.name} were ranked for the direction {ranking.direction}, "
            f"not {direction}",
            hint=f"run `slsgu rank {quote(ranking.name)} --direction {direction}`",
        )
    if options.qkv not in (None, ranking.qkv):
        raise StaleError(
            f"the layers of {ranking.name} were ranked with query, key and value {ranking.qkv}, "
            f"not {options.qkv}",
            hint=f"run `slsgu rank {quote(ranking.name)} --qkv {options.qkv}`",
        )
    if direction is Direction.GRADIENT and options.ridges:
        raise UsageError(
            "--ridge is for the whitened direction",
            hint=f"run `slsgu rank {quote(ranking.name)} --direction whitened`",
        )
    ridges = tuple(dict.fromkeys(options.ridges)) or (
        () if ranking.ridge is None else (ranking.ridge,)
    )
    return replace(options, direction=direction, ridges=ridges, device=pick_device(options.device))


def _layers(ranking: Ranking, wanted: Sequence[str]) -> list[LayerScore]:
    """Return the front layers, or those asked for by name or by a part that fits one only."""
    if not wanted:
        return [score for score in ranking.scores if score.front]
    chosen = []
    for text in wanted:
        meant = find_layers(text, [score.layer for score in ranking.scores])
        fitting = [score for score in ranking.scores if score.layer in meant]
        if len(fitting) != 1:
            near = ", ".join(score.layer for score in fitting[:5]) or "none"
            raise UsageError(
                f"--layer {text} fits {len(fitting)} ranked layers: {near}",
                hint=f"run `slsgu rank {quote(ranking.name)}` for their names",
            )
        chosen += fitting
    return chosen


def load_evaluation(store: Store, case: Case, console: Console) -> "Evaluation":
    """Load the model the gradients belong to and run it once over the evaluation data."""
    from slsgu_cli.evaluation import prepare

    device = case.options.device
    model, module = load_graded(case.manifest, case.pointer, device)
    evaluation = prepare(store, case.manifest, module, tokenize=tokenizer(model), device=device)
    run_base_pass(evaluation, case.layers, case.options, console)
    return evaluation


def run_base_pass(
    evaluation: "Evaluation | SharedEvaluation",
    layers: Sequence[LayerScore],
    options: SearchOptions,
    console: Console,
) -> None:
    """Run the original model once within the cache budget; tell of towers that are not split."""
    for tower in {score.tower for score in layers}:
        if not evaluation.tower(tower).exact_split:
            console.detail(f"the {tower} tower is not split: every trial runs all of it")
    budget = options.cache_budget if options.cache_budget is not None else spare(options.device)
    evaluation.base_pass((s.layer for s in layers), cache_bytes=budget, console=console)


def fresh_trials(case: Case, evaluation: "Evaluation") -> Trials:
    """Return a record without trials, with what they will be made from."""
    manifest, pointer, options = case.manifest, case.pointer, case.options
    return Trials(
        name=manifest.name,
        forget=pointer.forget,
        direction=options.direction or Direction.GRADIENT,
        retain_data=pointer.retain_data if options.direction is Direction.WHITENED else None,
        model_fingerprint=pointer.model_fingerprint,
        evals=measured_on(manifest),
        precision=options.precision,
        steer=options.steer,
        margin=options.margin if options.steer is Steer.MARGIN else None,
        baseline_forget=evaluation.forget.base_accuracy(),
        baseline_utility={n: g.base_accuracy() for n, g in evaluation.utility.items()},
        trials=(),
        version=slsgu_cli.__version__,
    )


def measured_on(manifest: SetManifest) -> dict[str, str]:
    """Return the fingerprints of what the accuracies of a set are measured on."""
    shown = f"{manifest.forget_eval or manifest.forget.fingerprint}:{manifest.concept}"
    evals = {name: ref.fingerprint for name, ref in sorted(manifest.evals.items())}
    return evals | {FORGET: shown}


def recorded_trials(store: Store, path: str, fresh: Trials, console: Console) -> Trials:
    """Return `fresh` with the trials recorded at `path`, if they were made from the same things."""
    if not store.exists(path):
        return fresh
    try:
        old = store.read_record(path, Trials)
    except (StaleError, InputError) as error:
        console.note(f"recorded trials cannot be used and are made again: {error}")
        return fresh
    made_from = attrgetter(
        "forget", "direction", "retain_data", "model_fingerprint", "evals", "precision"
    )
    return replace(fresh, trials=old.trials) if made_from(old) == made_from(fresh) else fresh


def searched_edit(
    case: Case, probe: "Probe", trials: Trials, chosen: Trial, joint: JointRef | None = None
) -> "Edit":
    """Return the edit that a chosen trial of a search amounts to."""
    from slsgu_cli.edits import make_edit
    from slsgu_cli.weights import layer_digests

    before = probe.weight.cpu().numpy()
    header = EditHeader(
        name=case.name,
        concept=case.manifest.concept,
        layer=chosen.layer,
        tower=chosen.tower,
        step=chosen.step,
        share=chosen.share,
        model=case.pointer.model,
        model_fingerprint=case.pointer.model_fingerprint,
        digests=layer_digests(before),
        gradient=case.pointer.forget,
        direction=trials.direction,
        ridge=chosen.ridge,
        retain_data=trials.retain_data,
        steer=trials.steer,
        margin=trials.margin,
        forgotten=left_to_forget(chosen, trials.steer, trials.margin) == 0,
        baseline_forget=trials.baseline_forget,
        baseline_utility=trials.baseline_utility,
        forget=chosen.forget,
        utility=chosen.utility,
        joint=joint,
        version=slsgu_cli.__version__,
        layout=resolve(case.pointer.model).spelling,
    )
    delta = (chosen.step * probe.direction).cpu().numpy()
    return make_edit(header, delta=delta, before=compact(before))


def compact(values: "npt.NDArray[np.float32]") -> "npt.NDArray[np.floating]":
    """Return values of a half-precision checkpoint in half precision, if that is exact."""
    half = values.astype("float16")
    return half if (half == values).all() else values
