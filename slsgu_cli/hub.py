"""Models on the Hugging Face hub: what is fetched of them, once, into the hub's own cache.

Nothing is fetched again that the cache has, and without a connection the cache serves.
"""

from pathlib import Path

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.targets.transformers_clip import is_clip

HUB = "hf-hub:"
# Hub clients and downloads fail in many kinds; a programming error is none of these.
FETCH_ERRORS = (OSError, RuntimeError, ValueError, KeyError)
# What tells of a model, and its weights: the first of these that it has.
TEXTS, WEIGHTS = ["*.json", "*.txt"], ("model*.safetensors", "pytorch_model*.bin")


def fetch_open_clip(repository: str, config: str) -> tuple[Path, Path] | None:
    """Return an open_clip repository's configuration and weights; None where it has no `config`.

    Raises MissingError where the weights cannot be fetched.
    """
    from open_clip.pretrained import download_pretrained_from_hf

    try:
        path = Path(download_pretrained_from_hf(repository, filename=config))
    except FETCH_ERRORS:
        return None
    try:
        return path, Path(download_pretrained_from_hf(repository))
    except FETCH_ERRORS as error:
        raise _unreachable(repository, error) from error


def fetch_clip(repository: str, config: str) -> Path:
    """Return the folder of a CLIPModel repository of transformers, as it lies in the cache.

    Raises MissingError where it cannot be fetched, InputError where it is another model.
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
        raise _unreachable(repository, error) from error
    if not is_clip(folder):
        raise InputError(
            f"{HUB}{repository} is no CLIP that slsgu knows: it has no {config}, "
            "and its config.json is not that of a CLIPModel",
            hint="name a repository of open_clip, or of a CLIPModel of transformers",
        )
    raise InputError(
        f"{HUB}{repository} has no weights that slsgu reads: {' or '.join(WEIGHTS)}",
        hint="save it again as safetensors, and name its folder",
    )


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


def _unreachable(repository: str, error: BaseException) -> MissingError:
    return MissingError(
        f"cannot fetch {HUB}{repository} from the hub: {first_line(error)}",
        hint="check the name and the connection, or use local-dir:PATH",
    )
