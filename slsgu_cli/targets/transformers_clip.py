"""A CLIPModel folder of transformers as a model of ours: its configuration, in open_clip's words.

Only files are read; transformers itself is not needed. What open_clip cannot express, or
would compute otherwise, is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slsgu_cli.errors import InputError
from slsgu_cli.targets.target import CONFIG, read_config

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
INTERPOLATION = {2: "bilinear", 3: "bicubic"}
# What transformers takes where a configuration is silent.
TEXT = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407}  # fmt: skip
VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
          "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "patch_size": 32,
          "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}  # fmt: skip
# Configurations of before the field was right say 2 and mean the last token of a text.
END_OF_TEXT = (2, 49407)


def is_clip(folder: Path) -> bool:
    """Return whether a folder holds a CLIPModel in transformers' layout."""
    path = folder / CONFIG
    return path.is_file() and read_config(path).get("model_type") == "clip"


def model_config(folder: Path) -> dict[str, Any]:
    """Return open_clip's model_cfg for a CLIPModel folder. Raises InputError."""
    config = read_config(folder / CONFIG)
    text, vision = (
        defaults | config.get(name, {}) | (config.get(f"{name}_dict") or {})
        for name, defaults in (("text_config", TEXT), ("vision_config", VISION))
    )
    required = {
        "layer_norm_eps": (text["layer_norm_eps"], vision["layer_norm_eps"]) == (1e-5, 1e-5),
        "hidden_act": text["hidden_act"] == vision["hidden_act"] in ("gelu", "quick_gelu"),
        "num_channels": vision["num_channels"] == 3,
        "vocab_size": text["vocab_size"] == TEXT["vocab_size"],
        "eos_token_id": text["eos_token_id"] in END_OF_TEXT,
    }
    for field, fits in required.items():
        if not fits:
            values = [part[field] for part in (text, vision) if field in part]
            raise InputError(
                f"{folder / CONFIG} has {field} {' and '.join(map(str, values))}, "
                "which open_clip's CLIP cannot have"
            )
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": text["hidden_act"] == "quick_gelu",
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "layers": text["num_hidden_layers"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }


def preprocess_config(folder: Path) -> dict[str, Any]:
    """Return what of open_clip's preprocess_cfg a folder's image processor says.

    Raises InputError where open_clip has no such preprocessing.
    """
    path = folder / PREPROCESSOR
    if path.is_file():
        told = read_config(path)
    elif (folder / PROCESSOR).is_file():
        path = folder / PROCESSOR
        told = read_config(path).get("image_processor", {})
    else:
        return {}
    found: dict[str, Any] = {}
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std")):
        if theirs in told:
            found[ours] = told[theirs]
    resample = told.get("resample", 3)
    if resample not in INTERPOLATION:
        raise InputError(f"{path} asks for resample {resample}; bilinear (2) and bicubic (3) work")
    size = told.get("size", {})
    squash = isinstance(size, Mapping) and "height" in size and not told.get("do_center_crop", True)
    return found | {
        "interpolation": INTERPOLATION[resample],
        "resize_mode": "squash" if squash else "shortest",
    }


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Return a folder's tokens and their ids, None where it has no tokenizer."""
    for name in ("vocab.json", "tokenizer.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            tokens = content["model"]["vocab"] if name == "tokenizer.json" else content
            return {str(token): int(number) for token, number in tokens.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"cannot read the tokenizer {path}: {error}") from error
    return None
