"""Configuration files of models, read as JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.codec import parse_json

CONFIG, PIPELINE, OPEN_CLIP = "config.json", "model_index.json", "open_clip_config.json"


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the class and the type of the model in a configuration of transformers."""
    classes = config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else "model"
    return f"{named} ({config.get('model_type', 'of no type')})"


def read_config(path: Path) -> dict[str, Any]:
    """Return the object in a JSON configuration file. Raises MissingError or InputError."""
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingError(
            f"{path.parent} is not a model that slsgu knows: it has no {path.name}",
            hint=f"a folder with {CONFIG} (transformers), {PIPELINE} (diffusers) or {OPEN_CLIP}, "
            "or one file of weights",
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


def config_of(path: Path) -> dict[str, Any]:
    """Return the content of a configuration file, or an empty object if it does not exist."""
    return read_config(path) if path.is_file() else {}
