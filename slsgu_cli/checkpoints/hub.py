"""Models of transformers on the hub, downloaded."""

from pathlib import Path

from slsgu_cli.checkpoints.configurations import CONFIG
from slsgu_cli.checkpoints.transformers_families import KNOWN, is_clip, other_model
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.text import first_lines

HUB = "hf-hub:"

# Hub clients and downloads raise many kinds of errors; programming errors are none of these.
FETCH_ERRORS = (OSError, RuntimeError, ValueError, KeyError)

# The configuration files of a model, and its weights: the first pattern that matches.
TEXTS, WEIGHTS = ["*.json", "*.txt"], ("model*.safetensors", "pytorch_model*.bin")


def fetch_clip(repository: str, config: str) -> Path:
    """Return the folder of a repository of transformers in the cache.

    Raises MissingError if it cannot be fetched, InputError if it is another kind of model.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, allow_patterns=TEXTS))
        if is_clip(folder):
            for weights in WEIGHTS:
                folder = Path(snapshot_download(repository, allow_patterns=[*TEXTS, weights]))
                if any(folder.glob(weights)):
                    return folder
    except FETCH_ERRORS as error:
        raise unreachable(f"{HUB}{repository} from the hub", error) from error
    if not is_clip(folder):
        lacks = f"it has no {config}, and no {CONFIG} of a model of transformers ({KNOWN})"
        what, hint = other_model(folder) or (lacks, "name a repository of open_clip's")
        raise InputError(f"{HUB}{repository} is not a CLIP that slsgu knows: {what}", hint=hint)
    raise InputError(
        f"{HUB}{repository} has no weights that slsgu reads: {' or '.join(WEIGHTS)}",
        hint="save it again as safetensors, and name its folder",
    )


def unreachable(what: str, error: BaseException) -> MissingError:
    """Return the error of a failed download."""
    return MissingError(
        f"cannot fetch {what}: {first_lines(error)}",
        hint="check the name and the connection, or use local-dir:PATH or --pretrained FILE",
    )
