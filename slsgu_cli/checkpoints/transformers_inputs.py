"""Image processors and tokenizers of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slsgu_cli.checkpoints.configurations import (
    read_config,
)
from slsgu_cli.checkpoints.transformers_families import (
    CLIP,
    FAMILIES,
    family_of,
    invalid_field,
    model_type,
)
from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import parse_json

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
INTERPOLATION = {2: "bilinear", 3: "bicubic"}


def preprocess_config(folder: Path) -> dict[str, Any]:
    """Return open_clip's preprocess_cfg for a folder's image processor.

    Raises InputError if open_clip has no such preprocessing.
    """
    family = FAMILIES.get(model_type(folder), FAMILIES[CLIP])
    preprocess = {**family.preprocess}
    path = folder / PREPROCESSOR
    if path.is_file():
        processor = read_config(path)
    elif (folder / PROCESSOR).is_file():
        path = folder / PROCESSOR
        processor = read_config(path).get("image_processor", {})
    else:
        return preprocess
    if not isinstance(processor, dict):
        raise invalid_field(folder, "image_processor", processor)
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std")):
        if theirs in processor:
            preprocess[ours] = processor[theirs]
    resample = processor.get("resample", 3)
    if type(resample) is not int or resample not in INTERPOLATION:
        raise InputError(
            f"{path} has resample {resample}, but only bilinear (2) and bicubic (3) are supported"
        )
    size = processor.get("size") or ({"shortest_edge": 0} if family.crops else {"height": 0})
    squash = isinstance(size, Mapping) and "height" in size
    return preprocess | {
        "interpolation": INTERPOLATION[resample],
        "resize_mode": "squash" if squash else "shortest",
    }


def transformers_preprocess(
    model: Mapping[str, Any], preprocess: Mapping[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """Return transformers' image processor for a preprocess_cfg, and what it cannot express."""
    family, size = FAMILIES[family_of(model)], model["vision_cfg"]["image_size"]
    sides = {"height": size, "width": size}
    resamples = {name: number for number, name in INTERPOLATION.items()}
    crops = preprocess["resize_mode"] == "shortest"
    made = {
        "image_processor_type": f"{family.processor}ImageProcessor",
        "processor_class": f"{family.processor}Processor",
        "do_resize": True,
        "size": {"shortest_edge": size} if crops else sides,
        "resample": resamples.get(preprocess["interpolation"], 0),
        "do_center_crop": crops,
        "crop_size": sides,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_convert_rgb": True,
        "do_normalize": True,
        "image_mean": [*preprocess["mean"]],
        "image_std": [*preprocess["std"]],
    }
    for name, known in (
        ("interpolation", tuple(resamples)),
        ("resize_mode", ("shortest", "squash") if family.crops else ("squash",)),
    ):
        if preprocess[name] not in known:
            return made, f"preprocess_cfg.{name} {preprocess[name]!r} ({' and '.join(known)} work)"
    return made, None


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Return a folder's tokens and their ids; None if it has no tokenizer."""
    for name in ("vocab.json", "tokenizer.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = parse_json(path.read_bytes())
            tokens = content["model"]["vocab"] if name == "tokenizer.json" else content
            return {str(token): int(number) for token, number in tokens.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"cannot read the tokenizer {path}: {error}") from error
    return None
