"""From a model's name to its configuration and weights."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slsgu_cli.checkpoints.clip_weights import ClipWeights
from slsgu_cli.checkpoints.configurations import OPEN_CLIP
from slsgu_cli.checkpoints.hub import FETCH_ERRORS, HUB, fetch_clip, unreachable
from slsgu_cli.checkpoints.layouts import weight_files
from slsgu_cli.checkpoints.naming_schemes import NamingScheme
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.checkpoints.transformers_families import (
    KNOWN,
    is_clip,
    model_config,
    other_model,
    require_towers,
)
from slsgu_cli.checkpoints.transformers_inputs import preprocess_config
from slsgu_cli.errors import InputError, MissingError, SlsguError, UsageError, lacks_memory
from slsgu_cli.records.codec import digest, parse_json
from slsgu_cli.records.sets import LOCAL, ModelSpec
from slsgu_cli.text import first_lines, near, reason_of

# The order in which open_clip itself looks for weights in a folder.
PREFERRED = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
# The defaults of open_clip for fields that most configurations leave out.
SILENT = {"vision_cfg": {"head_width": 64, "mlp_ratio": 4.0}, "text_cfg": {"mlp_ratio": 4.0}}
QUICK_GELU = ("quick_gelu", False)


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model's configuration and where its weights lie.

    `folder` is set for models that are folders. `identifier` is open_clip's name of the model; for
    a folder of transformers it is the path.
    """

    spec: ModelSpec
    identifier: str
    config: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path
    folder: Path | None
    scheme: NamingScheme = NamingScheme.OPEN_CLIP


def resolve(spec: ModelSpec) -> ResolvedModel:
    """Find the configuration and weights that `spec` names.

    Raises MissingError, InputError or UsageError; downloads where the name asks for it.
    """
    folder = Path(spec.name.removeprefix(LOCAL))
    if spec.name.startswith(LOCAL) or (folder / OPEN_CLIP).is_file() or is_clip(folder):
        model = _resolve_folder(spec, folder)
    elif spec.name.startswith(HUB):
        model = _resolve_hub(spec)
    else:
        model = _resolve_name(spec)
    require_towers(str(spec), model.config)
    return model


def weights_of(model: ResolvedModel) -> ClipWeights:
    """Return a model's tensors by open_clip's names. Raises MissingError or InputError."""
    if model.scheme is NamingScheme.TRANSFORMERS:
        return ClipWeights.of_folder(model.weights.parent)
    return ClipWeights.of_file(model.weights)


def fingerprint(model: ResolvedModel, instead: Mapping[str, Floats] | None = None) -> str:
    """Return a digest of weights and architecture, the same for every file format.

    Values in `instead` replace those of the file.
    """
    weights = weights_of(model).fingerprint(instead)
    return digest({"weights": weights, "config": plain_config(model.config)})


def has_model(spec: ModelSpec, weights: str | None) -> bool:
    """Return whether a model exists, with the weights of a fingerprint if one is given."""
    try:
        model = resolve(spec)
        return weights is None or fingerprint(model) == weights
    except SlsguError:
        return False


def model_layer(model: ResolvedModel, name: str) -> Floats:
    """Return a layer in the precision of the file: fp16 as fp16, bf16 as fp32."""
    return weights_of(model).layer(name)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model_cfg without default values, to compare two."""
    towers = {
        name: {key: value for key, value in config[name].items() if SILENT[name].get(key) != value}
        for name in SILENT
    }
    rest = {key: value for key, value in config.items() if key not in SILENT}
    return {key: value for key, value in rest.items() if (key, value) != QUICK_GELU} | towers


def _resolve_folder(spec: ModelSpec, folder: Path) -> ResolvedModel:
    if spec.pretrained:
        raise UsageError(
            f"--pretrained {spec.pretrained} does not go with {spec.name}: "
            "a local-dir model carries its own weights",
            hint="leave --pretrained out",
        )
    path = folder / OPEN_CLIP
    if not path.is_file() and is_clip(folder):
        return _resolve_transformers(spec, folder)
    if not path.is_file():
        raise _no_model(folder)
    config, preprocess = _configuration(path)
    kinds = ("*.safetensors", "*.bin", "*.pth")
    files = [file for kind in kinds for file in folder.glob(kind) if file.is_file()]
    named = [folder / name for name in PREFERRED if folder / name in files]
    if not files:
        raise MissingError(f"{folder} holds no weights (.safetensors, .bin or .pth)")
    weights = [*named, *sorted(files, key=lambda file: (file.suffix != ".safetensors", file))][0]
    return ResolvedModel(spec, f"{LOCAL}{folder}", config, preprocess, weights, folder)


def _no_model(folder: Path) -> MissingError:
    """Return the error for a folder without a model, or with a model of another kind."""
    lacks = f"it has no {OPEN_CLIP}" if folder.is_dir() else "there is no such folder"
    weights = next(iter(weight_files(folder)), "FILE") if folder.is_dir() else "FILE"
    usual = (
        f"name a folder written by open_clip, or by transformers ({KNOWN}), "
        f"or --model ARCH --pretrained {weights}"
    )
    what, hint = other_model(folder) or (lacks, usual)
    return MissingError(f"{folder} is not an open_clip model folder: {what}", hint=hint)


def _resolve_transformers(spec: ModelSpec, folder: Path) -> ResolvedModel:
    weights = ClipWeights.of_folder(folder).weights.path
    config, preprocess = model_config(folder), _defaults() | preprocess_config(folder)
    scheme = NamingScheme.TRANSFORMERS
    return ResolvedModel(spec, str(folder), config, preprocess, weights, folder, scheme)


def _resolve_hub(spec: ModelSpec) -> ResolvedModel:
    repository = spec.name.removeprefix(HUB)
    paths = _fetch_open_clip(repository)
    if paths is None:
        return _resolve_transformers(spec, fetch_clip(repository, OPEN_CLIP))
    path, weights = paths
    config, preprocess = _configuration(path)
    return ResolvedModel(spec, spec.name, config, preprocess, weights, None)


def _fetch_open_clip(repository: str) -> tuple[Path, Path] | None:
    """Return the configuration and weights of an open_clip repository; None for another kind.

    Raises MissingError if the weights cannot be fetched.
    """
    from open_clip.pretrained import download_pretrained_from_hf

    try:
        path = Path(download_pretrained_from_hf(repository, filename=OPEN_CLIP))
    except FETCH_ERRORS:
        return None
    try:
        return path, Path(download_pretrained_from_hf(repository))
    except FETCH_ERRORS as error:
        raise unreachable(f"{HUB}{repository} from the hub", error) from error


def _configuration(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model_cfg and the preprocess_cfg, with its defaults, of a configuration file."""
    try:
        content = parse_json(path.read_bytes())
        config = {**content["model_cfg"]}
        for tower in ("vision_cfg", "text_cfg"):
            config[tower] = {**config[tower]}
        return config, _defaults() | {**content.get("preprocess_cfg", {})}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{path} is not a valid open_clip configuration"
        raise InputError(f"{what}: {reason_of(error)}") from error


def _resolve_name(spec: ModelSpec) -> ResolvedModel:
    import open_clip

    name, config = _architecture(spec.name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not spec.pretrained:
        known = ", ".join(tags) or "a checkpoint file"
        raise UsageError(f"{name} needs weights", hint=f"--pretrained with one of: {known}")
    if Path(spec.pretrained).is_file():
        return ResolvedModel(spec, name, config, _defaults(), Path(spec.pretrained), None)
    tag = open_clip.get_pretrained_cfg(name, spec.pretrained)
    if not tag:
        every = f"tags of {name}: {', '.join(tags) or 'none'}"
        hint = near(spec.pretrained, tags)
        raise MissingError(
            f"{spec.pretrained} is neither a file nor a pretrained tag of {name}",
            hint=f"{hint}; {every}" if hint else every,
        )
    try:
        weights = Path(open_clip.download_pretrained(tag))
    except FETCH_ERRORS as error:
        raise unreachable(f"{name} {spec.pretrained}", error) from error
    preprocess = _defaults() | {key: tag[key] for key in _defaults() if key in tag}
    return ResolvedModel(spec, name, config, preprocess, weights, None)


def _architecture(name: str) -> tuple[str, dict[str, Any]]:
    """Return open_clip's name of an architecture, and its model_cfg."""
    import open_clip

    if name.endswith(".json"):
        if not Path(name).is_file():
            raise MissingError(f"there is no architecture file {name}")
        try:
            # open_clip would read an invalid file again at every later call.
            _require_towers(parse_json(Path(name).read_bytes()))
            open_clip.add_model_config(name)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{name} is not an open_clip architecture: {error}") from error
        name = Path(name).stem
    with quiet():
        config = open_clip.get_model_config(name.replace("/", "-"))
    if config is not None:
        return name, config
    if Path(name).is_dir():
        raise _no_model(Path(name))
    if Path(name).exists():
        raise InputError(
            f"--model {name} is a file and not a folder with {OPEN_CLIP}",
            hint=f"name the architecture too: --model ViT-B-32 --pretrained {name}",
        )
    if name.startswith("hf://"):
        raise InputError(
            f"open_clip has no model {name}", hint=f"--model {HUB}{name.removeprefix('hf://')}"
        )
    close = near(name, open_clip.list_models())
    raise InputError(
        f"open_clip has no model {name}" + (f"; {close}" if close else ""),
        hint="an open_clip name, local-dir:PATH, hf-hub:ID, an architecture .json, "
        f"or a folder of transformers ({KNOWN})",
    )


def _require_towers(config: Any) -> None:
    """Raise ValueError unless a model_cfg has the required fields."""
    for name in ("embed_dim", "vision_cfg", "text_cfg"):
        if not isinstance(config, dict) or name not in config:
            raise ValueError(f"it has no {name}")


def _defaults() -> dict[str, Any]:
    return {
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Silence open_clip's logging."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def explained(model: ResolvedModel) -> Iterator[None]:
    """Re-raise errors of libraries that build or load a model as one message."""
    try:
        yield
    except SlsguError:
        raise
    except ImportError as error:
        raise MissingError(
            f"{model.spec} needs a package that is not installed: {error}"
        ) from error
    except Exception as error:  # torch, safetensors and open_clip raise many kinds here
        if lacks_memory(error):
            raise
        raise InputError(
            f"cannot load {model.spec} from {model.weights}: {first_lines(error)}",
            hint="check that the weights belong to this architecture and are complete",
        ) from error
