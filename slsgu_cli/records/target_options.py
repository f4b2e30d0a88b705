"""What the commands on a model built on CLIP are asked for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from slsgu_cli.errors import UsageError
from slsgu_cli.records.method import Direction, Qkv
from slsgu_cli.records.options import (
    ENCODER,
    RIDGE,
    RIDGE_OPTION,
    check_ridge,
    direction_option,
    qkv_option,
    reserve_option,
)
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.studies import PIPELINE_METHODS, Method
from slsgu_cli.records.targets import Budget, GradientOf, PaintOptions, ReportBudget
from slsgu_cli.records.words import (
    DEVICE,
    EVALUATION,
    GENERATION,
    LAYERS,
    OUTPUT,
    ROWS,
    SEARCH,
    TARGET,
    choices,
    option,
    options,
    rates,
)

NAMES = partial(option, ..., metavar="NAME|EDIT...", help="Sets, or edit files.", completes="edit")
TARGET_FOLDER = partial(
    option, ..., "--target", "-t", help="Folder of the model that is built on CLIP.",
    panel=TARGET,
)  # fmt: skip
OUT = partial(
    option, None, "--out", "-o", help="Folder for the results.", panel=OUTPUT,
    without="the store",
)  # fmt: skip

# Beyond the shortest step that reaches the goal, and points that others may lose by it.
TARGET_RESERVE = 1.15
MAX_LOSS = 5.0


def read_judges(name: str, texts: Sequence[str]) -> tuple[ModelSpec, ...]:
    """Return the models that texts name as MODEL or MODEL=WEIGHTS.

    What follows `local-dir:` or `hf-hub:` is a name whole. Raises UsageError for one named twice.
    """
    parts = [(text, "", "") if ":" in text.partition("=")[0] else text.partition("=")
             for text in texts]  # fmt: skip
    judges = tuple(ModelSpec(model, weights or None) for model, _, weights in parts)
    if len(set(judges)) < len(judges):
        raise UsageError(f"{name} names a judge twice", hint="leave one of them out")
    return judges


def _written(judges: Sequence[ModelSpec]) -> list[str]:
    return [f"{each.name}={each.pretrained}" if each.pretrained else each.name for each in judges]


def judge_option(words: str) -> Any:
    """Return the field of the models that say what images show; `words` are for none."""
    return option(
        (), "--judge", metavar="MODEL", panel=EVALUATION, read=read_judges, write=_written,
        without=words,
        help="CLIP that says what images show: as --model, or MODEL=WEIGHTS; `set`: the set's.",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRequest:
    """Which images to make: `count` of them, the prompts in turn, seeds from `seed` on."""

    prompts: Sequence[str] = option(
        ..., "--generate", help="Forget what --pipeline makes of this prompt.", panel=GENERATION,
        metavar="PROMPT",
    )  # fmt: skip
    pipeline: Path = option(
        ..., "--pipeline", help="Folder of a diffusion pipeline, for --generate.",
        panel=GENERATION, without="none",
    )  # fmt: skip
    count: int = option(500, "--count", min=1, help="Images to generate.", panel=GENERATION)
    seed: int = 0
    paint: PaintOptions = options(PaintOptions())
    device: str = DEVICE()


@dataclass(frozen=True, slots=True, kw_only=True)
class SteerOptions:
    """How to search on a target. Without `layers`, the `top` most important are searched.

    `full` measures what every trial keeps, not only the steps that may win. `goal` is the
    unlearning accuracy to reach, in percent. A layer's step is `reserve` times the shortest
    that reaches it, or less where others would lose more than `max_loss`, even if the goal
    is missed by that. The first of
    `judges` is searched by, the set's CLIP by default; figures are by each. `gradient_of` is
    CLIP's loss or, of a LLaVA, its own. Edits `beside` are of other text encoders than the one
    that is searched, and in place for all of the search.
    """

    target: Path = TARGET_FOLDER()
    beside: Sequence[str] = option(
        (), "--with", help="Edit of another text encoder, which stays in place.", panel=TARGET,
        metavar="EDIT", without="the original ones", completes="edit",
    )  # fmt: skip
    layers: Sequence[str] = option(
        (), "--layer", help="Search this layer.", panel=LAYERS, metavar="LAYER",
        without="the --top most important", completes="layer",
    )  # fmt: skip
    top: int = option(3, "--top", min=1, help="Layers to search at most.", panel=LAYERS)
    gradient_of: GradientOf | None = option(
        None, "--gradient", help="Of CLIP's forget loss or the target's.", panel=LAYERS,
        without="CLIP's; of a LLaVA its own",
    )  # fmt: skip
    direction: Direction = direction_option(Direction.WHITENED, "whitened")
    ridge: float | None = RIDGE_OPTION(without=f"{RIDGE:g}")
    qkv: Qkv = qkv_option(Qkv.FUSED, "fused")
    goal: float = option(
        90.0, "--goal", min=0.0, max=100.0, panel=SEARCH,
        help="Share of the concept, in percent, that must no longer be recognised.",
    )  # fmt: skip
    reserve: float = reserve_option(TARGET_RESERVE)
    max_loss: float = option(
        MAX_LOSS, "--max-loss", min=0.0, panel=SEARCH, metavar="POINTS",
        help="Points that others may lose; a step that costs more is shortened.",
    )  # fmt: skip
    steps: int = option(10, "--steps", min=1, help="Trials a layer at most.", panel=SEARCH)
    full: bool = option(
        False, "--full", help="Measure what every trial keeps, enough or not.", panel=SEARCH
    )
    budget: Budget = options(Budget(), omit=("seed",))
    report: ReportBudget = options(ReportBudget())
    judges: Sequence[ModelSpec] = judge_option("set")
    encoder: str | None = ENCODER()
    device: str = DEVICE()

    def __post_init__(self) -> None:
        """Refuse a ridge of the gradient, and two directions."""
        check_ridge(self.direction, self.ridge)
        if self.direction is Direction.BOTH:
            raise UsageError(
                "a model built on CLIP is searched along one direction",
                hint="--direction whitened or --direction gradient",
            )

    @property
    def damping(self) -> float:
        """The ridge in force where the direction is whitened."""
        return RIDGE if self.ridge is None else self.ridge

    @property
    def report_budget(self) -> Budget:
        """What a report takes, made as in a trial."""
        return replace(self.budget, concept=self.report.concept, others=self.report.others)


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Return the numbers that a list of numbers and ranges names, as `0-3,8`. Raises UsageError."""
    values: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise UsageError(f"{name} {text} is no list of numbers", hint=f"{name} 0-3,8")
        values += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(values)) != len(values) or not values:
        raise UsageError(f"{name} {text} names {'a number twice' if values else 'no number'}")
    return tuple(values)


SEEDS = (0, 1, 2, 3)
SEEDS_OPTION = partial(
    option, help="Seeds of the noise: 0-3, or 188,288.", panel=GENERATION, metavar="SEEDS",
    read=numbers, repeatable=False, write=lambda seeds: ",".join(map(str, seeds)),
)  # fmt: skip
STEPS_FLAGS = {"steps": ("--steps", "--denoise")}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What `generate` is asked for. `judge` None leaves the images unjudged."""

    names: Sequence[str] = NAMES()
    target: Path = TARGET_FOLDER()
    prompts: Sequence[str] = option(
        (), "--prompt", help="What to generate.", panel=GENERATION,
        without="the concept and other classes",
    )  # fmt: skip
    prompt_file: Path | None = option(
        None, "--prompts", help="File of prompts, one a line, or prompt<TAB>class.",
        panel=GENERATION, without="none",
    )  # fmt: skip
    seeds: Sequence[int] = SEEDS_OPTION(SEEDS, "--seeds", without="0-3")
    paint: PaintOptions = options(PaintOptions(), flags=STEPS_FLAGS)
    judges: Sequence[ModelSpec] = judge_option("none")
    classes: str | None = option(
        None, "--classes", help="File of class names.", panel=EVALUATION, metavar="FILE",
        without="the set's own classes",
    )  # fmt: skip
    templates: str | None = option(
        None, "--templates", help="File of prompts for these classes.", panel=EVALUATION,
        metavar="FILE", without="imagenet-simple",
    )  # fmt: skip
    out: Path | None = OUT()
    device: str = DEVICE()


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasRequest:
    """Which answer set to make, where, and by which CLIP to judge it."""

    names: Sequence[str] = NAMES()
    target: Path = TARGET_FOLDER()
    out: Path = option(..., "--out", "-o", help="Folder for the results.", panel=OUTPUT)
    themes: str = option(
        ...,
        "--themes",
        help="File of themes, for unlearncanvas.",
        panel=ROWS,
        metavar="FILE",
        without="none",
    )
    objects: str = option(
        ...,
        "--objects",
        help="File of objects, for unlearncanvas.",
        panel=ROWS,
        metavar="FILE",
        without="none",
    )
    judges: Sequence[ModelSpec] = judge_option("none")
    seeds: Sequence[int] = SEEDS_OPTION((188, 288, 588, 688, 888), "--seeds")
    paint: PaintOptions = options(PaintOptions(steps=100, guidance=9.0), flags=STEPS_FLAGS)
    device: str = DEVICE()


@dataclass(frozen=True, slots=True, kw_only=True)
class AskRequest:
    """What `ask` is asked for.

    Without images, `samples` evaluation images of the concept are shown, and as many of
    other classes.
    """

    names: Sequence[str] = NAMES()
    target: Path = TARGET_FOLDER()
    images: Sequence[Path] = option(
        (), "--image", help="Image to ask about.", panel=GENERATION, without="from the set",

    )  # fmt: skip
    samples: int = option(
        3, "--samples", min=1, help="Images of the concept, without --image.", panel=GENERATION
    )
    questions: Sequence[str] = option(
        ("What is shown in this image?",), "--question", help="What to ask.", panel=GENERATION
    )
    out: Path | None = OUT()
    device: str = DEVICE()


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
        ..., "--target", "-t", help="Folder of a diffusion pipeline to compare on.", panel=TARGET,
        without="on CLIP itself",

    )  # fmt: skip
    methods: Sequence[Method] = option(
        PIPELINE_METHODS, "--methods", metavar="METHODS", without="all",
        read=choices(PIPELINE_METHODS, always=Method.ORIGINAL),
        help="Of esd, salun, ours.", panel=SEARCH,
    )  # fmt: skip
    rates: Sequence[float] = option(
        (1e-5,), "--lr", metavar="RATES", read=_fixed_rates, help="Learning rates.", panel=SEARCH
    )
    iterations: int = option(
        1000, "--iterations", min=1, help="Updates of a trained method.", panel=TARGET
    )
    # Our search paints with the seeds from 0: these are others.
    budget: Budget = options(
        Budget(seed=1000),
        omit=("questions",),
        panel=TARGET,
        help={"concept": "Pictures of the concept.", "others": "Pictures of other classes."},
    )
    judges: Sequence[ModelSpec] = judge_option("set")
    device: str = DEVICE()

    def __post_init__(self) -> None:
        """Refuse too few pictures to tell what is kept."""
        if self.budget.others < 2:
            raise UsageError(f"--others {self.budget.others} is out of range: it must be 2 or more")
