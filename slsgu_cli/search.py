"""What `slsgu search` does: a step size for each front layer, and the best of them.

Algorithm 3 steers on forget accuracy alone, which needs the few images of the concept.
Utility is measured afterwards, only for steps whose forget accuracy is the least of all,
and for images of an edited vision tower only until the step can no longer win. The layer
and step chosen are those that measuring everything would choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from shlex import quote
from typing import TYPE_CHECKING

import slsgu_cli
from slsgu_cli.console import Console
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.gradients import check_inputs
from slsgu_cli.layout import (
    gradient_path,
    read_manifest,
    read_pointer,
    read_ranking,
    trials_path,
)
from slsgu_cli.memory import spare
from slsgu_cli.models import fingerprint, load, pick_device, resolve, tokenizer
from slsgu_cli.naming import find_layers
from slsgu_cli.records import (
    Accuracy,
    EditHeader,
    GradientPointer,
    LayerScore,
    Precision,
    Ranking,
    SetManifest,
    Steer,
    Trial,
    Trials,
)
from slsgu_cli.stepsize import best, first_step, next_step
from slsgu_cli.store import Store

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from slsgu_cli.evaluation import Evaluation
    from slsgu_cli.trial import Probe

FORGET = "(forget)"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How to search. `full` measures the utility of every trial, winner or not."""

    layers: Sequence[str] = ()
    steer: Steer = Steer.FA1
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


def search(store: Store, name: str, *, options: SearchOptions, console: Console) -> SearchResult:
    """Search the front layers of set `name`, record the trials, write the edit.

    Raises MissingError, StaleError, InputError and UsageError.
    """
    if options.precision is Precision.BF16:
        raise UsageError(
            "a search in bf16 would count accuracies of a rounded model",
            hint="--precision fp32, or tf32 on a GPU that has it",
        )
    import torch

    from slsgu_cli.gradpass import arithmetic

    manifest = read_manifest(store, name)
    pointer = read_pointer(store, manifest)
    layers = _layers(read_ranking(store, pointer), options.layers)
    options = replace(options, device=pick_device(options.device))
    with torch.no_grad(), arithmetic(options.precision):
        evaluation = _evaluation(store, manifest, pointer, layers, options, console)
        trials = _resume(store, manifest, pointer, evaluation, options, console)
        recorded = len(trials.trials)
        run = _Run(store, evaluation, trials, options, console)
        for score in layers:
            run.bisect(score, _gradient(store, pointer, score.layer, options.device))
        chosen = run.choose()
        _write_edit(store, manifest, pointer, run, chosen)
    store.write_record(trials_path(name), run.trials)
    return SearchResult(run.trials, chosen, _accuracy(chosen, options.steer) == 0, recorded)


class _Run:
    """The state of one search: probes, trials by layer and step, and the path taken."""

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
        self.probes: dict[str, Probe] = {}
        self.path: list[tuple[str, float]] = []
        self.found = {(trial.layer, trial.step): trial for trial in trials.trials}
        self._header = trials

    @property
    def trials(self) -> Trials:
        """Return what was recorded so far, as an artifact."""
        return replace(self._header, trials=tuple(self.found.values()))

    def bisect(self, score: LayerScore, gradient: "Tensor") -> None:
        """Run Algorithm 3 on one layer, on forget accuracy alone."""
        from slsgu_cli.trial import Probe

        probe = self.probes[score.layer] = Probe(self.evaluation, score, gradient)
        first = first_step(score.weight_norm, score.forget_norm)
        tried: list[tuple[float, float]] = []
        with self.console.progress(score.layer, self.options.steps) as ticker:
            for _ in range(self.options.steps):
                step = next_step(tried, first)
                trial = self.found.get((score.layer, step)) or self._try(probe, step)
                self.found[score.layer, step] = trial
                tried.append((step, _accuracy(trial, self.options.steer)))
                ticker.advance()
        self.path += [(score.layer, step) for step, _ in tried]
        self.store.write_record(trials_path(self._header.name), self.trials)

    def choose(self) -> Trial:
        """Measure the utility of the steps that may win, and return the best (Algorithm 1)."""
        from slsgu_cli.trial import UtilityMeter, mean_top1

        least = min(_accuracy(self.found[key], self.options.steer) for key in self.path)
        meter = UtilityMeter(self.evaluation)
        beat = float("-inf")
        for key in sorted(set(self.path), key=self._cost):
            trial = self.found[key]
            may_win = _accuracy(trial, self.options.steer) == least
            if trial.utility is None and (may_win or self.options.full):
                bar = float("-inf") if self.options.full else beat
                found = meter.measure(self.probes[trial.layer], trial.step, beat=bar)
                self.found[key] = trial = replace(trial, utility=found)
            if may_win and trial.utility is not None:
                beat = max(beat, mean_top1(trial.utility))
        measured = [key for key in self.path if self.found[key].utility is not None]
        figures = [
            (
                _accuracy(self.found[key], self.options.steer),
                mean_top1(self.found[key].utility or {}),
            )
            for key in measured
        ]
        return self.found[measured[best(figures)]]

    def _try(self, probe: "Probe", step: float) -> Trial:
        score = probe.score
        return Trial(
            layer=score.layer,
            tower=score.tower,
            step=step,
            share=step * score.forget_norm / score.weight_norm,
            forget=probe.forget_accuracy(step),
            utility=None,
        )

    def _cost(self, key: tuple[str, float]) -> tuple[bool, int, float]:
        """Order trials so that the cheap ones set the mark that dear ones must reach."""
        probe = self.probes[key[0]]
        return (probe.score.tower == "vision", -probe.stage, self.found[key].share)


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


def _evaluation(
    store: Store,
    manifest: SetManifest,
    pointer: GradientPointer,
    layers: Sequence[LayerScore],
    options: SearchOptions,
    console: Console,
) -> "Evaluation":
    """Load the model the gradients belong to and run it once over the evaluation data."""
    from slsgu_cli.evaluation import prepare

    model = resolve(pointer.model)
    if fingerprint(model) != pointer.model_fingerprint:
        raise StaleError(
            f"{pointer.model} has other weights than when its gradients were computed",
            hint=f"run `slsgu grad {quote(manifest.name)}`",
        )
    check_inputs(manifest, model)
    module = load(model, options.device)
    evaluation = prepare(store, manifest, module, tokenize=tokenizer(model), device=options.device)
    for tower in {score.tower for score in layers}:
        if not evaluation.tower(tower).exact_split:
            console.detail(f"the {tower} tower is not split: every trial runs all of it")
    budget = options.cache_budget if options.cache_budget is not None else spare(options.device)
    evaluation.base_pass((s.layer for s in layers), cache_bytes=budget, console=console)
    return evaluation


def _resume(
    store: Store,
    manifest: SetManifest,
    pointer: GradientPointer,
    evaluation: "Evaluation",
    options: SearchOptions,
    console: Console,
) -> Trials:
    """Return the recorded trials if they were made from the same things, else none."""
    shown = f"{manifest.forget_eval or manifest.forget.fingerprint}:{manifest.concept}"
    evals = {name: ref.fingerprint for name, ref in sorted(manifest.evals.items())}
    fresh = Trials(
        name=manifest.name,
        forget=pointer.forget,
        model_fingerprint=pointer.model_fingerprint,
        evals=evals | {FORGET: shown},
        precision=options.precision,
        steer=options.steer,
        baseline_forget=evaluation.forget.base_accuracy(),
        baseline_utility={n: g.base_accuracy() for n, g in evaluation.utility.items()},
        trials=(),
        version=slsgu_cli.__version__,
    )
    if not store.exists(trials_path(manifest.name)):
        return fresh
    try:
        old = store.read_record(trials_path(manifest.name), Trials)
    except (StaleError, InputError) as error:
        console.note(f"recorded trials cannot be used and are made again: {error}")
        return fresh
    made_from = attrgetter("forget", "model_fingerprint", "evals", "precision")
    return replace(fresh, trials=old.trials) if made_from(old) == made_from(fresh) else fresh


def _gradient(store: Store, pointer: GradientPointer, layer: str, device: str) -> "Tensor":
    import torch

    values = store.read_tensors(gradient_path(pointer.forget), [layer])[layer]
    return torch.from_numpy(values).to(device)


def _write_edit(
    store: Store, manifest: SetManifest, pointer: GradientPointer, run: _Run, chosen: Trial
) -> None:
    from slsgu_cli.edits import make_edit, write_edit
    from slsgu_cli.weights import layer_digests

    probe = run.probes[chosen.layer]
    before = probe.weight.cpu().numpy()
    header = EditHeader(
        name=manifest.name,
        concept=manifest.concept,
        layer=chosen.layer,
        tower=chosen.tower,
        step=chosen.step,
        share=chosen.share,
        model=pointer.model,
        model_fingerprint=pointer.model_fingerprint,
        digests=layer_digests(before),
        gradient=pointer.forget,
        steer=run.options.steer,
        baseline_forget=run.trials.baseline_forget,
        baseline_utility=run.trials.baseline_utility,
        forget=chosen.forget,
        utility=chosen.utility,
        version=slsgu_cli.__version__,
    )
    delta = (chosen.step * probe.gradient).cpu().numpy()
    write_edit(store, make_edit(header, delta=delta, before=_compact(before)))


def _compact(values: "npt.NDArray[np.float32]") -> "npt.NDArray[np.floating]":
    """Return values of a half-precision checkpoint in half precision, if that is exact."""
    half = values.astype("float16")
    return half if (half == values).all() else values


def _accuracy(trial: Trial, steer: Steer) -> float:
    figures: Accuracy = trial.forget
    return figures.top1 if steer is Steer.FA1 else figures.top5
