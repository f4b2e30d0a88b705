"""What each command is asked for, and how each of these is said on the command line.

Functions take these records; commands are spread out of their fields.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
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
from slsgu_cli.records.sets import CollectRequest, DownloadOptions, ModelSpec, Screening
from slsgu_cli.records.words import (
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

# A cosine, for a search that is steered on a margin.
MARGIN = 0.02
# Beyond the shortest step that forgets what the search sees: see docs/results/unseen.md.
OVERSHOOT = 1.25
# Points of a class's accuracy that are more than its few rows can lose by chance.
MAX_CLASS_LOSS = 25.0
NO_BOUND = 100.0
OF_RANKING = "that of the ranking"

# Options that several records have.
PRECISION = partial(
    option,
    Precision.FP32,
    "--precision",
    help="Arithmetic; gradients are summed in fp32.",
    panel=SPEED,
)
BATCH_SIZE = partial(
    option, 16, "--batch-size", min=2, help="Pairs in a mini-batch of the losses.", panel=SPEED
)
ENCODER = partial(
    option,
    None,
    "--encoder",
    help="Which encoder of the target: text_encoder_2, for SDXL.",
    panel=TARGET,
    without="the one that fits",
)
DAMPING_OPTION = partial(
    option,
    None,
    "--damping",
    min=1e-6,
    help="Of whitening: a share of the mean covariance.",
    panel=LAYERS,
    once=True,
)
BUDGET = partial(option, None, panel=SPEED, metavar="SIZE", read=bytes_of, without="what is free")
COLUMN = partial(option, None, panel=ROWS, metavar="COLUMN", without="found by its name")
NAMES = partial(option, ..., metavar="NAME|EDIT...", help="Sets, or edit files.", completes="edit")
OVERWRITE = partial(option, False, "--overwrite", help="Replace what is at --out.", panel=OUTPUT)


def direction_option(usual: Direction | None, words: str) -> Any:
    """Return the field of a direction; `words` say which it is without the option."""
    return option(
        usual,
        "--direction",
        help=f"Along {', '.join(entry.help for entry in REGISTRY.values())}, or try both.",
        panel=LAYERS,
        without=words,
    )


def qkv_option(usual: Qkv | None, words: str) -> Any:
    """Return the field of what an attention's layers are; `words` are for no option."""
    return option(
        usual,
        "--qkv",
        help="Query, key and value as one layer, or as a layer each.",
        panel=LAYERS,
        without=words,
    )


def overshoot_option(usual: float) -> Any:
    """Return the field of how far to go beyond the shortest step that is enough."""
    return option(
        usual,
        "--overshoot",
        min=1.0,
        panel=SEARCH,
        help="Times the shortest step that does: room for images nobody chose by.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What `build-sets` is asked for.

    Sources are in the grammar of `sources.parse_source`. `concept` defaults to the name,
    `match` to the concept itself, `retain_sources` to `sources`. `evals`, `classes`,
    `templates` and `tests` go by the evaluation set's name; `forget_eval` names the set that
    has the concept as a class. Figures are of `test_fraction` of each class, or of the rows of
    `tests`; layer and step are chosen by the others. With `collect`, sources are what it
    collects. `dropped` has keys or hashes of rows that a person has taken out, by part
    (forget, retain or an evaluation set).
    """

    name: str = option("", metavar="NAME", help="Name of the set; none with --names.")
    concept: str = option("", "--concept", help="What to forget.", panel=ROWS, without="NAME")
    model: ModelSpec = options(ModelSpec(""), name={"without": "none; a new set needs one"})
    sources: Sequence[str] = option(
        (),
        "--source",
        "-s",
        metavar="SOURCE",
        panel=ROWS,
        help="Tar shards, parquet, table, folder or glob; rows by ?column=value.",
    )
    match: Sequence[str] = option(
        (),
        "--match",
        help="Captions to forget hold these words.",
        panel=ROWS,
        without="the concept",
    )
    not_match: Sequence[str] = option(
        (), "--not-match", help="Captions that are in neither set.", panel=ROWS
    )
    regex: bool = option(False, "--regex", help="Patterns are regular expressions.", panel=ROWS)
    max_forget: int | None = option(
        None,
        "--max-forget",
        min=1,
        help="At most this many forget rows.",
        panel=ROWS,
        without="all that match",
    )
    retain_sources: Sequence[str] = option(
        (),
        "--retain-source",
        help="Where retain rows come from.",
        panel=ROWS,
        metavar="SOURCE",
        without="--source",
    )
    retain_samples: int = option(
        8000, "--retain-samples", min=1, help="Retain rows drawn by seed.", panel=ROWS
    )
    retain_exclude: Sequence[str] = option(
        (), "--retain-exclude", help="Captions kept out of the retain set.", panel=ROWS
    )
    evals: dict[str, str] = option(
        {},
        "--eval",
        metavar="NAME=SOURCE",
        panel=EVALUATION,
        help="What to measure on, with labels.",
    )
    classes: dict[str, str] = option(
        {},
        "--classes",
        metavar="NAME=FILE",
        panel=EVALUATION,
        help="Class names, a file or `imagenet`.",
        without="the labels",
    )
    templates: dict[str, str] = option(
        {},
        "--templates",
        metavar="NAME=FILE",
        panel=EVALUATION,
        help="Prompts: a file, or imagenet, imagenet-simple, celeba.",
        without="imagenet-simple",
    )
    test_fraction: float = option(
        0.5,
        "--test-fraction",
        later=True,
        min=0.0,
        max=0.9,
        panel=EVALUATION,
        metavar="SHARE",
        help="Of each class: images for figures, which nothing is chosen by.",
    )
    tests: dict[str, str] = option(
        {},
        "--test",
        later=True,
        metavar="NAME=SOURCE",
        panel=EVALUATION,
        help="Other rows for the figures of an evaluation set.",
        without="a share of --eval",
    )
    forget_eval: str | None = option(
        None,
        "--forget-eval",
        help="Evaluation set that shows the concept.",
        panel=EVALUATION,
        metavar="NAME",
        without="the one with that class",
    )
    image_column: str | None = COLUMN("--image-column", help="Column of images or paths.")
    caption_column: str | None = COLUMN(
        "--caption-column", "--caption-col", help="Column of captions."
    )
    label_column: str | None = COLUMN(
        "--label-column", help="Column of evaluation labels.", panel=EVALUATION
    )
    seed: int = option(0, "--seed", help="Seed of the draws.", panel=ROWS)
    screening: Screening = options(Screening())
    collect: CollectRequest | None = None
    dropped: dict[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take the name for the concept where there is no other."""
        if not self.concept:
            object.__setattr__(self, "concept", self.name)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns that make a caption one of the forget set."""
        return tuple(self.match) or (self.concept,)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataSource:
    """Metadata to collect samples from, and how their images are downloaded."""

    metadata: Sequence[str] = option(
        (),
        "--metadata",
        help="Parquet of captions and URLs to download.",
        panel=DOWNLOAD,
        metavar="PARQUET",
    )
    url_column: str = option(
        "URL", "--url-col", help="Column of URLs in --metadata.", panel=DOWNLOAD, metavar="COLUMN"
    )
    download: DownloadOptions = options(DownloadOptions())


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOptions:
    """How to run a gradient pass. `memory_budget` is in bytes, None for what is free.

    With `prefixes`, the forget set is gone through with captions that have these before the name
    as well.
    """

    batch_size: int = BATCH_SIZE()
    precision: Precision = PRECISION()
    device: str = DEVICE()
    memory_budget: int | None = BUDGET("--memory-budget", help="Limit for activations, such as 8G.")
    prefixes: Sequence[str] = option(
        (),
        "--prefix",
        later=True,
        metavar="WORDS",
        panel=ROWS,
        help="Forget the name behind these words too.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """Which layers compete, for which direction, and how alignment is read.

    `damping` is of the whitened direction alone (None: DAMPING), as is `device`, where covariances
    are computed.
    With `qkv` split, query, key and value compete as layers of their own.
    With `target`, a path or a kind of model, layers that cannot influence it are left out.
    """

    alignment: Alignment = option(
        Alignment.ABS,
        "--alignment",
        help="Magnitude of the cosine, or with its sign.",
        panel=LAYERS,
    )
    direction: Direction = direction_option(Direction.BOTH, "both")
    damping: float | None = DAMPING_OPTION(without=f"{DAMPING:g}")
    qkv: Qkv = qkv_option(Qkv.FUSED, "fused")
    include: Sequence[str] = option(
        (),
        "--include",
        help="Layers to rank: text or glob.",
        panel=LAYERS,
        metavar="LAYER",
        without="all",
    )
    exclude: Sequence[str] = option(
        (), "--exclude", help="Layers to leave out.", panel=LAYERS, metavar="LAYER"
    )
    tower: Tower | None = option(
        None, "--tower", help="Rank one tower only.", panel=LAYERS, without="both"
    )
    target: str | None = option(
        None,
        "--target",
        "-t",
        panel=TARGET,
        without="CLIP itself",
        help="Leave out what a path, sd1, sd2, sdxl, sd3, flux, llava, paligemma does not read.",
    )
    encoder: str | None = ENCODER()
    device: str = DEVICE()

    def __post_init__(self) -> None:
        """Refuse what is of the whitened direction alone for the gradient."""
        self.direction.check(self.damping)

    @property
    def specs(self) -> tuple[DirectionSpec, ...]:
        """The directions to rank for, with their parameters."""
        return self.direction.specs(self.damping)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How to search. `full` measures the utility of every trial, winner or not.

    Unless `exact`, each line's shortest step that forgets is sought by what steps lack, and
    vision steps that may win are raced.

    `direction`, `qkv` and, of the whitened one, `damping` are those of the ranking where none
    are given. `margin` is a cosine, for that criterion. Of the layers and directions, that one is
    chosen which keeps most at `overshoot` times its shortest step that leaves nothing of what
    `criterion` counts, among those where no class loses more than `max_class_loss`. `utility` says
    by what that is judged: a count of few images flatters the choice that is made by it. The
    edits of `after`, and those they stand on, are in place; no step is chosen that undoes them.
    """

    layers: Sequence[str] = option(
        (),
        "--layer",
        help="Search this layer, on the front or not.",
        panel=LAYERS,
        metavar="LAYER",
        without="the fronts",
        completes="layer",
    )
    direction: Direction | None = direction_option(None, OF_RANKING)
    damping: float | None = DAMPING_OPTION(without=OF_RANKING)
    qkv: Qkv | None = qkv_option(None, OF_RANKING)
    criterion: Criterion = option(
        Criterion.FA5,
        "--criterion",
        panel=SEARCH,
        help="Bring FA@1 or FA@5 to 0, or the name a margin below fifth.",
    )
    utility: UtilityMetric = option(
        UtilityMetric.EXPECTED,
        "--utility",
        panel=SEARCH,
        help="Compare by TA@1, or by the TA@1 expected of like images.",
    )
    overshoot: float = overshoot_option(OVERSHOOT)
    max_class_loss: float = option(
        MAX_CLASS_LOSS,
        "--max-class-loss",
        min=0.0,
        panel=SEARCH,
        metavar="POINTS",
        help="Points that no class may lose where another step avoids it.",
    )
    paper: bool = option(
        False,
        "--paper",
        panel=SEARCH,
        help="Choose as the paper does: along the gradient, FA@1 and TA@1, no overshoot, no bound.",
    )
    margin: float = option(
        MARGIN, "--margin", min=0.0, help="For --criterion margin: a cosine.", panel=SEARCH
    )
    steps: int = option(10, "--steps", min=1, help="Trials a layer (K in the paper).", panel=SEARCH)
    exact: bool = option(
        False,
        "--exact",
        panel=SEARCH,
        help="Double and bisect steps (Alg. 3), and prove which one keeps most.",
    )
    full: bool = option(
        False, "--full", help="Measure the utility of every trial, winner or not.", panel=SEARCH
    )
    device: str = DEVICE()
    precision: Precision = PRECISION()
    cache_budget: int | None = BUDGET(
        "--cache-budget", help="Limit for kept activations, such as 8G."
    )
    after: Sequence[str] = option(
        (),
        "--after",
        help="Search on top of this edit, which stays in place.",
        panel=SEARCH,
        metavar="EDIT",
        without="the original model",
        completes="edit",
    )

    def __post_init__(self) -> None:
        """Spell out the paper's choice. Raises UsageError for what contradicts it."""
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
                    f"--paper says --{name.replace('_', '-')} itself", hint="leave one of them out"
                )
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthOptions:
    """Where edits go, and how much of them: `encoder` names one of several encoders."""

    encoder: str | None = ENCODER()
    scale: float = option(1.0, "--scale", help="Apply this much of the edit.", panel=LAYERS)
    rank: int | None = option(
        None,
        "--rank",
        min=1,
        help="Keep this many singular directions of the edit.",
        panel=LAYERS,
        without="all",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyOptions(StrengthOptions):
    """How edits go into a model, and how the result is written.

    `revert` undoes the edits. `force` leaves out the check that the weights are those the edits
    were made for. `overwrite` replaces what stands there, `dry_run` writes nothing, and `link`
    makes hard links of the files that stay as they are.
    """

    revert: bool = option(False, "--revert", help="Take the edits out again.", panel=OUTPUT)
    force: bool = option(False, "--force", help="Even to other weights.", panel=OUTPUT)
    overwrite: bool = OVERWRITE()
    dry_run: bool = option(False, "--dry-run", help="Check and tell, write nothing.", panel=OUTPUT)
    link: bool = option(
        False,
        "--link",
        help="Hard links for the files of --target left as they are.",
        panel=OUTPUT,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyRequest(ApplyOptions):
    """What `apply` is asked for. `layer` with `step` takes a direction without a search.

    `direction`, `damping` and `qkv` are for what has no ranking yet, or is not searched for; an
    edit that is there already must be of that direction, and of a layer of that kind.
    """

    names: Sequence[str] = NAMES()
    out: Path = option(..., "--out", "-o", help="Where the new checkpoint goes.", panel=OUTPUT)
    model: ModelSpec | None = options(
        None, name={"help": "Edit this model.", "without": "the edit's"}
    )
    target: Path | None = option(
        None,
        "--target",
        "-t",
        help="Edit this model built on CLIP: folder or file.",
        panel=TARGET,
        without="the CLIP itself",
    )
    layout: ModelLayout | None = option(
        None,
        "--format",
        panel=OUTPUT,
        without="as it is",
        help="Write it for transformers, open_clip, or ComfyUI (a text encoder).",
    )
    layer: str | None = option(
        None,
        "--layer",
        help="Move this layer along its direction, unsearched.",
        panel=LAYERS,
        metavar="LAYER",
        without="the one searched for",
        completes="layer",
    )
    step: float | None = option(
        None,
        "--step",
        help="Step size, instead of the one searched for.",
        panel=LAYERS,
        without="the one searched for",
    )
    direction: Direction | None = direction_option(None, "that of the edit, whitened")
    damping: float | None = DAMPING_OPTION(without="that of the edit")
    qkv: Qkv | None = qkv_option(None, "that of the edit")
    device: str = DEVICE()

    def __post_init__(self) -> None:
        """Refuse a damping of the gradient, and links to files that another layout has not."""
        if self.direction is not None:
            self.direction.check(self.damping)
        if self.layout is not None and self.link:
            raise UsageError("--link does not go with --format", hint="leave one of them out")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What `export` is asked for: edits as a LoRA, in whose layout, for which text encoder.

    Without `rank`, each edit has the smallest one by which its set's choosing rows stay as
    forgotten as by the whole edit.
    """

    names: Sequence[str] = NAMES()
    out: Path = option(..., "--out", "-o", help="File, or for peft the folder.", panel=OUTPUT)
    layout: LoraLayout = option(
        LoraLayout.LORA,
        "--format",
        panel=OUTPUT,
        help="For A1111, ComfyUI and diffusers; or PEFT's, for transformers.",
    )
    rank: int | None = option(
        None,
        "--rank",
        min=1,
        help="Directions of each edit.",
        panel=LAYERS,
        without="the fewest that keep FA at 0",
    )
    target: str | None = option(
        None,
        "--target",
        "-t",
        panel=TARGET,
        without="Stable Diffusion 1 or 2",
        help="The pipeline it is for: path, sd1, sd2 or sdxl.",
    )
    encoder: str | None = ENCODER()
    overwrite: bool = OVERWRITE()
    device: str = DEVICE()


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What `demo` is asked for: one of the embedded classes, and along which direction."""

    concept: str = option(
        "facebook",
        metavar="CONCEPT",
        help="One of the 301 brands and objects of the embedded CLIP.",
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
    """What `report` is asked for. Without `examples` no model is run."""

    names: Sequence[str] = option(..., metavar="NAME...", help="Names of sets.", completes="set")
    out: Path = option(..., "--out", "-o", help="Where the page goes.", panel=OUTPUT)
    examples: bool = option(
        True, "--examples/--no-examples", help="Run the model over a few images.", panel=OUTPUT
    )
    overwrite: bool = OVERWRITE()
    device: str = DEVICE()
