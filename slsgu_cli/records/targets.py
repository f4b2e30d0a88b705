"""Options and results of commands on models built on CLIP."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from slsgu_cli.errors import UsageError
from slsgu_cli.records.directions import DAMPING, REGISTRY, Direction, DirectionSpec
from slsgu_cli.records.figures import Effect, JudgeFigures, Share
from slsgu_cli.records.method import Qkv, Tower
from slsgu_cli.records.option_fields import (
    DEVICE,
    EVALUATION,
    GENERATION,
    LAYERS,
    OUTPUT,
    ROWS,
    SEARCH,
    TARGET,
    option,
    options,
)
from slsgu_cli.records.options import (
    DAMPING_OPTION,
    ENCODER,
    NAMES,
    direction_option,
    overshoot_option,
    qkv_option,
)
from slsgu_cli.records.sets import ModelSpec


class GradientOf(StrEnum):
    """The loss of the forget gradient: that of CLIP's pooled features, or of the target."""

    CLIP = "clip"
    TARGET = "target"


class Protocol(StrEnum):
    """The images to generate: from prompts, or the answer set of a benchmark."""

    PROMPTS = "prompts"
    UNLEARNCANVAS = "unlearncanvas"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionOptions:
    """How a pipeline generates: denoising steps, and classifier-free guidance.

    If `guidance` is None, the pipeline's default applies. A batch has `batch` images. Each
    image has its own seeded generator, so that it does not depend on the others.
    """

    steps: int = option(
        25, "--denoise", min=1, help="Denoising steps for each image.", panel=GENERATION
    )
    guidance: float | None = option(
        None,
        "--guidance",
        min=0.0,
        help="Classifier-free guidance scale.",
        panel=GENERATION,
        without="the pipeline's",
    )
    batch: int = 8


@dataclass(frozen=True, slots=True)
class PromptResult:
    """A prompt, its class, and how many of its images the judge assigns to that class."""

    prompt: str
    label: str | None
    before: Share | None
    after: Share | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Images of a pipeline before and after an edit, from the same prompts and seeds.

    Shares and effects are by `judge`, the first judge; `further` has those of the others.
    `digests` are the SHA-256 of the pictures.
    """

    name: str
    concept: str
    target: str
    edits: dict[str, str]
    seeds: tuple[int, ...]
    diffusion: DiffusionOptions
    prompts: tuple[PromptResult, ...]
    judge: str | None
    before: Effect | None
    after: Effect | None
    version: str
    further: tuple[JudgeFigures, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def by_judge(self) -> tuple[JudgeFigures, ...]:
        """The figures by each judge, in order; empty without a judge."""
        if self.before is None or self.after is None:
            return ()
        return JudgeFigures(self.judge or "", self.before, self.after), *self.further


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer to a question about an image, before and after an edit."""

    image: str
    question: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """A vision-language model's answers before and after an edit."""

    name: str
    concept: str
    target: str
    edits: dict[str, str]
    answers: tuple[Answer, ...]
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedSource:
    """Images that a pipeline made for `build-sets`: image n of prompt n, with seed + n."""

    pipeline: str
    pipeline_fingerprint: str
    prompts: tuple[str, ...]
    count: int
    seed: int
    diffusion: DiffusionOptions
    version: str


QUESTIONS = partial(option, ("What is shown in this image?",), "--question", panel=GENERATION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The images or questions of one trial on a target: of the concept, and of others.

    A trial that has certainly missed its goal uses fewer images of the concept.
    """

    concept: int = option(
        20, "--images", min=1, help="Images of the concept for each trial.", panel=GENERATION
    )
    others: int = option(
        100, "--others", min=1, help="Images of other classes for each trial.", panel=GENERATION
    )
    seed: int = option(0, "--seed", help="Random seed of the images.", panel=GENERATION)
    questions: tuple[str, ...] = QUESTIONS(help="Question for a LLaVA model.")
    diffusion: DiffusionOptions = options(DiffusionOptions(steps=20))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutBudget:
    """How many test images or questions measure the chosen edit."""

    concept: int = option(
        40, "--test-images", min=1, help="Test images of the concept.", panel=GENERATION
    )
    others: int = option(
        100,
        "--test-others",
        min=1,
        help="Test images of other classes.",
        panel=GENERATION,
    )


@dataclass(frozen=True, slots=True)
class TargetTrial:
    """One step of one layer, and its figures on the target. `others` is None if not measured.

    `concept` covers less than the budget if the trial had already missed the goal.
    """

    layer: str
    tower: Tower
    step: float
    share: float
    concept: Share
    others: Share | None


@dataclass(frozen=True, slots=True)
class TargetReport:
    """The effects on a target by each judge, on prompts or questions that the search did not use.

    `layer` is None for the original. `asked` is a digest of the prompts and seeds, or of the
    images and questions.
    """

    layer: str | None
    step: float
    asked: str
    effects: dict[str, Effect]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTrials:
    """Every trial of a search on a target.

    `importance` ranks the layers of the target along the direction of the search; for a LLaVA,
    it is their expected effect. `asked` is a digest of the prompts and seeds, or of the images
    and questions, of the trials; `reports` cover other ones. `seconds` includes loading.
    `applied` has the digests of the applied edits of other text encoders.
    """

    name: str
    target: str
    target_fingerprint: str
    gradient_of: GradientOf
    forget: str
    forget_data: str
    retain_data: str
    evals: dict[str, str]
    direction: DirectionSpec
    judge: str | None
    budget: Budget
    goal: float
    importance: dict[str, float]
    before: Effect | None
    trials: tuple[TargetTrial, ...]
    seconds: float
    version: str
    asked: str = ""
    reports: tuple[TargetReport, ...] = ()
    applied: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSet:
    """An UnlearnCanvas answer set and its figures, where a judge gave any.

    `ua` counts images of the concept in which it is not recognised, `ira` and `cra` images
    of other themes and objects in which these are.
    """

    name: str
    concept: str
    domain: str
    images: int
    judge: str | None
    ua: Share | None
    ira: Share | None
    cra: Share | None
    version: str


TARGET_FOLDER = partial(
    option,
    ...,
    "--target",
    "-t",
    help="Folder of the model built on CLIP.",
    panel=TARGET,
)
OUT = partial(
    option,
    None,
    "--out",
    "-o",
    help="Output folder.",
    panel=OUTPUT,
    without="the store",
)

# The factor on the shortest step that reaches the goal, and the points that others may lose.
TARGET_OVERSHOOT = 1.15
MAX_LOSS = 5.0


def read_judges(name: str, texts: Sequence[str]) -> tuple[ModelSpec, ...]:
    """Return the models that texts name as MODEL or MODEL=WEIGHTS.

    A name after `local-dir:` or `hf-hub:` may contain `=`. Raises UsageError for duplicates.
    """
    parts = [
        (text, "", "") if ":" in text.partition("=")[0] else text.partition("=") for text in texts
    ]
    judges = tuple(ModelSpec(model, weights or None) for model, _, weights in parts)
    if len(set(judges)) < len(judges):
        raise UsageError(f"{name} names a judge twice", hint="leave one of them out")
    return judges


# A judge of this name looks at the states that a pipeline reads of its text encoder.
STATES = "states"


def judge_option(words: str, more: str = "") -> Any:
    """Return the field of the models that classify images; `words` describes the default.

    `more` adds to the help.
    """
    return option(
        (),
        "--judge",
        metavar="MODEL",
        panel=EVALUATION,
        read=read_judges,
        without=words,
        help="CLIP that classifies images: a model as for --model, MODEL=WEIGHTS, or set for "
        f"the set's own.{more}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRequest:
    """The images to generate: `count` images, alternating the prompts, with seeds from `seed`."""

    prompts: Sequence[str] = option(
        ...,
        "--generate",
        help="Forget the images that --pipeline generates for this prompt.",
        panel=GENERATION,
        metavar="PROMPT",
    )
    pipeline: Path = option(
        ...,
        "--pipeline",
        help="Folder of the diffusion pipeline for --generate.",
        panel=GENERATION,
        without="none",
    )
    count: int = option(
        500, "--count", min=1, help="Number of images to generate.", panel=GENERATION
    )
    seed: int = 0
    diffusion: DiffusionOptions = options(DiffusionOptions())
    device: str = DEVICE()


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSearchOptions:
    """How to search on a target. Without `layers`, the `top` most important are searched.

    `full` measures retained accuracy for every trial, not only for candidates. `goal` is the
    unlearning accuracy to reach, in percent. A layer's step is `overshoot` times the shortest
    that reaches it, or less where others would lose more than `max_loss`, even if the goal
    is missed as a result. The first of `judges` (default: the set's CLIP) decides in the search;
    every judge gives figures. `gradient_of` is CLIP's loss or the target's own: of a LLaVA's
    answers, or of all states that a pipeline reads of its text encoder. The edits in `applied`
    belong to other text encoders and stay in place during the search.
    """

    target: Path = TARGET_FOLDER(without="CLIP itself")
    applied: Sequence[str] = option(
        (),
        "--with",
        help="Edit of another text encoder, which stays applied.",
        panel=TARGET,
        metavar="EDIT",
        without="none",
    )
    layers: Sequence[str] = option(
        (),
        "--layer",
        help="Search this layer.",
        panel=LAYERS,
        metavar="LAYER",
        without="the --top most important layers",
    )
    top: int = option(3, "--top", min=1, help="Maximum number of layers to search.", panel=LAYERS)
    gradient_of: GradientOf | None = option(
        None,
        "--gradient",
        help="Use the gradient of CLIP's forget loss or of the target's own loss.",
        panel=LAYERS,
        without="clip, or target for a LLaVA and for words alone",
    )
    direction: Direction = direction_option(Direction.WHITENED, "whitened")
    damping: float | None = DAMPING_OPTION(without=f"{DAMPING:g}")
    qkv: Qkv = qkv_option(Qkv.FUSED, "fused")
    goal: float = option(
        90.0,
        "--goal",
        min=0.0,
        max=100.0,
        panel=SEARCH,
        help="Percentage of the concept's images that must no longer be recognised.",
    )
    overshoot: float = overshoot_option(TARGET_OVERSHOOT)
    max_loss: float = option(
        MAX_LOSS,
        "--max-loss",
        min=0.0,
        panel=SEARCH,
        metavar="POINTS",
        help="Accuracy that other classes may lose, in points. Costlier steps are shortened.",
    )
    steps: int = option(
        10, "--steps", min=1, help="Maximum number of trials for each layer.", panel=SEARCH
    )
    full: bool = option(
        False,
        "--full",
        help="Measure retained accuracy for every trial, not only for those that reach the goal.",
        panel=SEARCH,
    )
    budget: Budget = options(Budget(), omit=("seed",))
    test: HeldOutBudget = options(HeldOutBudget())
    judges: Sequence[ModelSpec] = judge_option(
        "set", f" {STATES} judges a pipeline's text encoder, without images, and stands first."
    )
    encoder: str | None = ENCODER()
    device: str = DEVICE()

    def __post_init__(self) -> None:
        """Refuse a damping of the plain gradient, and two directions."""
        self.direction.check(self.damping)
        if self.direction is Direction.BOTH:
            raise UsageError(
                "a model built on CLIP is searched along one direction",
                hint=f"--direction {' or '.join(REGISTRY)}",
            )

    @property
    def spec(self) -> DirectionSpec:
        """The direction to search along, with its parameters."""
        return DirectionSpec.of(self.direction, damping=self.damping)

    @property
    def test_budget(self) -> Budget:
        """The budget of a report."""
        return replace(self.budget, concept=self.test.concept, others=self.test.others)


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Parse a list of numbers and ranges, such as `0-3,8`. Raises UsageError."""
    values: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise UsageError(f"{name} {text} is not a list of numbers", hint=f"{name} 0-3,8")
        values += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(values)) != len(values) or not values:
        raise UsageError(f"{name} {text} names {'a number twice' if values else 'no number'}")
    return tuple(values)


SEEDS = (0, 1, 2, 3)
SEEDS_OPTION = partial(
    option,
    help="Noise seeds: a range such as 0-3, or a list such as 188,288.",
    panel=GENERATION,
    metavar="SEEDS",
    read=numbers,
    repeatable=False,
)
STEPS = {"flags": ("--steps", "--denoise")}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Options of `generate`. Without `judges`, no figures are computed."""

    names: Sequence[str] = NAMES()
    target: Path = TARGET_FOLDER()
    prompts: Sequence[str] = option(
        (),
        "--prompt",
        help="Prompt to generate images for.",
        panel=GENERATION,
        without="the concept and other classes",
    )
    prompt_file: Path | None = option(
        None,
        "--prompts",
        help="File of prompts, one per line, optionally as prompt<TAB>class.",
        panel=GENERATION,
        without="none",
    )
    seeds: Sequence[int] = SEEDS_OPTION(SEEDS, "--seeds", without="0-3")
    diffusion: DiffusionOptions = options(DiffusionOptions(), steps=STEPS)
    judges: Sequence[ModelSpec] = judge_option("none")
    classes: str | None = option(
        None,
        "--classes",
        help="File of class names for the judge.",
        panel=EVALUATION,
        metavar="FILE",
        without="the set's own classes",
    )
    templates: str | None = option(
        None,
        "--templates",
        help="File of prompt templates for these classes.",
        panel=EVALUATION,
        metavar="FILE",
        without="imagenet-simple",
    )
    out: Path | None = OUT()
    device: str = DEVICE()


CANVAS_FILE = partial(option, ..., panel=ROWS, metavar="FILE", without="none")


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasRequest:
    """Options of `generate --protocol unlearncanvas`."""

    names: Sequence[str] = NAMES()
    target: Path = TARGET_FOLDER()
    out: Path = option(..., "--out", "-o", help="Output folder.", panel=OUTPUT)
    themes: str = CANVAS_FILE("--themes", help="File of themes for --protocol unlearncanvas.")
    objects: str = CANVAS_FILE("--objects", help="File of objects for --protocol unlearncanvas.")
    judges: Sequence[ModelSpec] = judge_option("none")
    seeds: Sequence[int] = SEEDS_OPTION((188, 288, 588, 688, 888), "--seeds")
    diffusion: DiffusionOptions = options(DiffusionOptions(steps=100, guidance=9.0), steps=STEPS)
    device: str = DEVICE()


@dataclass(frozen=True, slots=True, kw_only=True)
class AskRequest:
    """Options of `ask`.

    Without `images`, the questions are about `samples` evaluation images of the concept and as
    many of other classes.
    """

    names: Sequence[str] = NAMES()
    target: Path = TARGET_FOLDER()
    images: Sequence[Path] = option(
        (),
        "--image",
        help="Image to ask the question about.",
        panel=GENERATION,
        without="images of the set",
    )
    samples: int = option(
        3,
        "--samples",
        min=1,
        help="Number of images of the concept, without --image.",
        panel=GENERATION,
    )
    questions: Sequence[str] = QUESTIONS(help="Question to ask.")
    out: Path | None = OUT()
    device: str = DEVICE()
