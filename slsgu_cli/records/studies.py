"""Studies of several concepts or of many steps: what they are asked for, what they record."""

from dataclasses import dataclass, replace

from slsgu_cli.records.codec import added
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import Direction, Precision, Steer, Tower
from slsgu_cli.records.options import BuildRequest, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.words import SEARCH, option, options, percent


@dataclass(frozen=True, slots=True)
class JointMove:
    """One concept's part in a joint edit: the layer it moves and how far."""

    name: str
    layer: str
    tower: Tower
    ridge: float | None
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
    cost: float | None = added(None)
    slopes: dict[str, float] | None = added(None)


@dataclass(frozen=True, slots=True)
class JointSearch:
    """A joint search: what it was made from, and what it found.

    `gradients` maps each set to its forget gradient, `retain_data` each whose direction is
    whitened to the retain rows that whitened it. `stages` are of the first concept, of the
    first two, and so on, at some of the numbers where they are many; the last one has all and
    is what was written. There are none as long as the search is not done. Utility is measured
    without the images of any of the concepts, at every stage.
    """

    names: tuple[str, ...]
    concepts: tuple[str, ...]
    gradients: dict[str, str]
    retain_data: dict[str, str]
    model: ModelSpec
    model_fingerprint: str
    evals: dict[str, str]
    precision: Precision
    steer: Steer
    margin: float | None
    baseline_forget: dict[str, Accuracy]
    baseline_utility: dict[str, Accuracy]
    stages: tuple[JointTrial, ...]
    trials: tuple[JointTrial, ...]
    version: str

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        sets = ", ".join(self.names)
        return {"sets": sets, "steer": self.steer, "trials": str(len(self.trials))}


# Stands for the class in a source of a sweep.
CLASS = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """What `sweep` is asked for. `build` is of no class: its sources may hold `{}` for one."""

    name: str = option(..., metavar="NAME", help="Name of the sweep.")
    classes: tuple[str, ...] = ()
    folds: int = option(
        1, "--folds", min=1, metavar="K",
        help="Deal the classes to K retain sets; each leaves out its own.",
    )  # fmt: skip
    build: BuildRequest = options(
        BuildRequest(),
        flags={"classes": ("--eval-classes",)},
        omit=("name", "concept", "match", "regex", "forget_eval", "screening"),
    )
    gradients: PassOptions = options(PassOptions(), omit=("shard",))
    ranking: RankOptions = options(
        RankOptions(),
        omit=("alignment", "qkv", "include", "exclude", "tower", "target", "encoder"),
    )
    search: SearchOptions = options(
        SearchOptions(), omit=("layers", "direction", "ridge", "qkv", "full", "after")
    )

    def of(self, name: str) -> BuildRequest:
        """Return what to build for one class; its fold is kept out of the retain set."""
        from urllib.parse import quote

        return replace(
            self.build,
            name=name,
            concept=name,
            sources=[source.replace(CLASS, quote(name)) for source in self.build.sources],
            retain_exclude=[*self.build.retain_exclude, *self.fold(name)],
        )

    def fold(self, name: str) -> tuple[str, ...]:
        """Return the classes that share a retain set with one, itself among them, in order.

        Classes are dealt by seed, as evenly as can be.
        """
        from random import Random

        dealt = Random(self.build.seed).sample(self.classes, len(self.classes))
        fold = set(dealt[dealt.index(name) % self.folds :: self.folds])
        return tuple(each for each in self.classes if each in fold)


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One class of a sweep: the edit its search chose, and its figures before and after.

    `gradient` and `retain` name the gradients it was made from.
    """

    name: str
    gradient: str
    retain: str
    layer: str
    tower: Tower
    direction: Direction
    ridge: float | None
    step: float
    share: float
    baseline_forget: Accuracy
    baseline_utility: dict[str, Accuracy]
    forget: Accuracy
    utility: dict[str, Accuracy]
    forgotten: bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """The same job for each class of a list, as far as it is done.

    `recipe` is a digest of everything that was asked for; rows of another recipe are not
    used again.
    """

    name: str
    recipe: str
    classes: tuple[str, ...]
    model: ModelSpec
    model_fingerprint: str
    steer: Steer
    rows: tuple[SweepRow, ...]
    version: str

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        done = f"{len(self.rows)} of {len(self.classes)}"
        return {"model": str(self.model), "classes": done, "steer": self.steer}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryOptions:
    """How fine and how far. `until` is a share of the layer's norm, None for where it forgets."""

    search: SearchOptions = options(
        SearchOptions(),
        omit=("qkv", "steps", "full", "keep", "reserve", "max_class_loss", "paper", "after"),
    )
    points: int = option(20, "--points", min=2, help="Steps a layer.", panel=SEARCH)
    until: float | None = option(
        None, "--until", metavar="PERCENT", panel=SEARCH, read=percent,
        help="Move a layer this far, in % of its norm.", without="until it forgets",
        write=lambda share: f"{100 * share:.15g}",
    )  # fmt: skip
