"""Records of gradients, covariances, rankings, trials and edits."""

import dataclasses
from enum import StrEnum

from slsgu_cli.records.directions import Direction, DirectionSpec, Statistic
from slsgu_cli.records.figures import Accuracy, BaseEdits, ClassLoss, PassTime, TargetFigures
from slsgu_cli.records.sets import ModelSpec, SetManifest, Split


class Tower(StrEnum):
    """The two halves of a CLIP model."""

    VISION = "vision"
    TEXT = "text"


class Alignment(StrEnum):
    """How Eq. 8's cosine enters the ranking: its magnitude, or with its sign."""

    ABS = "abs"
    SIGNED = "signed"


class Qkv(StrEnum):
    """Whether query, key and value are one layer, or a layer each."""

    FUSED = "fused"
    SPLIT = "split"


class Criterion(StrEnum):
    """The residual that a search drives to zero: a forget accuracy, or the rest of a margin."""

    FA1 = "fa1"
    FA5 = "fa5"
    MARGIN = "margin"


class UtilityMetric(StrEnum):
    """The utility that compares steps which forget: TA@1, or TA@1 expected of similar images."""

    TA1 = "ta1"
    EXPECTED = "expected"


class Measurement(StrEnum):
    """How far the utility of a step was measured.

    A step is ruled out once it loses even if all other rows are right, and early-stopped once
    rows drawn at random show, with a small risk, that it loses.
    """

    COMPLETE = "complete"
    RULED_OUT = "ruled out"
    EARLY_STOPPED = "early stopped"


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
    """The header of a gradient file.

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


@dataclasses.dataclass(frozen=True, slots=True)
class SquaresHeader:
    """Mean squared mini-batch gradients of every parameter, next to their gradient.

    `gradient` is that gradient's digest: squares are of the same model, rows and options.
    """

    gradient: str
    loss: str
    batches: int
    batch_size: int
    rows: int
    precision: str
    version: str


@dataclasses.dataclass(frozen=True, slots=True)
class SumsHeader:
    """Sums of an unfinished pass, over the first `done` of `batches` mini-batches.

    It is also the state of a training after as many steps, or the answers to as many batches of
    questions. `gradient` is the digest of the result, which addresses the sums. A pass for
    `squares` sums these next to the gradients.
    """

    gradient: str
    device: str
    batches: int
    done: int
    version: str
    squares: bool = False

    @property
    def made_from(self) -> tuple[str, str, int, bool]:
        """The values that must match to resume a pass."""
        return self.gradient, self.device, self.batches, self.squares


@dataclasses.dataclass(frozen=True, slots=True)
class GradientPointer:
    """The gradient files of a set, and the model and data that they were made from.

    `prefixes` are words that the forget gradient's captions have before the name as well, and
    `anchor` is what the name is to become.
    """

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
    prefixes: tuple[str, ...] = ()
    anchor: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class LayerCovariance:
    """A covariance of one layer, whose matrix is a tensor of the file.

    `axis` is the weight's axis of inputs, `count` what the mean is over: inputs, or rows of
    derivatives. `output` is the mean squared output of the layer on these inputs, tr(W C W^T).
    """

    axis: int
    count: float
    output: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class CovarianceHeader:
    """The header of a file of covariances of a model's layers over retain rows.

    They are of the layers' inputs, or of the features' derivatives at their outputs: its
    `statistic`. `uncaptured` lists the layers that could not be captured by that `revision` of
    the code. Captions get `prefixes` where those of the forget gradient have them.
    """

    model: str
    data: str
    rows: int
    layers: dict[str, LayerCovariance]
    uncaptured: tuple[str, ...]
    version: str
    prefixes: tuple[str, ...] = ()
    revision: int = 1
    statistic: Statistic = Statistic.INPUTS

    def is_of(self, pointer: GradientPointer) -> bool:
        """Return whether the model, retain rows and prefixes are those of a set's gradients."""
        wanted = (pointer.model_fingerprint, pointer.retain_data, pointer.prefixes)
        return (self.model, self.data, self.prefixes) == wanted


@dataclasses.dataclass(frozen=True, slots=True)
class FeatureHeader:
    """Image features of the original model, of the rows of a split.

    `evals` has the fingerprint of the rows and the split of each evaluation set, and `split` is
    the part that the features are of. They were computed in `precision`, on a `device`.
    """

    model: str
    evals: dict[str, str]
    split: Split
    precision: Precision
    device: str
    version: str

    def is_of(self, pointer: GradientPointer, manifest: SetManifest) -> bool:
        """Return whether the model and the evaluation rows are those of a set."""
        measured = self.model, self.evals
        return measured == (pointer.model_fingerprint, manifest.measured_on())


@dataclasses.dataclass(frozen=True, slots=True)
class LayerScore:
    """One row of a ranking (Eq. 7 and 8); `front` marks the Pareto set of its tower.

    `direction` is the one that it is scored for, None for a layer that was not ranked.
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
    direction: DirectionSpec | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class PromptReader:
    """A text encoder of a pipeline, the output that is used, and whether an edit changes it."""

    name: str
    model: str
    reads: str
    edited: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """Every candidate layer of a model, scored for one concept along each of `directions`.

    Layers without the inputs that a direction needs are scored along the gradient.
    `target` is the model it was made for, None for the CLIP itself; `unreached` are the
    layers that cannot influence it, with the reason, and `readers` what reads its prompts.
    """

    name: str
    forget: str
    retain: str
    alignment: Alignment
    directions: tuple[DirectionSpec, ...]
    scores: tuple[LayerScore, ...]
    version: str
    target: str | None = None
    unreached: dict[str, str] = dataclasses.field(default_factory=dict)
    qkv: Qkv = Qkv.FUSED
    readers: tuple[PromptReader, ...] = ()

    def by_direction(self) -> dict[DirectionSpec, list[LayerScore]]:
        """Return the scores for each direction that layers were ranked for."""
        ranked = {spec: [s for s in self.scores if s.direction == spec] for spec in self.directions}
        for score in self.scores:
            if score.direction is not None and score.direction not in self.directions:
                ranked.setdefault(score.direction, []).append(score)
        return ranked


# A layer, and the direction it moves in.
Move = tuple[str, DirectionSpec]
# A step of a move.
TrialKey = tuple[Move, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One (layer, direction, step): forget accuracy, and utility where it was measured.

    `share` is the step's length over the layer's own norm. `gap` is the smallest cosine, over
    the forget images, by which the concept's name stays below the fifth best other name.
    `utility` is None where the step cannot win. With it come `worst`, the class with the largest
    expected loss among those with enough rows; `expected`, the TA@1 in percent that similar
    images would have, as a mean over the sets; and `moved`, the mean squared change of cosines
    with other names, relative to the spread of similar images. `measurement` says how far the
    utility of a step that forgets was measured.
    """

    layer: str
    tower: Tower
    direction: DirectionSpec
    step: float
    share: float
    forget: Accuracy
    gap: float
    utility: dict[str, Accuracy] | None
    worst: ClassLoss | None = None
    expected: float | None = None
    measurement: Measurement | None = None
    moved: float | None = None

    @property
    def move(self) -> Move:
        """The layer and the direction it moves in."""
        return self.layer, self.direction


@dataclasses.dataclass(frozen=True, slots=True)
class Trials:
    """Every trial of a search, with the original model's figures.

    `retain_data` names the retain rows whose inputs a direction was made with, if one was. `took`
    is the time of a search that made all trials, None where several made them. `after` are
    the digests of the edits that were in place, by name: baselines are with them.
    """

    name: str
    forget: str
    directions: tuple[Direction, ...]
    retain_data: str | None
    model_fingerprint: str
    evals: dict[str, str]
    precision: Precision
    criterion: Criterion
    margin: float | None
    baseline_forget: Accuracy
    baseline_utility: dict[str, Accuracy]
    trials: tuple[Trial, ...]
    version: str
    took: PassTime | None = None
    after: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class JointRef:
    """The joint search an edit belongs to: its sets, and a digest of all layers and steps.

    Edits of equal digests were searched to be in place together.
    """

    names: tuple[str, ...]
    digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class EditHeader:
    """An edit: add the tensor `delta` (= step * direction) to `layer`.

    The file also holds the original layer as `before`, so that an edit can be undone to
    the bit. `digests` are of the layer's original values, rounded to fp32, fp16 and
    bf16, so that the same weights are recognised in another precision. The figures of an
    edit that was searched jointly are those with all edits of `joint` in place.
    `layout` is the checkpoint's that the edit was made on, `open_clip` or `transformers`;
    the layer's name and shape are open_clip's in any case. `harmed`, `nearest`, `words` and
    `base_edits` are those of the edit's `Report`; its figures are with the edits of `base_edits`
    in place.
    `rank` is that of an edit read from a LoRA, whose figures are of the edit before it was cut.
    What was not measured is None.
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
    direction: DirectionSpec
    retain_data: str | None
    version: str
    layout: str = "open_clip"
    criterion: Criterion | None = None
    margin: float | None = None
    forgotten: bool | None = None
    baseline_forget: Accuracy | None = None
    baseline_utility: dict[str, Accuracy] | None = None
    forget: Accuracy | None = None
    utility: dict[str, Accuracy] | None = None
    joint: JointRef | None = None
    target: TargetFigures | None = None
    harmed: tuple[ClassLoss, ...] = ()
    nearest: tuple[ClassLoss, ...] = ()
    words: tuple[ClassLoss, ...] = ()
    base_edits: BaseEdits | None = None
    rank: int | None = None

    @property
    def after(self) -> dict[str, str]:
        """The digests of the edits that it builds on, by name."""
        earlier = self.base_edits.edits if self.base_edits else {}
        return {name: edit.digest for name, edit in earlier.items()}


class ModelLayout(StrEnum):
    """The format of a written model: transformers, open_clip, or a text encoder for ComfyUI."""

    HF = "hf"
    OPEN_CLIP = "open_clip"
    COMFY = "comfy"


class LoraLayout(StrEnum):
    """The format of a LoRA: kohya's for diffusion clients, or PEFT's for transformers."""

    LORA = "lora"
    PEFT = "peft"


@dataclasses.dataclass(frozen=True, slots=True)
class LoraEdit:
    """An edit in a LoRA: its header, its rank, and where its directions start in each module.

    `prefix` is kohya's, of its text encoder; None if it is that of the file.
    """

    edit: EditHeader
    rank: int
    starts: dict[str, int]
    prefix: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class LoraHeader:
    """The header of a LoRA file; `prefix` is kohya's, of its first edit's text encoder."""

    layout: LoraLayout
    prefix: str
    edits: tuple[LoraEdit, ...]
    version: str
