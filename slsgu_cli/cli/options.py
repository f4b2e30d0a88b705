"""Options that several commands take, each defined once."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from slsgu_cli.records.method import Alignment, Direction, Precision, Qkv, Steer, Tower
from slsgu_cli.records.sets import Distributor, ModelSpec
from slsgu_cli.records.targets import GradientOf


def _device(name: str) -> str:
    # Checked here as well as where torch knows the devices: a command may not come to that.
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise typer.BadParameter(f"{name!r} is none of auto, cpu, cuda, cuda:N and mps")
    return name


Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the set.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of sets.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="open_clip name, local-dir:PATH, hf-hub:ID, architecture .json or CLIPModel folder.",
    ),
]
Pretrained = Annotated[
    str | None,
    typer.Option("--pretrained", "-p", help="open_clip tag or checkpoint file, for a name."),
]
_SOURCE = typer.Option(
    "--source",
    "-s",
    help="Tar shards, parquet, folder or glob; rows by ?column=value. Repeatable.",
)
Sources = Annotated[list[str], _SOURCE]
SomeSources = Annotated[list[str] | None, _SOURCE]
NotMatch = Annotated[
    list[str] | None,
    typer.Option("--not-match", help="Captions that are in neither set. Repeatable."),
]
MaxForget = Annotated[
    int | None, typer.Option("--max-forget", min=1, help="At most this many forget rows.")
]
RetainSources = Annotated[
    list[str] | None,
    typer.Option("--retain-source", help="Where retain rows come from. Default: --source."),
]
RetainSamples = Annotated[
    int, typer.Option("--retain-samples", min=1, help="Retain rows drawn by seed.")
]
RetainExclude = Annotated[
    list[str] | None,
    typer.Option("--retain-exclude", help="Captions kept out of the retain set. Repeatable."),
]
Evals = Annotated[
    list[str] | None,
    typer.Option("--eval", help="NAME=SOURCE to measure on, with labels. Repeatable."),
]
Templates = Annotated[
    list[str] | None,
    typer.Option(
        "--templates",
        help="NAME=FILE, or imagenet, imagenet-simple, celeba: prompts. Repeatable.",
    ),
]
ForgetEval = Annotated[
    str | None, typer.Option("--forget-eval", help="Evaluation set that shows the concept.")
]
ImageColumn = Annotated[
    str | None, typer.Option("--image-column", help="Parquet column of images.")
]
CaptionColumn = Annotated[
    str | None,
    typer.Option("--caption-column", "--caption-col", help="Parquet column of captions."),
]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", help="Column of evaluation labels.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
Encoder = Annotated[
    str | None,
    typer.Option("--encoder", help="Which encoder of the target: text_encoder_2, for SDXL."),
]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", callback=_device)
]
PrecisionOption = Annotated[
    Precision, typer.Option("--precision", help="Arithmetic; gradients are summed in fp32.")
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=2, help="Pairs in a mini-batch of the losses.")
]
MemoryBudget = Annotated[
    str | None, typer.Option("--memory-budget", help="Limit for activations, such as 8G.")
]
CacheBudget = Annotated[
    str | None, typer.Option("--cache-budget", help="Limit for kept activations, such as 8G.")
]
AlignmentOption = Annotated[
    Alignment, typer.Option("--alignment", help="Magnitude of the cosine, or with its sign.")
]
Include = Annotated[
    list[str] | None, typer.Option("--include", help="Layers to rank: text or glob; repeatable.")
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="Layers to leave out; repeatable.")
]
TowerOption = Annotated[Tower | None, typer.Option("--tower", help="Rank one tower only.")]
DirectionOption = Annotated[
    Direction | None,
    typer.Option("--direction", help="Along the forget gradient, or that whitened."),
]
QkvOption = Annotated[
    Qkv | None,
    typer.Option("--qkv", help="Query, key and value as one layer, or as a layer each."),
]
Ridge = Annotated[
    float | None,
    typer.Option("--ridge", min=1e-6, help="Of whitening: a share of the mean moment."),
]
SteerOption = Annotated[
    Steer,
    typer.Option("--steer", help="Bring FA@1 or FA@5 to 0, or the name a margin below fifth."),
]
Margin = Annotated[
    float | None, typer.Option("--margin", min=0.0, help="For --steer margin: a cosine.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Trials a layer (K in the paper).")]
Layers = Annotated[
    list[str] | None,
    typer.Option("--layer", help="Search this layer, on the front or not; repeatable."),
]
Full = Annotated[
    bool, typer.Option("--full", help="Measure the utility of every trial, winner or not.")
]
ON_TARGET = "On a target"
SteerTarget = Annotated[
    bool,
    typer.Option(
        "--steer-target",
        help="Steer on what the target generates or answers, not on CLIP's accuracy.",
        rich_help_panel=ON_TARGET,
    ),
]
Top = Annotated[
    int, typer.Option("--top", min=1, help="Layers to search.", rich_help_panel=ON_TARGET)
]
Goal = Annotated[
    float,
    typer.Option(
        "--goal",
        min=0.0,
        max=100.0,
        help="Share of the concept, in percent, that must no longer be recognised.",
        rich_help_panel=ON_TARGET,
    ),
]
GradientChoice = Annotated[
    GradientOf | None,
    typer.Option(
        "--gradient",
        help="Of CLIP's forget loss or the target's. Default: CLIP's; of a LLaVA its own.",
        rich_help_panel=ON_TARGET,
    ),
]
ConceptBudget = Annotated[
    int,
    typer.Option(
        "--images", min=1, help="Images of the concept a trial.", rich_help_panel=ON_TARGET
    ),
]
OthersBudget = Annotated[
    int,
    typer.Option(
        "--others", min=1, help="Images of other classes a trial.", rich_help_panel=ON_TARGET
    ),
]
Questions = Annotated[
    list[str] | None,
    typer.Option(
        "--question", help="What a LLaVA is asked; repeatable.", rich_help_panel=ON_TARGET
    ),
]
Judge = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="MODEL",
        help="CLIP that says what images show, named as for --model; `set`: the set's own.",
    ),
]
JudgePretrained = Annotated[
    str | None, typer.Option("--judge-pretrained", help="Its weights, where a name needs them.")
]
Denoise = Annotated[int, typer.Option("--denoise", min=1, help="Denoising steps of an image.")]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", min=0.0, help="Classifier-free guidance. Default: the pipeline's."),
]
GeneratePrompts = Annotated[
    list[str] | None,
    typer.Option("--generate", help="Forget what --pipeline makes of this prompt. Repeatable."),
]
Pipeline = Annotated[
    Path | None, typer.Option("--pipeline", help="Folder of a diffusion pipeline, for --generate.")
]
Count = Annotated[int, typer.Option("--count", min=1, help="Images to generate.")]
Target = Annotated[
    Path | None,
    typer.Option("--target", "-t", help="The model built on CLIP that the edit is for."),
]


def pairs(option: str, values: list[str] | None) -> dict[str, str]:
    """Return the NAME=VALUE pairs given to a repeatable option. Raises UsageError."""
    from slsgu_cli.errors import UsageError

    found: dict[str, str] = {}
    for text in values or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} {text} is not NAME=VALUE", hint=f"{option} brands=...")
        if name in found:
            raise UsageError(f"{option} names {name} twice")
        found[name] = value
    return found


def given(**values: Any) -> dict[str, Any]:
    """Return the options that were given; those that were not keep their record's default."""
    return {name: value for name, value in values.items() if value is not None}


def along(direction: Direction | None, ridge: float | None) -> dict[str, Any]:
    """Return what was given of a direction. Raises UsageError for a ridge of the gradient."""
    from slsgu_cli.errors import UsageError

    if direction is Direction.GRADIENT and ridge is not None:
        raise UsageError("--ridge is for the whitened direction", hint="--direction whitened")
    return given(direction=direction, ridge=ridge)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Return the numbers that a list of numbers and ranges names, as `0-3,8`. Raises UsageError."""
    from slsgu_cli.errors import UsageError

    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise UsageError(f"{option} {text} is no list of numbers", hint=f"{option} 0-3,8")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(found)) != len(found) or not found:
        raise UsageError(f"{option} {text} names {'a number twice' if found else 'no number'}")
    return tuple(found)


def size(text: str | None) -> int | None:
    """Return the bytes that a size option means, None where it is not given."""
    from slsgu_cli.clip.inputs import parse_size

    return None if text is None else parse_size(text)


def model_spec(model: str | None, pretrained: str | None) -> ModelSpec | None:
    """Return the model that the options name; None where they name none."""
    from slsgu_cli.errors import UsageError

    if model is None and pretrained is not None:
        raise UsageError("--pretrained needs --model", hint="--model ARCH --pretrained TAG")
    return None if model is None else ModelSpec(model, pretrained)


MaybeName = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="Name of the set; none with --names.")
]
NamesFile = Annotated[
    str | None,
    typer.Option("--names", help="File of many names: NAME<tab>alias<tab>!exclusion a line."),
]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", help="Parquet of captions and URLs to download. Repeatable."),
]
UrlColumn = Annotated[str, typer.Option("--url-col", help="Column of URLs in --metadata.")]
DistributorOption = Annotated[
    Distributor, typer.Option("--distributor", help="How img2dataset spreads its work.")
]
Processes = Annotated[
    int | None, typer.Option("--processes", min=1, help="Download processes. Default: cores.")
]
Timeout = Annotated[int, typer.Option("--timeout", min=1, help="Seconds to wait for an image.")]
Retries = Annotated[int, typer.Option("--retries", min=0, help="Tries more for each image.")]
Img2dataset = Annotated[
    str | None,
    typer.Option("--img2dataset", metavar="CMD", help="Its command, if not on the PATH."),
]
MinSimilarity = Annotated[
    float | None,
    typer.Option("--min-similarity", help="Least cosine of an image and its own caption."),
]
NearDuplicates = Annotated[
    int | None,
    typer.Option("--near-duplicates", metavar="BITS", help="Images whose hashes differ less."),
]
Replay = Annotated[
    bool, typer.Option("--replay", help="Build NAME again as it was built, rows dropped and all.")
]
