"""Comparisons with other methods: options, plans and rows, on CLIP and on pipelines."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from operator import attrgetter
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar

from slsgu_cli.errors import UsageError
from slsgu_cli.records.figures import Accuracy, Effect, Figures, PassTime
from slsgu_cli.records.option_fields import (
    DEVICE,
    LAYERS,
    SEARCH,
    SPEED,
    TARGET,
    choices,
    option,
    options,
    rates,
)
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.targets import Budget, judge_option


class Method(StrEnum):
    """The rows of a comparison, in order: the original model, baselines and our edit.

    A baseline is declared next to its code, in the module of `compare/baselines` that its name
    begins with.
    """

    ORIGINAL = "original"
    FT = "ft"
    GA = "ga"
    GAFT = "gaft"
    SALUN = "salun"
    SSD = "ssd"
    RAZOR = "razor"
    HIRM_S = "hirm-s"
    HIRM_R = "hirm-r"
    ROME = "rome"
    MEMIT = "memit"
    UCE = "uce"
    ALPHAEDIT = "alphaedit"
    DIFFQUICKFIX = "diffquickfix"
    LEACE_TEXT = "leace-text"
    LEACE_VISION = "leace-vision"
    CCUP_TEXT = "ccup-text"
    CCUP_VISION = "ccup-vision"
    OURS = "ours"
    ESD = "esd"
    SPEED = "speed"
    OCE = "oce"


PIPELINE_METHODS = (
    Method.ORIGINAL,
    Method.ESD,
    Method.SALUN,
    Method.UCE,
    Method.SPEED,
    Method.OCE,
    Method.DIFFQUICKFIX,
    Method.HIRM_S,
    Method.HIRM_R,
    Method.OURS,
)
_ON_PIPELINES_ONLY = (Method.ESD, Method.SPEED, Method.OCE)
CLIP_METHODS = tuple(method for method in Method if method not in _ON_PIPELINES_ONLY)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """The methods to run on CLIP, and their settings.

    `rates` is None to tune each method. `layer` is for methods that edit a layer of choice.
    """

    methods: Sequence[Method] = option(
        CLIP_METHODS,
        "--methods",
        metavar="METHODS",
        without="all",
        read=choices(CLIP_METHODS, always=[Method.ORIGINAL]),
        help=f"Methods: {','.join(CLIP_METHODS[1:])}; "
        f"with --target {','.join(PIPELINE_METHODS[1:])}.",
        panel=SEARCH,
    )
    rates: Sequence[float] | None = option(
        (1e-6, 1e-7),
        "--lr",
        metavar="RATES",
        read=rates,
        without="1e-6,1e-7; with --target 1e-5",
        help="Learning rates, or auto to tune each method.",
        panel=SEARCH,
    )
    layer: str | None = option(
        None,
        "--layer",
        metavar="LAYER",
        panel=LAYERS,
        help="Layer that rome, memit, uce and alphaedit edit.",
        without="the middle text mlp.c_proj",
    )
    epochs: int = option(10, "--epochs", min=1, help="Training epochs of a baseline.", panel=SEARCH)
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
        help="Random seed of the order of rows, or of a pipeline's images.",
        panel=SEARCH,
        without="0; with --target 1000",
    )
    device: str = DEVICE()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The hyperparameters of a method besides its setting; `seed` is that of its draws."""

    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlan(Plan):
    """The plan of a trained baseline, on the first `retain_rows` of the retain set."""

    epochs: int = 10
    batch_size: int = 32
    retain_rows: int


def _fixed_rates(name: str, texts: Sequence[str]) -> Sequence[float]:
    """Return learning rates. Raises UsageError for `auto`."""
    values = rates(name, texts)
    if values is None:
        raise UsageError(f"{name} auto is for comparing without --target", hint=f"{name} 1e-5,1e-4")
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineCompareOptions:
    """The methods to run on a pipeline, and their settings; the set's CLIP judges by default."""

    target: Path = option(
        ...,
        "--target",
        "-t",
        help="Folder of a diffusion pipeline to compare on.",
        panel=TARGET,
        without="CLIP itself",
    )
    methods: Sequence[Method] = option(
        PIPELINE_METHODS,
        "--methods",
        metavar="METHODS",
        without="all",
        read=choices(PIPELINE_METHODS, always=[Method.ORIGINAL]),
        help=f"Methods: {','.join(PIPELINE_METHODS[1:])}.",
        panel=SEARCH,
    )
    rates: Sequence[float] = option(
        (1e-5,), "--lr", metavar="RATES", read=_fixed_rates, help="Learning rates.", panel=SEARCH
    )
    iterations: int = option(
        1000, "--iterations", min=1, help="Training steps of a method.", panel=TARGET
    )
    # Our search generates with seeds from 0. These are different.
    budget: Budget = options(
        Budget(seed=1000),
        omit=("questions",),
        panel=TARGET,
        concept={"help": "Images of the concept."},
        others={"help": "Images of other classes.", "min": 2},
    )
    judges: Sequence[ModelSpec] = judge_option("set")
    device: str = DEVICE()


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan(Plan):
    """The plan of training on a pipeline: updates, learning rate, denoising steps of samples."""

    iterations: int = 1000
    rate: float = 1e-5
    steps: int = 20


@dataclass(frozen=True, slots=True)
class MethodSetting:
    """A method with its setting and plan, or our edit. It identifies a row.

    `setting` is the learning rate, or the hyperparameter of a method that is not trained;
    original and ours have none. `layer` is the layer that a closed form edits.
    """

    method: Method
    setting: float | None = None
    plan: Plan | None = None
    edit: str | None = None
    layer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(ABC):
    """One row: a method and the seconds it took on the device `where`.

    Only trained methods and SSD have a `plan`; ours has an `edit`.
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
        """The method, its setting and its plan."""

    @property
    @abstractmethod
    def place(self) -> MethodSetting | str:
        """The key of the row: a newer row replaces an older one with the same key."""

    @property
    def order(self) -> tuple[int, float, str, str]:
        """The sort key: the method, its setting, layer and plan."""
        made_by = self.made_by
        place = self.methods.index(self.method)
        return place, made_by.setting or 0.0, made_by.layer or "", repr(made_by.plan)

    @property
    def label(self) -> str:
        """The method and its setting: the name of the row and of the folder of its images."""
        setting = self.made_by.setting
        return self.method if setting is None else f"{self.method} {setting:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipOutcome(Outcome):
    """The test accuracies after a method at one setting, at the reported epoch.

    A closed form has the `layer` that it edits and the `step` along its change. `edit` names
    our edit's layer and step. `chosen_by` has the figures on the validation rows, by which
    epochs and settings are chosen. Passes are in units of the set's forget and retain rows.
    """

    plan: ClipPlan | None = None
    setting: float | None = None
    epoch: int | None = None
    forget: Accuracy
    utility: dict[str, Accuracy]
    forget_passes: float
    retain_passes: float
    layer: str | None = None
    step: float | None = None
    chosen_by: Figures | None = None

    methods: ClassVar[tuple[Method, ...]] = CLIP_METHODS

    @property
    def made_by(self) -> MethodSetting:
        """The method, its setting and its plan."""
        return MethodSetting(self.method, self.setting, self.plan, self.edit, self.layer)

    @property
    def place(self) -> MethodSetting:
        """The key of the row. A newer edit of ours replaces an older one."""
        return replace(self.made_by, edit=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOutcome(Outcome):
    """A judge's figures for the images that a pipeline generates after a method.

    `setting` is the hyperparameter of a closed form, `edit` the digest of our edit. `distance` is
    the Frechet distance between features of images of other classes by this pipeline and by the
    original.
    """

    plan: PipelinePlan | None = None
    setting: float | None = None
    effect: Effect
    distance: float

    methods: ClassVar[tuple[Method, ...]] = PIPELINE_METHODS

    @property
    def made_by(self) -> MethodSetting:
        """The method and its plan, with the learning rate or the hyperparameter as setting."""
        setting = self.setting if self.plan is None else self.plan.rate
        return MethodSetting(self.method, setting, self.plan, self.edit)

    @property
    def place(self) -> str:
        """The key of the row, which is also the folder of its images."""
        return self.label


Row = TypeVar("Row", bound=Outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(ABC, Generic[Row]):
    """All rows of one concept, with the data they were made from."""

    name: str
    forget: str
    evals: dict[str, str]
    outcomes: tuple[Row, ...]
    version: str

    def row_made_by(self, setting: MethodSetting) -> Row | None:
        """Return the newest row of a method with its setting, None if there is none."""
        return next((row for row in reversed(self.outcomes) if row.made_by == setting), None)

    def with_row(self, row: Row) -> Self:
        """Return the record with a row, which replaces an older one; rows stay sorted."""
        others = [other for other in self.outcomes if other.place != row.place]
        return replace(self, outcomes=tuple(sorted([*others, row], key=attrgetter("order"))))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipComparison(Comparison[ClipOutcome]):
    """The comparison on the CLIP of a set.

    `passes` has the times of gradient passes by the digest of the gradient, or by
    `squares DIGEST`.
    """

    outcomes: tuple[ClipOutcome, ...]
    model_fingerprint: str
    retain: str
    passes: dict[str, PassTime]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineComparison(Comparison[PipelineOutcome]):
    """The comparison on one pipeline.

    `asked` is the digest of the judged prompts, as in TargetTrials.
    """

    outcomes: tuple[PipelineOutcome, ...]
    concept: str
    target: str
    target_fingerprint: str
    forget_data: str
    retain_data: str
    judge: str
    budget: Budget
    asked: str = ""
