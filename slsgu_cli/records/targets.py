"""What is recorded of models built on CLIP: images, answers, trials."""

from dataclasses import dataclass
from enum import StrEnum

from slsgu_cli.records.codec import added
from slsgu_cli.records.figures import Effect, JudgeFigures, Share
from slsgu_cli.records.method import Direction, Tower, over_layers
from slsgu_cli.records.words import GENERATION, option, options


class GradientOf(StrEnum):
    """Whose loss the forget gradient is of: CLIP's pooled one, or the target's own."""

    CLIP = "clip"
    TARGET = "target"


class Protocol(StrEnum):
    """Which images to make: of one's own prompts, or a benchmark's answer set."""

    PROMPTS = "prompts"
    UNLEARNCANVAS = "unlearncanvas"


@dataclass(frozen=True, slots=True, kw_only=True)
class PaintOptions:
    """How a pipeline generates: denoising steps, and classifier-free guidance.

    `guidance` None is the pipeline's own. Images are made `batch` at a time, by a generator
    seeded for each, so that one image does not depend on what else was asked for.
    """

    steps: int = option(
        25, "--denoise", min=1, help="Denoising steps of an image.", panel=GENERATION
    )
    guidance: float | None = option(
        None, "--guidance", min=0.0, help="Classifier-free guidance.", panel=GENERATION,
        without="the pipeline's",
    )  # fmt: skip
    batch: int = 8


@dataclass(frozen=True, slots=True)
class PromptResult:
    """One prompt: the class it asks for, and images taken for that class by the judge."""

    prompt: str
    label: str | None
    before: Share | None
    after: Share | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Images of a pipeline before and after an edit, from the same prompts and seeds.

    Shares and effects are by `judge`, the first one asked; `further` has those of others.
    `digests` are the SHA-256 of the pictures.
    """

    name: str
    concept: str
    target: str
    edits: dict[str, str]
    seeds: tuple[int, ...]
    paint: PaintOptions
    prompts: tuple[PromptResult, ...]
    judge: str | None
    before: Effect | None
    after: Effect | None
    version: str
    further: tuple[JudgeFigures, ...] = added(())
    digests: dict[str, str] = added(factory=dict)

    @property
    def by_judge(self) -> tuple[JudgeFigures, ...]:
        """The figures by each judge, in the order in which they were asked; none without one."""
        if self.before is None or self.after is None:
            return ()
        return JudgeFigures(self.judge or "", self.before, self.after), *self.further

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        images = f"2 x {len(self.prompts) * len(self.seeds)}"
        words = {"target": self.target, "edits": ", ".join(self.edits), "images": images}
        if self.before and self.after and self.after.ua is not None:
            words["UA"] = f"{self.before.ua:.1f} to {self.after.ua:.1f}"
        return words


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says to a question about an image, before and after an edit."""

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

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        edits, answers = ", ".join(self.edits), f"2 x {len(self.answers)}"
        return {"target": self.target, "edits": edits, "answers": answers}


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedSource:
    """Images that a pipeline made for `build-sets`: image n of prompt n, with seed + n."""

    pipeline: str
    pipeline_fingerprint: str
    prompts: tuple[str, ...]
    count: int
    seed: int
    paint: PaintOptions
    version: str

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        prompts = "; ".join(self.prompts)
        return {"pipeline": self.pipeline, "prompts": prompts, "images": str(self.count)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one trial on a target may take: images or questions of the concept and of others.

    A trial that surely misses its goal takes fewer of the concept.
    """

    concept: int = option(
        20, "--images", min=1, help="Images of the concept a trial.", panel=GENERATION
    )
    others: int = option(
        100, "--others", min=1, help="Images of other classes a trial.", panel=GENERATION
    )
    seed: int = option(0, "--seed", help="Seed of the images.", panel=GENERATION)
    questions: tuple[str, ...] = option(
        ("What is shown in this image?",), "--question", help="What a LLaVA is asked.",
        panel=GENERATION,
    )  # fmt: skip
    paint: PaintOptions = options(PaintOptions(steps=20))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportBudget:
    """Of how many images or questions figures are, that no layer or step was chosen by."""

    concept: int = option(
        40, "--report-images", min=1, help="Images of the concept for figures.", panel=GENERATION
    )
    others: int = option(
        100, "--report-others", min=1, help="Images of other classes for figures.",
        panel=GENERATION,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TargetTrial:
    """One step of one layer: what the target still shows. `others` None was not measured.

    `concept` is of fewer than the budget has where these were enough to miss the goal.
    """

    layer: str
    tower: Tower
    step: float
    share: float
    concept: Share
    others: Share | None


@dataclass(frozen=True, slots=True)
class TargetReport:
    """What a target shows of what it was asked that nothing was chosen by, by each judge.

    `layer` None is the original. `asked` is a digest of the prompts and seeds, or of the
    images and questions.
    """

    layer: str | None
    step: float
    asked: str
    effects: dict[str, Effect]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTrials:
    """Every trial of a search that was steered on a target.

    `importance` ranks the layers that it can be reached through, for the direction taken:
    of a LLaVA's, it is their promise. `asked` is a digest of the prompts and seeds, or of the
    images and questions, that trials are measured on; `reports` are of others.
    `seconds` is what all of it took, loading included. `beside` are the edits of other text
    encoders, by digest, that were in place.
    """

    name: str
    target: str
    target_fingerprint: str
    gradient_of: GradientOf
    forget: str
    forget_data: str
    retain_data: str
    evals: dict[str, str]
    direction: Direction
    ridge: float | None
    judge: str | None
    budget: Budget
    goal: float
    importance: dict[str, float]
    before: Effect | None
    trials: tuple[TargetTrial, ...]
    seconds: float
    version: str
    asked: str = added("")
    reports: tuple[TargetReport, ...] = added(())
    beside: dict[str, str] = added(factory=dict)

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        trials = over_layers([trial.layer for trial in self.trials])
        return {"set": self.name, "target": self.target, "trials": trials}


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
