"""Studies of several concepts and of many steps: options and records."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import attrgetter

from slsgu_cli.records.directions import DirectionSpec
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import Criterion, Move, Precision, Tower, Trial, Trials
from slsgu_cli.records.option_fields import (
    ROWS,
    SEARCH,
    option,
    options,
    percent,
)
from slsgu_cli.records.options import BuildRequest, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec


@dataclass(frozen=True, slots=True)
class JointMove:
    """One concept's part in a joint edit: the layer it moves and how far."""

    name: str
    layer: str
    tower: Tower
    direction: DirectionSpec
    step: float
    share: float


@dataclass(frozen=True, slots=True)
class JointTrial:
    """Several moves in place at once, with what they leave of each concept, by its set's name.

    `gaps` are the concepts' gaps, as a trial has one. `utility` is None where it was not
    measured. `cost` is what steps are balanced by, and `slopes` its slope along the logarithm
    of each concept's step; None where they were not computed.
    """

    moves: tuple[JointMove, ...]
    forget: dict[str, Accuracy]
    gaps: dict[str, float]
    utility: dict[str, Accuracy] | None
    cost: float | None = None
    slopes: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class JointSearch:
    """The inputs and results of a joint search.

    `gradients` maps each set to its forget gradient. `retain_data` maps each set with a whitened
    direction to its retain rows. `stages` add one concept after another (for many concepts, some
    numbers are skipped); the last stage has all concepts and is the written edit. They are empty
    until the search is complete. No stage measures utility on images of any of the concepts.
    """

    names: tuple[str, ...]
    concepts: tuple[str, ...]
    gradients: dict[str, str]
    retain_data: dict[str, str]
    model: ModelSpec
    model_fingerprint: str
    evals: dict[str, str]
    precision: Precision
    criterion: Criterion
    margin: float | None
    baseline_forget: dict[str, Accuracy]
    baseline_utility: dict[str, Accuracy]
    stages: tuple[JointTrial, ...]
    trials: tuple[JointTrial, ...]
    version: str


# Stands for the class in a source of a sweep.
CLASS = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """Options of `sweep`. In the sources of `build`, `{}` stands for the class."""

    name: str = option(..., metavar="NAME", help="Name of the sweep.")
    classes: tuple[str, ...] = ()
    folds: int = option(
        1,
        "--folds",
        min=1,
        metavar="K",
        panel=ROWS,
        help="Split the classes into K folds. Each fold's retain set excludes its own classes.",
    )
    build: BuildRequest = options(
        BuildRequest(),
        classes={"flags": ("--eval-classes",)},
        omit=("name", "concept", "match", "regex", "forget_eval", "screening"),
    )
    gradients: PassOptions = options(PassOptions(), omit=("prefixes",))
    ranking: RankOptions = options(
        RankOptions(),
        omit=("alignment", "qkv", "include", "exclude", "tower", "target", "encoder"),
    )
    search: SearchOptions = options(
        SearchOptions(), omit=("layers", "direction", "damping", "qkv", "full", "after")
    )

    def of(self, name: str) -> BuildRequest:
        """Return the request that builds one class; its retain set excludes its fold."""
        from urllib.parse import quote

        return replace(
            self.build,
            name=name,
            concept=name,
            sources=[source.replace(CLASS, quote(name)) for source in self.build.sources],
            retain_exclude=[*self.build.retain_exclude, *self.fold(name)],
        )

    def fold(self, name: str) -> tuple[str, ...]:
        """Return the classes of the same fold, including `name`, in order.

        The seed splits the classes into folds of nearly equal size.
        """
        from random import Random

        shuffled = Random(self.build.seed).sample(self.classes, len(self.classes))
        fold = set(shuffled[shuffled.index(name) % self.folds :: self.folds])
        return tuple(each for each in self.classes if each in fold)


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One class of a sweep: its edit, the gradients of the edit, and figures before and after."""

    name: str
    gradient: str
    retain: str
    layer: str
    tower: Tower
    direction: DirectionSpec
    step: float
    share: float
    baseline_forget: Accuracy
    baseline_utility: dict[str, Accuracy]
    forget: Accuracy
    utility: dict[str, Accuracy]
    forgotten: bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """The completed classes of a sweep.

    `recipe` is a digest of all options; rows of another recipe are not reused.
    """

    name: str
    recipe: str
    classes: tuple[str, ...]
    model: ModelSpec
    model_fingerprint: str
    criterion: Criterion
    rows: tuple[SweepRow, ...]
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryOptions:
    """Options of `trajectory`. `until` is a fraction of the layer's norm, or None."""

    search: SearchOptions = options(
        SearchOptions(),
        omit=(
            "qkv",
            "steps",
            "full",
            "utility",
            "overshoot",
            "max_class_loss",
            "paper",
            "after",
        ),
    )
    points: int = option(
        20, "--points", min=2, help="Number of steps for each layer.", panel=SEARCH
    )
    until: float | None = option(
        None,
        "--until",
        metavar="PERCENT",
        panel=SEARCH,
        read=percent,
        help="Largest move of a layer, in percent of its norm.",
        without="until the concept is forgotten",
    )


@dataclass(frozen=True, slots=True)
class Rise:
    """The largest rise of a figure along the steps, in points; 0 if it never rises.

    `share` is the step at its end, as a fraction of the layer's norm.
    """

    points: float
    share: float


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The steps of each move in order, and how many of them were measured now."""

    trials: Trials
    measured: int

    def moves(self) -> list[Move]:
        """Return the layers and directions in order."""
        return list(dict.fromkeys(trial.move for trial in self.trials.trials))

    def of(self, move: Move) -> list[Trial]:
        """Return the steps of one move, shortest first."""
        return [trial for trial in self.trials.trials if trial.move == move]

    def figures(self, trial: Trial | None = None) -> dict[str, float]:
        """Return accuracies by name at a step, or of the original model without one."""
        trials = self.trials
        forget = trial.forget if trial else trials.baseline_forget
        utility = (trial.utility or {}) if trial else trials.baseline_utility
        forgotten = {"FA@1": forget.top1, "FA@5": forget.top5}
        return forgotten | {f"TA@1 {name}": each.top1 for name, each in sorted(utility.items())}

    def rises(self, move: Move) -> dict[str, Rise]:
        """Return the largest rise of each figure, from the original model on."""
        steps = self.of(move)
        path = [self.figures(), *map(self.figures, steps)]
        shares = [0.0, *(trial.share for trial in steps)]
        return {name: largest_rise([each[name] for each in path], shares) for name in path[0]}


def largest_rise(values: Sequence[float], shares: Sequence[float]) -> Rise:
    """Return the largest difference between a value and the smallest value before it."""
    steps = zip(values, accumulate(values, min), shares, strict=True)
    rises = [Rise(value - least, share) for value, least, share in steps]
    return max(rises, key=attrgetter("points"))
