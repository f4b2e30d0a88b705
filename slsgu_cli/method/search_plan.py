"""What a search is asked for, what it finds on record, what it leaves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from shlex import quote
from typing import TYPE_CHECKING

import slsgu_cli
from slsgu_cli.checkpoints.edits import Edit, make_edit
from slsgu_cli.checkpoints.layers import find_layers
from slsgu_cli.checkpoints.weights import layer_digests
from slsgu_cli.clip.models import pick_device, resolve
from slsgu_cli.errors import StaleError, UsageError
from slsgu_cli.method.directions import Moments, ensure_moments, forget_direction
from slsgu_cli.method.scoring import left_to_forget
from slsgu_cli.records.method import (
    Direction,
    EditHeader,
    GradientPointer,
    JointRef,
    LayerScore,
    Precision,
    Qkv,
    Ranking,
    Steer,
    Tower,
    Trial,
    Trials,
)
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.store.artifacts import read_manifest, read_pointer, read_ranking, recorded
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from slsgu_cli.clip.evaluation import Evaluation
    from slsgu_cli.method.trial import Probe


MARGIN = 0.02


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
class SearchPlan:
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

        from slsgu_cli.method.trial import Probe

        for score in self.layers:
            for ridge in self.options.ridges if self.moments else (None,):
                along = forget_direction(
                    store, self.pointer, score.layer, ridge=ridge or 0, moments=self.moments
                )
                direction = torch.from_numpy(along).to(self.options.device)
                yield Probe(evaluation, score, direction, ridge)


def read_plan(store: Store, name: str, *, options: SearchOptions) -> SearchPlan:
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
        moments = ensure_moments(store, manifest, pointer, names, device=options.device)
    return SearchPlan(manifest, pointer, tuple(layers), options, moments)


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


FORGET = "(forget)"


def fresh_trials(case: SearchPlan, evaluation: "Evaluation") -> Trials:
    """Return a record without trials, with what they will be made from."""
    manifest, pointer, options = case.manifest, case.pointer, case.options
    return Trials(
        name=manifest.name,
        forget=pointer.forget,
        direction=options.direction or Direction.GRADIENT,
        retain_data=pointer.retain_data if options.direction is Direction.WHITENED else None,
        model_fingerprint=pointer.model_fingerprint,
        evals=evaluation_blocks(manifest),
        precision=options.precision,
        steer=options.steer,
        margin=options.margin if options.steer is Steer.MARGIN else None,
        baseline_forget=evaluation.forget.base_accuracy(),
        baseline_utility={n: g.base_accuracy() for n, g in evaluation.utility.items()},
        trials=(),
        version=slsgu_cli.__version__,
    )


def evaluation_blocks(manifest: SetManifest) -> dict[str, str]:
    """Return the fingerprints of what the accuracies of a set are measured on."""
    shown = f"{manifest.forget_eval or manifest.forget.fingerprint}:{manifest.concept}"
    evals = {name: ref.fingerprint for name, ref in sorted(manifest.evals.items())}
    return evals | {FORGET: shown}


def recorded_trials(store: Store, path: str, fresh: Trials) -> Trials:
    """Return `fresh` with the trials recorded at `path`, if they were made from the same things."""
    unusable = "recorded trials cannot be used and are made again"
    old = recorded(store, path, Trials, unusable=unusable)
    made_from = attrgetter(
        "forget", "direction", "retain_data", "model_fingerprint", "evals", "precision"
    )
    if old is None or made_from(old) != made_from(fresh):
        return fresh
    return replace(fresh, trials=old.trials)


def unmeasured_edit(
    manifest: SetManifest,
    pointer: GradientPointer,
    *,
    layer: str,
    tower: Tower,
    step: float,
    share: float,
    direction: Direction,
    ridge: float | None,
    retain_data: str | None,
    delta: "npt.NDArray[np.float32]",
    before: "npt.NDArray[np.floating]",
) -> Edit:
    """Return the edit that adds `delta` to a layer of a set's model, with no figures of it.

    `before` are the layer's values, `share` is the step's length over their norm.
    """
    header = EditHeader(
        name=manifest.name,
        concept=manifest.concept,
        layer=layer,
        tower=tower,
        step=step,
        share=share,
        model=pointer.model,
        model_fingerprint=pointer.model_fingerprint,
        digests=layer_digests(before),
        gradient=pointer.forget,
        direction=direction,
        ridge=ridge,
        retain_data=retain_data,
        steer=None,
        margin=None,
        forgotten=None,
        baseline_forget=None,
        baseline_utility=None,
        forget=None,
        utility=None,
        joint=None,
        version=slsgu_cli.__version__,
        layout=resolve(pointer.model).spelling,
    )
    return make_edit(header, delta=delta, before=before)


def searched_edit(
    case: SearchPlan, probe: "Probe", trials: Trials, chosen: Trial, joint: JointRef | None = None
) -> Edit:
    """Return the edit that a chosen trial of a search amounts to."""
    edit = unmeasured_edit(
        case.manifest,
        case.pointer,
        layer=chosen.layer,
        tower=chosen.tower,
        step=chosen.step,
        share=chosen.share,
        direction=trials.direction,
        ridge=chosen.ridge,
        retain_data=trials.retain_data,
        delta=(chosen.step * probe.direction).cpu().numpy(),
        before=compact(probe.weight.cpu().numpy()),
    )
    measured = replace(
        edit.header,
        steer=trials.steer,
        margin=trials.margin,
        forgotten=left_to_forget(chosen, trials.steer, trials.margin) == 0,
        baseline_forget=trials.baseline_forget,
        baseline_utility=trials.baseline_utility,
        forget=chosen.forget,
        utility=chosen.utility,
        joint=joint,
    )
    return replace(edit, header=measured)


def compact(values: "npt.NDArray[np.float32]") -> "npt.NDArray[np.floating]":
    """Return values of a half-precision checkpoint in half precision, if that is exact."""
    half = values.astype("float16")
    return half if (half == values).all() else values
