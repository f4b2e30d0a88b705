"""The options of each command, as records.

The Python functions take these records. The command line derives its options from their fields.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from slsgu_cli.errors import UsageError
from slsgu_cli.records.directions import DAMPING, REGISTRY, Direction, DirectionSpec
from slsgu_cli.records.method import (
    Alignment,
    Criterion,
    LoraLayout,
    ModelLayout,
    Precision,
    Qkv,
    Tower,
    UtilityMetric,
)
from slsgu_cli.records.option_fields import (
    DEVICE,
    DOWNLOAD,
    EVALUATION,
    LAYERS,
    OUTPUT,
    ROWS,
    SEARCH,
    SPEED,
    TARGET,
    bytes_of,
    option,
    options,
)
from slsgu_cli.records.sets import (
    CollectRequest,
    DownloadOptions,
    ModelSpec,
    Screening,
    SetManifest,
)
from slsgu_cli.records.words import WordList, read_words

# A cosine, for `Criterion.MARGIN`.
MARGIN = 0.02
# Factor on the shortest step that forgets the validation images: see docs/results/test-images.md.
OVERSHOOT = 1.25
# The same where prompts stand in for images: see docs/results/words.md.
PROMPT_OVERSHOOT = 2.0
# In points of accuracy: more than a class with few rows can lose by chance.
MAX_CLASS_LOSS = 25.0
NO_BOUND = 100.0
OF_RANKING = "the ranking's"

# Options that several records share.
PRECISION = partial(
    option,
    Precision.FP32,
    "--precision",
    help="Arithmetic precision. Gradients are always summed in fp32.",
    panel=SPEED,
)
BATCH_SIZE = partial(
    option,
    16,
    "--batch-size",
    min=2,
    help="Image-text pairs in each mini-batch of the losses.",
    panel=SPEED,
)
ENCODER = partial(
    option,
    None,
    "--encoder",
    help="Text encoder of the target, such as text_encoder_2 of SDXL.",
    panel=TARGET,
    without="the one whose weights fit",
)
DAMPING_OPTION = partial(
    option,
    None,
    "--damping",
    min=1e-6,
    help="Damping of the statistics of a direction, as a fraction of their mean eigenvalue.",
    panel=LAYERS,
)
BUDGET = partial(option, None, panel=SPEED, metavar="SIZE", read=bytes_of, without="free memory")
COLUMN = partial(option, None, panel=ROWS, metavar="COLUMN", without="detected by name")
NAMES = partial(option, ..., metavar="NAME|EDIT...", help="Names of sets, or edit files.")
OVERWRITE = partial(
    option, False, "--overwrite", help="Replace existing files at --out.", panel=OUTPUT
)


def _named_directions() -> str:
    """Return the directions in words, each with its name."""
    *others, last = (f"{entry.words} ({kind})" for kind, entry in REGISTRY.items())
    return f"{', '.join(others)} or {last}"


def direction_option(usual: Direction | None, words: str) -> Any:
    """Return the field of a direction. The help shows `words` as its default."""
    return option(
        usual,
        "--direction",
        help=f"Steps follow {_named_directions()}; both stands for "
        f"{' and '.join(Direction.BOTH.each)}.",
        panel=LAYERS,
        without=words,
    )


def qkv_option(usual: Qkv | None, words: str) -> Any:
    """Return the field that fuses or splits query, key and value. `words`: see above."""
    return option(
        usual,
        "--qkv",
        help="Treat query, key and value as one fused layer or as three layers.",
        panel=LAYERS,
        without=words,
    )


def overshoot_option(usual: float | None, without: str | None = None) -> Any:
    """Return the field of the factor on the shortest step that forgets."""
    return option(
        usual,
        "--overshoot",
        min=1.0,
        without=without,
        panel=SEARCH,
        help="Multiply the shortest forgetting step by this factor, so that unseen images are "
        "forgotten too.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """Options of `build-sets`.

    `sources` follow the grammar of `sources.parse_source`. `concept` defaults to the name,
    `match` to the concept, `retain_sources` to `sources`. The keys of `evals`, `classes`,
    `templates` and `tests` are names of evaluation sets; `forget_eval` is the one that has the
    concept as a class. The test split is `test_fraction` of each class, or the rows of `tests`;
    all other rows form the validation split, which chooses layer and step. `collect` replaces
    the sources by a download. `dropped` holds keys or hashes of rows that a person removed, for
    each part (forget, retain or an evaluation set).
    """

    name: str = option("", metavar="NAME", help="Name of the set. Omit it with --names.")
    concept: str = option("", "--concept", help="Concept to forget.", panel=ROWS, without="NAME")
    model: ModelSpec = options(ModelSpec(""), name={"without": "none"})
    words: Sequence[str] = option(
        (),
        "--words",
        metavar="TEXT|FILE",
        panel=ROWS,
        help="Words of the concept, or a file: WORD<tab>alias, and texts below # description. "
        "Without --source, no image is needed.",
        without="the concept",
    )
    thing: str | None = option(
        None,
        "--from",
        metavar="THING",
        panel=ROWS,
        help='Forget --words only as an attribute of this thing: "THING with WORDS", or words '
        'such as "red {}". The thing, and the attribute of other things, are retained.',
        without="none",
    )
    sources: Sequence[str] = option(
        (),
        "--source",
        "-s",
        metavar="SOURCE",
        panel=ROWS,
        help="Source of rows: tar shards, parquet, table, folder or glob. ?column=value "
        "selects rows.",
    )
    match: Sequence[str] = option(
        (),
        "--match",
        help="Words that mark a caption as part of the forget set.",
        panel=ROWS,
        without="the concept",
    )
    not_match: Sequence[str] = option(
        (), "--not-match", help="Words that exclude a caption from both sets.", panel=ROWS
    )
    regex: bool = option(
        False, "--regex", help="Treat patterns as regular expressions.", panel=ROWS
    )
    max_forget: int | None = option(
        None,
        "--max-forget",
        min=1,
        help="Maximum number of forget rows.",
        panel=ROWS,
        without="all matching rows",
    )
    retain_sources: Sequence[str] = option(
        (),
        "--retain-source",
        help="Source of retain rows.",
        panel=ROWS,
        metavar="SOURCE",
        without="--source",
    )
    retain_samples: int = option(
        8000, "--retain-samples", min=1, help="Number of retain rows to sample.", panel=ROWS
    )
    retain_exclude: Sequence[str] = option(
        (), "--retain-exclude", help="Words that exclude a caption from the retain set.", panel=ROWS
    )
    evals: dict[str, str] = option(
        {},
        "--eval",
        metavar="NAME=SOURCE",
        panel=EVALUATION,
        help="Evaluation set: a source of labelled images.",
    )
    classes: dict[str, str] = option(
        {},
        "--classes",
        metavar="NAME=FILE",
        panel=EVALUATION,
        help="Class names of an evaluation set: a file, or imagenet.",
        without="the labels",
    )
    templates: dict[str, str] = option(
        {},
        "--templates",
        metavar="NAME=FILE",
        panel=EVALUATION,
        help="Prompt templates: a file, or imagenet, imagenet-simple, celeba.",
        without="imagenet-simple",
    )
    test_fraction: float = option(
        0.5,
        "--test-fraction",
        min=0.0,
        max=0.9,
        panel=EVALUATION,
        metavar="SHARE",
        help="Fraction of each class to hold out for testing. Reported figures use these images.",
    )
    tests: dict[str, str] = option(
        {},
        "--test",
        metavar="NAME=SOURCE",
        panel=EVALUATION,
        help="Separate source of test images for an evaluation set.",
        without="a fraction of --eval",
    )
    forget_eval: str | None = option(
        None,
        "--forget-eval",
        help="Evaluation set that has the concept as a class.",
        panel=EVALUATION,
        metavar="NAME",
        without="the one with that class",
    )
    image_column: str | None = COLUMN("--image-column", help="Column of images or image paths.")
    caption_column: str | None = COLUMN(
        "--caption-column", "--caption-col", help="Column of captions."
    )
    label_column: str | None = COLUMN(
        "--label-column", help="Column of evaluation labels.", panel=EVALUATION
    )
    seed: int = option(0, "--seed", help="Random seed for sampling.", panel=ROWS)
    screening: Screening = options(Screening())
    collect: CollectRequest | None = None
    dropped: dict[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Default the concept to the name."""
        if not self.concept:
            object.__setattr__(self, "concept", self.name)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of captions in the forget set. Raises what `word_list` raises."""
        if self.words:
            return self.word_list.patterns
        return tuple(self.match) or (self.concept,)

    @property
    def word_list(self) -> WordList:
        """The words of the concept. Raises MissingError or InputError."""
        words = read_words(self.words)
        return words if self.thing is None else words.within(self.thing)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataSource:
    """Metadata to collect samples from, and options of the download."""

    metadata: Sequence[str] = option(
        (),
        "--metadata",
        help="Parquet files of captions and image URLs to download.",
        panel=DOWNLOAD,
        metavar="PARQUET",
    )
    url_column: str = option(
        "URL", "--url-col", help="Column of URLs in --metadata.", panel=DOWNLOAD, metavar="COLUMN"
    )
    download: DownloadOptions = options(DownloadOptions())


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOptions:
    """Options of a gradient pass. `memory_budget` is in bytes; None means all free memory.

    `prefixes` repeat the forget set with each of these words before the name. With an `anchor`,
    the name is to become this: the gradient is that of the loss towards it.
    """

    batch_size: int = BATCH_SIZE()
    precision: Precision = PRECISION()
    device: str = DEVICE()
    memory_budget: int | None = BUDGET(
        "--memory-budget", help="Memory limit for activations, such as 8G."
    )
    prefixes: Sequence[str] = option(
        (),
        "--prefix",
        metavar="WORDS",
        panel=ROWS,
        help="Also forget the name when these words precede it.",
    )
    anchor: str | None = option(
        None,
        "--to",
        metavar="TEXT",
        panel=ROWS,
        help='What the name becomes, such as "a logo" or "" for nothing.',
        without="the paper's loss",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """Options of `rank`: the layers to rank, the direction, and the measure of alignment.

    `damping` (None: DAMPING) and `device` (where statistics are computed) apply only to directions
    that need these. With `qkv` split, query, key and value are ranked as separate layers. With
    `target`, a path or a kind of model, layers that cannot influence it are excluded.
    """

    alignment: Alignment = option(
        Alignment.ABS,
        "--alignment",
        help="Measure alignment by the magnitude of the cosine (abs) or by its signed value.",
        panel=LAYERS,
    )
    direction: Direction | None = direction_option(None, "both, or kfac for words alone")
    damping: float | None = DAMPING_OPTION(without=f"{DAMPING:g}")
    qkv: Qkv = qkv_option(Qkv.FUSED, "fused")
    include: Sequence[str] = option(
        (),
        "--include",
        help="Rank only layers whose names contain this text or match this glob.",
        panel=LAYERS,
        metavar="LAYER",
        without="all",
    )
    exclude: Sequence[str] = option(
        (), "--exclude", help="Layers to exclude from the ranking.", panel=LAYERS, metavar="LAYER"
    )
    tower: Tower | None = option(
        None, "--tower", help="Rank the layers of one tower only.", panel=LAYERS, without="both"
    )
    target: str | None = option(
        None,
        "--target",
        "-t",
        panel=TARGET,
        without="CLIP itself",
        help="Rank only the layers that this model uses: a path, sd1, sd2, sdxl, sd3, flux, "
        "llava, paligemma.",
    )
    encoder: str | None = ENCODER()
    device: str = DEVICE()

    def __post_init__(self) -> None:
        """Refuse a damping that no direction has."""
        (self.direction or Direction.BOTH).check(self.damping)

    @property
    def specs(self) -> tuple[DirectionSpec, ...]:
        """The directions to rank for, with their parameters."""
        return (self.direction or Direction.BOTH).specs(self.damping)

    def of_set(self, manifest: SetManifest) -> "RankOptions":
        """Return the options with the direction for a set, if none was given.

        A gradient from words alone generalises to images along kfac: see docs/results/words.md.
        """
        if self.direction is not None:
            return self
        usual = Direction.KFAC if manifest.words_alone else Direction.BOTH
        return replace(self, direction=usual)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Options of `search`.

    For each layer and direction, the search finds the shortest step that meets `criterion` and
    multiplies it by `overshoot`. It chooses the candidate with the highest `utility` among those
    where no class loses more than `max_class_loss` points. Expected utility is the default
    because a count of few images favours the candidate that was selected by it.

    `direction`, `qkv` and `damping` default to those of the ranking. `margin` is the cosine for
    the margin criterion. Unless `exact`, the search interpolates step sizes and stops early on
    vision layers that cannot win. `full` measures the utility of every trial. The edits of
    `after`, and the edits below them, stay applied; the search chooses no step that undoes them.
    """

    layers: Sequence[str] = option(
        (),
        "--layer",
        help="Search this layer, even if it is not on a Pareto front.",
        panel=LAYERS,
        metavar="LAYER",
        without="all layers on the fronts",
    )
    direction: Direction | None = direction_option(None, OF_RANKING)
    damping: float | None = DAMPING_OPTION(without=OF_RANKING)
    qkv: Qkv | None = qkv_option(None, OF_RANKING)
    criterion: Criterion = option(
        Criterion.FA5,
        "--criterion",
        panel=SEARCH,
        help="When the concept counts as forgotten: FA@1 or FA@5 is 0, or its name ranks below "
        "fifth by a margin.",
    )
    utility: UtilityMetric = option(
        UtilityMetric.EXPECTED,
        "--utility",
        panel=SEARCH,
        help="Compare edits by measured TA@1, or by the TA@1 expected on similar images.",
    )
    overshoot: float | None = overshoot_option(
        None, f"{OVERSHOOT:g}, or {PROMPT_OVERSHOOT:g} without images"
    )
    max_class_loss: float = option(
        MAX_CLASS_LOSS,
        "--max-class-loss",
        min=0.0,
        panel=SEARCH,
        metavar="POINTS",
        help="Avoid steps that cost any class more than this many points of accuracy.",
    )
    paper: bool = option(
        False,
        "--paper",
        panel=SEARCH,
        help="Search as in the paper: gradient direction, FA@1 and TA@1, no overshoot, no "
        "class limit.",
    )
    margin: float = option(
        MARGIN,
        "--margin",
        min=0.0,
        help="Margin for --criterion margin, as a cosine.",
        panel=SEARCH,
    )
    steps: int = option(
        10, "--steps", min=1, help="Trials for each layer (K in the paper).", panel=SEARCH
    )
    exact: bool = option(
        False,
        "--exact",
        panel=SEARCH,
        help="Double and bisect the step size (Algorithm 3) and rule layers out only by proof.",
    )
    full: bool = option(
        False,
        "--full",
        help="Measure utility for every trial, not only for candidates.",
        panel=SEARCH,
    )
    device: str = DEVICE()
    precision: Precision = PRECISION()
    cache_budget: int | None = BUDGET(
        "--cache-budget", help="Memory limit for cached activations, such as 8G."
    )
    after: Sequence[str] = option(
        (),
        "--after",
        help="Search on top of this edit, which stays applied.",
        panel=SEARCH,
        metavar="EDIT",
        without="the original model",
    )

    def __post_init__(self) -> None:
        """Set the paper's options. Raises UsageError for options that contradict them."""
        if not self.paper:
            return
        paper = {
            "direction": Direction.GRADIENT,
            "criterion": Criterion.FA1,
            "utility": UtilityMetric.TA1,
            "overshoot": 1.0,
            "max_class_loss": NO_BOUND,
            "exact": True,
        }
        usual = {each.name: each.default for each in fields(self)}
        for name, value in paper.items():
            if getattr(self, name) not in (usual[name], value):
                raise UsageError(
                    f"--paper sets --{name.replace('_', '-')} itself",
                    hint="remove one of the two options",
                )
            object.__setattr__(self, name, value)

    def factor(self, *, of_prompts: bool) -> float:
        """Return the overshoot of steps that images, or only prompts, have shown to be enough."""
        if self.overshoot is not None:
            return self.overshoot
        return PROMPT_OVERSHOOT if of_prompts else OVERSHOOT


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthOptions:
    """Scale and rank of edits, and the text encoder that they are for."""

    encoder: str | None = ENCODER()
    scale: float = option(1.0, "--scale", help="Scale the edit by this factor.", panel=LAYERS)
    rank: int | None = option(
        None,
        "--rank",
        min=1,
        help="Truncate the edit to this rank.",
        panel=LAYERS,
        without="all",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyOptions(StrengthOptions):
    """Options for applying edits to a model and writing the result.

    `revert` removes the edits. `force` skips the check that the edits were made for these
    weights. `overwrite` replaces existing files, `dry_run` writes nothing, and `link` hard-links
    unchanged files.
    """

    revert: bool = option(
        False, "--revert", help="Remove the edits instead of applying them.", panel=OUTPUT
    )
    force: bool = option(
        False,
        "--force",
        help="Apply even if the checkpoint is not the one the edit was made for.",
        panel=OUTPUT,
    )
    overwrite: bool = OVERWRITE()
    dry_run: bool = option(
        False,
        "--dry-run",
        help="Check the edit and print the changes without writing files.",
        panel=OUTPUT,
    )
    link: bool = option(
        False,
        "--link",
        help="Hard-link unchanged files of --target instead of copying them.",
        panel=OUTPUT,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyRequest(ApplyOptions):
    """Options of `apply`. `layer` with `step` makes an edit without a search.

    `direction`, `damping` and `qkv` apply to sets without a ranking or an edit. An existing edit
    must have the same direction and kind of layer.
    """

    names: Sequence[str] = NAMES()
    out: Path = option(..., "--out", "-o", help="Path of the new checkpoint.", panel=OUTPUT)
    model: ModelSpec | None = options(
        None, name={"help": "Model to edit.", "without": "the edit's own"}
    )
    target: Path | None = option(
        None,
        "--target",
        "-t",
        help="Model built on CLIP to edit: folder or file.",
        panel=TARGET,
        without="CLIP itself",
    )
    layout: ModelLayout | None = option(
        None,
        "--format",
        panel=OUTPUT,
        without="the model's own",
        help="Write the format of transformers (hf), open_clip, or ComfyUI (text encoder only).",
    )
    layer: str | None = option(
        None,
        "--layer",
        help="Edit this layer with --step, without a search.",
        panel=LAYERS,
        metavar="LAYER",
        without="the search result",
    )
    step: float | None = option(
        None,
        "--step",
        help="Step size to apply.",
        panel=LAYERS,
        without="the search result",
    )
    direction: Direction | None = direction_option(None, "the edit's, or whitened")
    damping: float | None = DAMPING_OPTION(without="the edit's")
    qkv: Qkv | None = qkv_option(None, "the edit's")
    device: str = DEVICE()

    def __post_init__(self) -> None:
        """Refuse a damping of the plain gradient, and links to files of another layout."""
        if self.direction is not None:
            self.direction.check(self.damping)
        if self.layout is not None and self.link:
            raise UsageError(
                "--link cannot be combined with --format", hint="remove one of the two options"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """Options of `export`, which writes edits as a LoRA.

    Without `rank`, each edit gets the lowest rank that forgets the validation rows of its set as
    well as the full edit.
    """

    names: Sequence[str] = NAMES()
    out: Path = option(..., "--out", "-o", help="File to write, or folder for peft.", panel=OUTPUT)
    layout: LoraLayout = option(
        LoraLayout.LORA,
        "--format",
        panel=OUTPUT,
        help="LoRA layout: lora for A1111, ComfyUI and diffusers, peft for transformers.",
    )
    rank: int | None = option(
        None,
        "--rank",
        min=1,
        help="Rank of each edit.",
        panel=LAYERS,
        without="the lowest that forgets as well as the edit",
    )
    target: str | None = option(
        None,
        "--target",
        "-t",
        panel=TARGET,
        without="Stable Diffusion 1 or 2",
        help="Pipeline to export for: path, sd1, sd2, sdxl or flux.",
    )
    encoder: str | None = ENCODER()
    overwrite: bool = OVERWRITE()
    device: str = DEVICE()


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Options of `demo`: a class of the embedded CLIP, the direction and the search."""

    concept: str = option(
        "facebook",
        metavar="CONCEPT",
        help="Concept to forget: one of the 301 classes of the embedded CLIP.",
    )
    ranking: RankOptions = options(
        RankOptions(),
        omit=("alignment", "qkv", "include", "exclude", "tower", "target", "encoder"),
    )
    search: SearchOptions = options(
        SearchOptions(),
        omit=(
            "layers",
            "direction",
            "damping",
            "qkv",
            "margin",
            "steps",
            "full",
            "precision",
            "cache_budget",
            "after",
            "exact",
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRequest:
    """Options of `report`. Without `examples`, no model is run."""

    names: Sequence[str] = option(..., metavar="NAME...", help="Names of sets.")
    out: Path = option(..., "--out", "-o", help="Path of the HTML page.", panel=OUTPUT)
    examples: bool = option(
        True,
        "--examples/--no-examples",
        help="Run the model on a few example images.",
        panel=OUTPUT,
    )
    overwrite: bool = OVERWRITE()
    device: str = DEVICE()
