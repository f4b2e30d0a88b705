"""What gradients, moments, rankings, trials and edits say of themselves."""

import dataclasses
import math
from collections.abc import Sequence
from enum import StrEnum

from slsgu_cli.records.codec import added
from slsgu_cli.records.sets import ModelSpec


class Tower(StrEnum):
    """The two halves of a CLIP model."""

    VISION = "vision"
    TEXT = "text"


class Alignment(StrEnum):
    """How Eq. 8's cosine enters the ranking: its magnitude, or with its sign."""

    ABS = "abs"
    SIGNED = "signed"


class Direction(StrEnum):
    """Where a layer moves: along its forget gradient, or that whitened by retained inputs.

    `BOTH` is for rankings and searches, which then try each of them.
    """

    GRADIENT = "gradient"
    WHITENED = "whitened"
    BOTH = "both"

    @property
    def each(self) -> "tuple[Direction, ...]":
        """The directions that a layer may move in."""
        both = (Direction.GRADIENT, Direction.WHITENED)
        return both if self is Direction.BOTH else (self,)

    @property
    def whitens(self) -> bool:
        """Whether it takes the moments of the layers' inputs."""
        return self is not Direction.GRADIENT

    @classmethod
    def of(cls, ridge: float | None) -> "Direction":
        """Return the direction that a ridge whitened, or the gradient where there is none."""
        return cls.GRADIENT if ridge is None else cls.WHITENED


class Qkv(StrEnum):
    """Whether query, key and value are one layer, or a layer each."""

    FUSED = "fused"
    SPLIT = "split"


class Steer(StrEnum):
    """What the search drives to zero: a forget accuracy, or what a margin lacks."""

    FA1 = "fa1"
    FA5 = "fa5"
    MARGIN = "margin"


class Precision(StrEnum):
    """Arithmetic of the gradient pass; sums of gradients are fp32 in all of them."""

    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterNorm:
    """L2 norm of one parameter of the original model, with its shape."""

    shape: tuple[int, ...]
    norm: float


@dataclasses.dataclass(frozen=True, slots=True)
class GradientHeader:
    """What a gradient file holds and what it was computed from.

    `sign` is always `+grad`: the file holds the gradient of `loss` itself, and unlearning
    ascends it. `weights` has the norm of every parameter at the time.
    """

    loss: str
    sign: str
    mean_loss: float
    batches: int
    batch_size: int
    rows: int
    precision: str
    model: str
    data: str
    weights: dict[str, ParameterNorm]
    version: str

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        return _pass_in_words(self)


@dataclasses.dataclass(frozen=True, slots=True)
class SquaresHeader:
    """Mean squared mini-batch gradients of every parameter, beside the gradient they go with.

    `gradient` is that gradient's digest: squares are of the same model, rows and options.
    """

    gradient: str
    loss: str
    batches: int
    batch_size: int
    rows: int
    precision: str
    version: str

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        return _pass_in_words(self)


@dataclasses.dataclass(frozen=True, slots=True)
class GradientPointer:
    """Which gradient files belong to a set, and the model and data they came from."""

    name: str
    model: ModelSpec
    model_fingerprint: str
    forget: str
    retain: str
    forget_data: str
    retain_data: str
    batch_size: int
    precision: str
    version: str

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        batches = f"{self.batch_size} in {self.precision}"
        return {"model": str(self.model), "set": self.name, "batches of": batches}


@dataclasses.dataclass(frozen=True, slots=True)
class LayerMoment:
    """The second moment C of one layer's inputs: a tensor of the file, and what it says.

    `axis` is the weight's axis of inputs, `count` the inputs that C is the mean over,
    `output` the mean squared output of the layer on them, tr(W C W^T).
    """

    axis: int
    count: float
    output: float


@dataclasses.dataclass(frozen=True, slots=True)
class MomentHeader:
    """What a file of moments holds, of which model, over which retain rows.

    `unseen` are layers that were looked for, and whose inputs their tower does not show.
    """

    model: str
    data: str
    rows: int
    layers: dict[str, LayerMoment]
    unseen: tuple[str, ...]
    version: str

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        return {"layers": str(len(self.layers)), "rows": str(self.rows)}


@dataclasses.dataclass(frozen=True, slots=True)
class LayerScore:
    """One row of a ranking (Eq. 7 and 8); `front` marks the Pareto set of its tower.

    `direction` is the one that it is scored for in a ranking for both.
    """

    layer: str
    tower: Tower
    shape: tuple[int, ...]
    importance: float
    alignment: float
    forget_norm: float
    retain_norm: float
    weight_norm: float
    front: bool
    direction: Direction | None = added(None)

    @classmethod
    def unranked(
        cls, layer: str, tower: Tower, shape: tuple[int, ...], weight_norm: float
    ) -> "LayerScore":
        """Return what is known of a layer that nobody ranked."""
        return cls(layer, tower, shape, 0.0, 0.0, 0.0, 0.0, weight_norm, False)


@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """Every candidate layer of a model, scored for one concept.

    `target` is the model it was made for, None for the CLIP itself; `unreached` are the
    layers that cannot influence it, with the reason.
    """

    name: str
    forget: str
    retain: str
    alignment: Alignment
    direction: Direction
    ridge: float | None
    scores: tuple[LayerScore, ...]
    version: str
    target: str | None = None
    unreached: dict[str, str] = dataclasses.field(default_factory=dict)
    qkv: Qkv = Qkv.FUSED

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        layers = len({score.layer for score in self.scores})
        front = len({score.layer for score in self.scores if score.front})
        counted = f"{layers}, {front} on the fronts"
        about = {"set": self.name, "alignment": self.alignment, "direction": self.direction}
        return about | {"layers": counted}

    def by_direction(self) -> "dict[Direction, list[LayerScore]]":
        """Return the scores for each direction that layers were ranked for."""
        return {
            direction: [s for s in self.scores if s.direction in (None, direction)]
            for direction in self.direction.each
        }


# How sure an interval of a share is, and to which share of its width bisection finds its ends.
CONFIDENCE = 0.95
HALVINGS = 60


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """How many of some images or answers, and of how many."""

    count: int
    total: int

    @classmethod
    def of(cls, percent: float, total: int) -> "Share":
        """Return the share that comes to so many percent of `total`."""
        return cls(round(percent * total / 100) if total else 0, total)

    @property
    def percent(self) -> float | None:
        """Return the share in percent; None of nothing."""
        return 100 * self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """The exact two-sided 95% interval of the share in percent (Clopper and Pearson 1934)."""
        tail = (1 - CONFIDENCE) / 2
        low = 1 - _largest_share(self.total - self.count, self.total, tail)
        return 100 * low, 100 * _largest_share(self.count, self.total, tail)

    @property
    def bound(self) -> str:
        """The one-sided 95% bound in words, rounded up to a tenth so that it stays true."""
        tenths = 1000 * _largest_share(self.count, self.total, 1 - CONFIDENCE)
        return f"with 95% confidence below {math.ceil(tenths) / 10:.1f}%"

    def in_words(self, things: str) -> str:
        """Return the share of `things`, and what so few of them let one say of others."""
        counted = f"{self.count} of {self.total} {things}"
        if self.total == 0:
            return counted
        if self.count == 0:
            return f"{counted}; {self.bound}"
        low, high = self.interval
        return f"{counted} ({self.percent:.1f}%; 95% interval {low:.1f} to {high:.1f}%)"


def _largest_share(count: int, total: int, tail: float) -> float:
    """Return the share under which `count` or fewer of `total` have the probability `tail`.

    1 where all were counted, or none looked at. Above count / total the terms of the
    binomial sum fall from `count` down, so it ends where they no longer matter.
    """
    if count >= total:
        return 1.0
    ways = math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1)
    low, high = count / total, 1.0
    for _ in range(HALVINGS):
        share = (low + high) / 2
        if share >= 1:
            break
        term = math.exp(ways + count * math.log(share) + (total - count) * math.log1p(-share))
        likelihood, k = term, count
        while k and term > likelihood * 1e-17:
            term *= k / (total - k + 1) * (1 - share) / share
            likelihood += term
            k -= 1
        low, high = (share, high) if likelihood > tail else (low, share)
    return (low + high) / 2


@dataclasses.dataclass(frozen=True, slots=True)
class Accuracy:
    """Zero-shot accuracy in percent over `rows` images.

    `unseen` images are none that a layer or step was chosen by.
    """

    top1: float
    top5: float
    rows: int
    unseen: bool = added(False)


@dataclasses.dataclass(frozen=True, slots=True)
class ClassLoss:
    """One class of an evaluation set: its top-1 accuracy in percent before and after an edit."""

    name: str
    rows: int
    before: float
    after: float

    @property
    def lost(self) -> float:
        """Points of accuracy that the edit took from the class; negative where it gave some."""
        return self.before - self.after


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """What a model still recognises: the concept, and everything else by evaluation set."""

    forget: Accuracy
    utility: dict[str, Accuracy]


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What an edit does to images that chose nothing, beside the original model.

    `harmed` are the classes that lost most, and `nearest` those whose names the original
    model holds nearest to the concept's, the nearest first; at most 20 of each.
    """

    before: Figures
    after: Figures
    harmed: tuple[ClassLoss, ...]
    nearest: tuple[ClassLoss, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One (layer, ridge, step): forget accuracy, and utility where it was measured.

    `ridge` is None along the gradient itself. `share` is the step's length over the
    layer's own norm. `gap` is by how much of a cosine the concept's name stays below the
    fifth best other, at the forget image where it comes closest. `utility` is None where
    the step could not win, so nothing was spent on it; with it comes `worst`, the class that
    lost most among those with enough rows to tell.
    """

    layer: str
    tower: Tower
    ridge: float | None
    step: float
    share: float
    forget: Accuracy
    gap: float
    utility: dict[str, Accuracy] | None
    worst: ClassLoss | None = added(None)


@dataclasses.dataclass(frozen=True, slots=True)
class PassTime:
    """How long a pass of gradients, or a search, took, and on what."""

    seconds: float
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class Trials:
    """Every trial of a search, with the original model's figures.

    `retain_data` names the rows whose inputs whitened the direction, if it is whitened. `took`
    is the time of a search that made all trials, None where several made them.
    """

    name: str
    forget: str
    direction: Direction
    retain_data: str | None
    model_fingerprint: str
    evals: dict[str, str]
    precision: Precision
    steer: Steer
    margin: float | None
    baseline_forget: Accuracy
    baseline_utility: dict[str, Accuracy]
    trials: tuple[Trial, ...]
    version: str
    took: PassTime | None = added(None)

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        about = {"set": self.name, "direction": self.direction, "steer": self.steer}
        return about | {"trials": over_layers([trial.layer for trial in self.trials])}


@dataclasses.dataclass(frozen=True, slots=True)
class JointRef:
    """The joint search an edit belongs to: its sets, and a digest of all layers and steps.

    Edits of equal digests were searched to be in place together.
    """

    names: tuple[str, ...]
    digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class Effect:
    """What a model built on CLIP still shows: the concept, and everything else.

    `concept` counts images taken for it (or answers that name it), `others` those of other
    classes that are taken for theirs.
    """

    concept: Share
    others: Share

    @property
    def ua(self) -> float | None:
        """Return the unlearning accuracy in percent: what of the concept is not recognised."""
        share = self.concept.percent
        return None if share is None else 100 - share

    @property
    def ira(self) -> float | None:
        """Return the retained accuracy in percent: what of the rest is recognised."""
        return self.others.percent


@dataclasses.dataclass(frozen=True, slots=True)
class JudgeFigures:
    """What a judge makes of what a model built on CLIP shows, without and with an edit."""

    judge: str
    before: Effect
    after: Effect


@dataclasses.dataclass(frozen=True, slots=True)
class TargetFigures:
    """What an edit did to a model built on CLIP that its search was steered on.

    `before` and `after` are by `judge`, by which the search was steered; `further` are by
    others, which had no part in it. No layer or step was chosen by pictures or answers that
    are `unseen`.
    """

    target: str
    fingerprint: str
    before: Effect
    after: Effect
    judge: str | None = added(None)
    unseen: bool = added(False)
    further: tuple[JudgeFigures, ...] = added(())

    @property
    def by_judge(self) -> tuple[JudgeFigures, ...]:
        """The figures by each judge, the one first that the search was steered by."""
        return JudgeFigures(self.judge or "", self.before, self.after), *self.further


@dataclasses.dataclass(frozen=True, slots=True)
class EditHeader:
    """An edit: add the tensor `delta` (= step * direction) to `layer`.

    The file also holds the original layer as `before`, so that an edit can be undone to
    the bit. `digests` are of the layer's original values, rounded to fp32, fp16 and
    bf16, so that the same weights are recognised in another precision. The figures of an
    edit that was searched jointly are those with all edits of `joint` in place.
    `layout` is the checkpoint's that the edit was made on, `open_clip` or `transformers`;
    the layer's name and shape are open_clip's in any case. `harmed` and `nearest` are those
    of the edit's `Report`.
    """

    name: str
    concept: str
    layer: str
    tower: Tower
    step: float
    share: float
    model: ModelSpec
    model_fingerprint: str
    digests: dict[str, str]
    gradient: str
    direction: Direction
    ridge: float | None
    retain_data: str | None
    steer: Steer | None
    margin: float | None
    forgotten: bool | None
    baseline_forget: Accuracy | None
    baseline_utility: dict[str, Accuracy] | None
    forget: Accuracy | None
    utility: dict[str, Accuracy] | None
    joint: JointRef | None
    version: str
    layout: str = "open_clip"
    target: TargetFigures | None = None
    harmed: tuple[ClassLoss, ...] = added(())
    nearest: tuple[ClassLoss, ...] = added(())

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        words = {
            "model": str(self.model),
            "concept": self.concept,
            "layer": self.layer,
            "direction": self.direction,
            "step": f"{self.step:.4g} ({100 * self.share:.3g}% of its norm)",
        }
        if self.joint:
            words["together with"] = ", ".join(n for n in self.joint.names if n != self.name)
        if self.forget:
            words["FA@1"] = _change(self.baseline_forget, self.forget)
        for name, kept in (self.utility or {}).items():
            words[f"TA@1 {name}"] = _change((self.baseline_utility or {}).get(name), kept)
        return words


def over_layers(layers: Sequence[str]) -> str:
    """Return in words how many trials there are, one a given layer, and of how many layers."""
    return f"{len(layers)} over {len(set(layers))} layers"


def _pass_in_words(header: GradientHeader | SquaresHeader) -> dict[str, str]:
    batches = f"{header.batch_size} in {header.precision}"
    return {"loss": header.loss, "rows": str(header.rows), "batches of": batches}


def _change(before: Accuracy | None, after: Accuracy) -> str:
    return f"{before.top1:.2f} to {after.top1:.2f}" if before else f"{after.top1:.2f}"
