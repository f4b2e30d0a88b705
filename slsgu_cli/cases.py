"""What a search is asked for: a set, its front layers and the directions they move in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from shlex import quote
from typing import TYPE_CHECKING

from slsgu_cli.directions import Moments, ensure_moments, forget_direction
from slsgu_cli.errors import StaleError, UsageError
from slsgu_cli.layout import read_manifest, read_pointer, read_ranking
from slsgu_cli.models import pick_device
from slsgu_cli.naming import find_layers
from slsgu_cli.records import (
    Direction,
    GradientPointer,
    LayerScore,
    Precision,
    Qkv,
    Ranking,
    SetManifest,
    Steer,
)
from slsgu_cli.store import Store

if TYPE_CHECKING:
    from slsgu_cli.evaluation import Evaluation
    from slsgu_cli.trial import Probe

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


def read_case(store: Store, name: str, *, options: SearchOptions) -> Case:
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
    return Case(manifest, pointer, tuple(layers), options, moments)


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
