"""Studies: other methods beside ours, several concepts, many steps; what is asked and recorded.

On CLIP a row of a comparison has accuracies, on a pipeline what a judge makes of its pictures.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar

from slsgu_cli.errors import UsageError
from slsgu_cli.records.codec import added
from slsgu_cli.records.figures import Accuracy, Effect, Figures, PassTime
from slsgu_cli.records.method import Criterion, Direction, Line, Precision, Tower, Trial, Trials
from slsgu_cli.records.options import BuildRequest, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.targets import Budget, judge_option
from slsgu_cli.records.words import (
    DEVICE,
    LAYERS,
    SEARCH,
    SPEED,
    TARGET,
    choices,
    figure,
    option,
    options,
    percent,
    rates,
)


class Method(StrEnum):
    """What is compared: the model as it is, other methods of unlearning, and our edit."""

    ORIGINAL = "original"
    FT = "ft"
    GA = "ga"
    GAFT = "gaft"
    SALUN = "salun"
    SSD = "ssd"
    ROME = "rome"
    MEMIT = "memit"
    UCE = "uce"
    ALPHAEDIT = "alphaedit"
    LEACE_TEXT = "leace-text"
    LEACE_VISION = "leace-vision"
    CCUP_TEXT = "ccup-text"
    CCUP_VISION = "ccup-vision"
    OURS = "ours"
    ESD = "esd"


TRAINED = (Method.FT, Method.GA, Method.GAFT, Method.SALUN)
# Those that edit a layer of choice, and those that edit the projections of either tower.
LAYERED = (Method.ROME, Method.MEMIT, Method.UCE, Method.ALPHAEDIT)
CLOSED_FORMS = (
    *LAYERED,
    Method.LEACE_TEXT,
    Method.LEACE_VISION,
    Method.CCUP_TEXT,
    Method.CCUP_VISION,
)
# The rows of a comparison, in order: of CLIP (first the paper's Table 1), of a pipeline.
CLIP_METHODS = (Method.ORIGINAL, *TRAINED, Method.SSD, *CLOSED_FORMS, Method.OURS)
PIPELINE_METHODS = (Method.ORIGINAL, Method.ESD, Method.SALUN, Method.OURS)
UNRETAINED = (Method.GA, Method.SSD)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """Which methods to run and how. `rates` is None to find each method's best setting.

    `layer` is what ROME, MEMIT, UCE and AlphaEdit edit.
    """

    methods: Sequence[Method] = option(
        CLIP_METHODS,
        "--methods",
        metavar="METHODS",
        without="all",
        read=choices(CLIP_METHODS, always=[Method.ORIGINAL]),
        write=lambda methods: ",".join(m for m in methods if m is not Method.ORIGINAL),
        help=f"Comma-separated methods: {','.join(CLIP_METHODS[1:])}. On a pipeline: esd, "
        f"salun, ours.",
        panel=SEARCH,
    )
    rates: Sequence[float] | None = option(
        (1e-6, 1e-7),
        "--lr",
        metavar="RATES",
        read=rates,
        without="the papers' 1e-6,1e-7, or 1e-5 on a pipeline",
        help="Comma-separated learning rates, or auto.",
        panel=SEARCH,
        write=lambda rates: "auto" if rates is None else ",".join(map(figure, rates)),
    )
    layer: str | None = option(
        None,
        "--layer",
        metavar="LAYER",
        panel=LAYERS,
        completes="layer",
        help="Layer that rome, memit, uce and alphaedit edit.",
        without="the middle mlp.c_proj of the text tower",
    )
    epochs: int = option(
        10, "--epochs", min=1, help="Training epochs of each baseline.", panel=SEARCH
    )
    batch_size: int = option(
        32, "--batch-size", min=2, help="Image-text pairs in each mini-batch.", panel=SPEED
    )
    retain_rows: int | None = option(
        None,
        "--retain-rows",
        min=2,
        help="Maximum number of retain rows to train on.",
        panel=SEARCH,
        without="all",
    )
    seed: int = option(
        0,
        "--seed",
        help="Random seed of the order of retain rows, or of a pipeline's images.",
        panel=SEARCH,
        without="0, or 1000 for a pipeline's images",
    )
    device: str = DEVICE()

    def __post_init__(self) -> None:
        """Refuse a layer that no method edits."""
        if self.layer is not None and not set(LAYERED) & set(self.methods):
            raise UsageError(
                "--layer is for " + ", ".join(LAYERED), hint=f"--methods {LAYERED[0]},..."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a method runs that has more to it than one number; `seed` is that of its draws."""

    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlan(Plan):
    """How a baseline runs. It trains on the first `retain_rows` of the retain set, if any."""

    epochs: int = 10
    batch_size: int = 32
    retain_rows: int

    def of(self, method: Method) -> Self:
        """Return the plan as far as it matters to a method."""
        return replace(self, retain_rows=0) if method in UNRETAINED else self


def _fixed_rates(name: str, texts: Sequence[str]) -> Sequence[float]:
    """Return the learning rates given. Raises UsageError for `auto`."""
    values = rates(name, texts)
    if values is None:
        raise UsageError(f"{name} auto is for comparing without --target", hint=f"{name} 1e-5,1e-4")
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineCompareOptions:
    """Which methods to run on which pipeline and how; the judge is the set's CLIP by default."""

    target: Path = option(
        ...,
        "--target",
        "-t",
        help="Folder of the diffusion pipeline to compare on.",
        panel=TARGET,
        without="CLIP itself",
    )
    methods: Sequence[Method] = option(
        PIPELINE_METHODS,
        "--methods",
        metavar="METHODS",
        without="all",
        read=choices(PIPELINE_METHODS, always=[Method.ORIGINAL]),
        help="Comma-separated methods: esd, salun, ours.",
        panel=SEARCH,
    )
    rates: Sequence[float] = option(
        (1e-5,),
        "--lr",
        metavar="RATES",
        read=_fixed_rates,
        help="Comma-separated learning rates.",
        panel=SEARCH,
    )
    iterations: int = option(
        1000, "--iterations", min=1, help="Training iterations of a trained method.", panel=TARGET
    )
    # Our search paints with the seeds from 0: these are others.
    budget: Budget = options(
        Budget(seed=1000),
        omit=("questions",),
        panel=TARGET,
        concept={"help": "Images of the concept."},
        others={"help": "Images of other classes."},
    )
    judges: Sequence[ModelSpec] = judge_option("set")
    device: str = DEVICE()

    def __post_init__(self) -> None:
        """Refuse too few pictures to tell what is kept."""
        if self.budget.others < 2:
            raise UsageError(f"--others {self.budget.others} is out of range: it must be 2 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan(Plan):
    """How a method trains on a pipeline: updates, learning rate, denoising steps of samples."""

    iterations: int = 1000
    rate: float = 1e-5
    steps: int = 20


@dataclass(frozen=True, slots=True)
class MethodSetting:
    """A method at a setting and how it runs, or our edit: what is not run twice.

    `setting` is the learning rate, or the one number of a method that is not trained;
    original and ours have none. `layer` is what a closed form edits.
    """

    method: Method
    setting: float | None = None
    plan: Plan | None = None
    edit: str | None = None
    layer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(ABC):
    """One row: a method as it was run, and the seconds it took on the device `where`.

    Only what is trained, and SSD, has a `plan`; ours names its `edit`.
    """

    method: Method
    plan: Plan | None = None
    edit: str | None = None
    seconds: float
    where: str | None = None

    methods: ClassVar[tuple[Method, ...]]

    @property
    @abstractmethod
    def made_by(self) -> MethodSetting:
        """The method as it was run for this row."""

    @property
    @abstractmethod
    def place(self) -> MethodSetting | str:
        """The place in the record, which a newer row takes from an older one."""

    @property
    def order(self) -> tuple[int, float, str, str]:
        """What rows are ordered by: the method, its setting, and how it was run otherwise."""
        made_by = self.made_by
        place = self.methods.index(self.method)
        return place, made_by.setting or 0.0, made_by.layer or "", repr(made_by.plan)

    @property
    def label(self) -> str:
        """The method and its setting, as the row and the folder of its pictures are called."""
        setting = self.made_by.setting
        return self.method if setting is None else f"{self.method} {setting:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipOutcome(Outcome):
    """The accuracies after a method at one setting, and after the epoch that is reported.

    `setting` is the learning rate, or the one number of a method that is not trained. A
    closed form has the `layer` that it edits and the `step` along its change; `edit` is our
    edit's layer and step. `chosen_by` has the figures on the rows that epochs and settings are
    chosen by. Passes are in units of the set's forget and retain rows.
    """

    plan: ClipPlan | None = None
    setting: float | None = None
    epoch: int | None = None
    forget: Accuracy
    utility: dict[str, Accuracy]
    forget_passes: float
    retain_passes: float
    layer: str | None = added(None)
    step: float | None = added(None)
    chosen_by: Figures | None = added(None)

    methods: ClassVar[tuple[Method, ...]] = CLIP_METHODS

    @property
    def made_by(self) -> MethodSetting:
        """The method as it was run for this row."""
        return MethodSetting(self.method, self.setting, self.plan, self.edit, self.layer)

    @property
    def place(self) -> MethodSetting:
        """The method as it was run, whatever our edit: a newer one takes the older one's."""
        return replace(self.made_by, edit=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOutcome(Outcome):
    """What a judge makes of the pictures by a pipeline that a method was run on.

    `edit` is the digest of our edit. `distance` is between the features of its pictures of
    other classes and of the original's.
    """

    plan: PipelinePlan | None = None
    effect: Effect
    distance: float

    methods: ClassVar[tuple[Method, ...]] = PIPELINE_METHODS

    @property
    def made_by(self) -> MethodSetting:
        """The method as it was run for this row; its setting is the plan's learning rate."""
        rate = None if self.plan is None else self.plan.rate
        return MethodSetting(self.method, rate, self.plan, self.edit)

    @property
    def place(self) -> str:
        """Where the pictures lie, whatever the rest of the plan."""
        return self.label


Row = TypeVar("Row", bound=Outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(ABC, Generic[Row]):
    """Every row for one concept, with what all of them were made from."""

    name: str
    forget: str
    evals: dict[str, str]
    outcomes: tuple[Row, ...]
    version: str

    def row_made_by(self, setting: MethodSetting) -> Row | None:
        """Return the newest row of a method run so, None where there is none."""
        return next((row for row in reversed(self.outcomes) if row.made_by == setting), None)

    def with_row(self, row: Row) -> Self:
        """Return the record with a row in the place of an older one.

        Rows stand in one order, whichever was run first.
        """
        others = [other for other in self.outcomes if other.place != row.place]
        return replace(self, outcomes=tuple(sorted([*others, row], key=attrgetter("order"))))

    @abstractmethod
    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipComparison(Comparison[ClipOutcome]):
    """The comparison on the CLIP of a set.

    `passes` has the times of the passes whose results are stored: by the digest of the
    gradient, or `squares DIGEST`.
    """

    outcomes: tuple[ClipOutcome, ...]
    model_fingerprint: str
    retain: str
    passes: dict[str, PassTime]

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        methods = ", ".join(dict.fromkeys(outcome.method for outcome in self.outcomes))
        return {"set": self.name, "outcomes": f"{len(self.outcomes)} of {methods}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineComparison(Comparison[PipelineOutcome]):
    """The comparison on one pipeline.

    `asked` is as in TargetTrials; no layer or step is chosen by it.
    """

    outcomes: tuple[PipelineOutcome, ...]
    concept: str
    target: str
    target_fingerprint: str
    forget_data: str
    retain_data: str
    judge: str
    budget: Budget
    asked: str = added("")

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        labels = ", ".join(outcome.label for outcome in self.outcomes)
        return {"set": self.name, "target": self.target, "outcomes": labels}


@dataclass(frozen=True, slots=True)
class JointMove:
    """One concept's part in a joint edit: the layer it moves and how far."""

    name: str
    layer: str
    tower: Tower
    damping: float | None
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
    criterion: Criterion
    margin: float | None
    baseline_forget: dict[str, Accuracy]
    baseline_utility: dict[str, Accuracy]
    stages: tuple[JointTrial, ...]
    trials: tuple[JointTrial, ...]
    version: str

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        sets = ", ".join(self.names)
        return {"sets": sets, "criterion": self.criterion, "trials": str(len(self.trials))}


# Stands for the class in a source of a sweep.
CLASS = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """What `sweep` is asked for. `build` is of no class: its sources may hold `{}` for one."""

    name: str = option(..., metavar="NAME", help="Name of the sweep.")
    classes: tuple[str, ...] = ()
    folds: int = option(
        1,
        "--folds",
        min=1,
        metavar="K",
        help="Split the classes into K folds. Each fold's retain set excludes its own classes.",
    )
    build: BuildRequest = options(
        BuildRequest(),
        classes={"flags": ("--eval-classes",)},
        omit=("name", "concept", "match", "regex", "forget_eval", "screening"),
    )
    gradients: PassOptions = options(PassOptions(), omit=("shard", "prefixes"))
    ranking: RankOptions = options(
        RankOptions(),
        omit=("alignment", "qkv", "include", "exclude", "tower", "target", "encoder", "shard"),
    )
    search: SearchOptions = options(
        SearchOptions(), omit=("layers", "direction", "damping", "qkv", "full", "after", "shard")
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
    damping: float | None
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
    criterion: Criterion
    rows: tuple[SweepRow, ...]
    version: str

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        done = f"{len(self.rows)} of {len(self.classes)}"
        return {"model": str(self.model), "classes": done, "criterion": self.criterion}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryOptions:
    """How fine and how far. `until` is a share of the layer's norm, None for where it forgets."""

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
            "shard",
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
        write=lambda share: f"{100 * share:.15g}",
    )


@dataclass(frozen=True, slots=True)
class Rise:
    """The largest rise of a figure along the steps, in points: 0 where it never rises.

    `share` is the step it rises up to, as a share of the layer's norm.
    """

    points: float
    share: float


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The steps of each line in order, and how many of them were measured now."""

    trials: Trials
    measured: int

    def lines(self) -> list[Line]:
        """Return the layers and dampings in the order they were followed in."""
        return list(dict.fromkeys((trial.layer, trial.damping) for trial in self.trials.trials))

    def of(self, line: Line) -> list[Trial]:
        """Return the steps along one line, the shortest first."""
        return [trial for trial in self.trials.trials if (trial.layer, trial.damping) == line]

    def figures(self, trial: Trial | None = None) -> dict[str, float]:
        """Return the accuracies at a step by their names in tables; of the original for none."""
        trials = self.trials
        forget = trial.forget if trial else trials.baseline_forget
        utility = (trial.utility or {}) if trial else trials.baseline_utility
        forgotten = {"FA@1": forget.top1, "FA@5": forget.top5}
        return forgotten | {f"TA@1 {name}": kept.top1 for name, kept in sorted(utility.items())}

    def rises(self, line: Line) -> dict[str, Rise]:
        """Return the largest rise of each figure, from the original model on."""
        steps = self.of(line)
        path = [self.figures(), *map(self.figures, steps)]
        shares = [0.0, *(trial.share for trial in steps)]
        return {name: largest_rise([each[name] for each in path], shares) for name in path[0]}


def largest_rise(values: Sequence[float], shares: Sequence[float]) -> Rise:
    """Return by how much a later value lies above the least one before it, at most."""
    steps = zip(values, accumulate(values, min), shares, strict=True)
    rises = [Rise(value - least, share) for value, least, share in steps]
    return max(rises, key=attrgetter("points"))
