"""The files that loading a model folder needs: its weights and its tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from slsgu_cli import progress
from slsgu_cli.checkpoints.configurations import config_of
from slsgu_cli.checkpoints.hub import FETCH_ERRORS
from slsgu_cli.checkpoints.layouts import clip_shapes
from slsgu_cli.checkpoints.naming_schemes import NamingScheme
from slsgu_cli.clip.loading import is_read_by_open_clip, load, shapes_of, without_weights
from slsgu_cli.clip.models import ResolvedModel, resolve, weights_of
from slsgu_cli.clip.tokenizers import PROBE, TOKENIZER_CONFIG, open_clip_tokenizer, tokenizer
from slsgu_cli.errors import SlsguError
from slsgu_cli.records.sets import LOCAL, ModelSpec
from slsgu_cli.text import first_lines, listed

# All files of any tokenizer of transformers.
TOKENIZER_FILES = (
    TOKENIZER_CONFIG,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
# A buffer of older checkpoints, which open_clip ignores.
POSITIONS = "position_ids"
# A parameter that open_clip adds to a checkpoint without it.
BIAS = "logit_bias"


def hub_tokenizer(model: ResolvedModel) -> str | None:
    """Return the name of a model's Hugging Face tokenizer; None for CLIP's own."""
    name = model.config["text_cfg"].get("hf_tokenizer_name")
    return str(name) if name else None


def tokenizer_files(model: ResolvedModel, scratch: Path) -> dict[str, Path]:
    """Return the tokenizer files that a folder of a model needs, by their names there.

    They are the files that the model's tokenizer was loaded from. If these do not name the class
    of the tokenizer, it is saved again in the empty folder `scratch`. CLIP's own tokenizer is
    part of open_clip and needs no files. Raises MissingError or InputError.
    """
    name = hub_tokenizer(model)
    if name is None:
        return {}
    source = model.folder or _tokenizer_folder(name)
    if source is None or "tokenizer_class" not in config_of(source / TOKENIZER_CONFIG):
        open_clip_tokenizer(model).save_pretrained(str(scratch))
        return {path.name: path for path in sorted(scratch.iterdir())}
    return present_files(source, TOKENIZER_FILES)


def present_files(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the files of a folder that exist, by name."""
    return {name: folder / name for name in names if (folder / name).is_file()}


def tokenizer_to_add(model: ResolvedModel | None, scratch: Path) -> dict[str, Path]:
    """Return the tokenizer files of a model that is not a folder; warn if they are missing."""
    if model is None or model.folder is not None:
        return {}
    try:
        return tokenizer_files(model, scratch)
    except SlsguError as error:
        progress.warn(f"the tokenizer of {model.spec} cannot be written: {error.message}")
        return {}


def _tokenizer_folder(name: str) -> Path | None:
    """Return the folder of a tokenizer: a local one, or a snapshot of the hub."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except FETCH_ERRORS:
        return None


def why_not_loaded(folder: Path, original: ResolvedModel | None) -> str | None:
    """Return why open_clip may not load a folder; None if it does.

    Its tokenizer must return the same ids as that of `original`, the model before the edit.
    """
    try:
        model = resolve(ModelSpec(f"{LOCAL}{folder}"))
        if not is_read_by_open_clip(model):
            return f"it does not read {model.weights.name}, TorchScript or of a compiled model"
        return _other_weights(model) or _other_tokenizer(model, original)
    except SlsguError as error:
        return first_lines(error).replace(f"{folder}/", "")


def require_weights(model: ResolvedModel) -> None:
    """Raise InputError or MissingError unless a model's weights can be loaded.

    Names and shapes in their header are enough for most. If these differ from the configuration,
    as in weights that open_clip converts, load them.
    """
    if _other_weights(model) is not None:
        load(model)


def _other_weights(model: ResolvedModel) -> str | None:
    """Return how the names and shapes of a model's weights differ from its configuration."""
    wanted = clip_shapes(model.config) or shapes_of(without_weights(model))
    stored = weights_of(model).shapes()
    if "positional_embedding" in stored and "positional_embedding" not in wanted:
        # A custom text tower also loads from names without its prefix.
        wanted = {name.removeprefix("text."): shape for name, shape in wanted.items()}
    missing = sorted(wanted.keys() - stored.keys() - {BIAS})
    more = sorted(name for name in stored.keys() - wanted.keys() if POSITIONS not in name)
    other = sorted(name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name])
    for names, what in (
        (missing, "its weights lack"),
        (more, "its configuration has no place for"),
        (other, "its configuration has another shape for"),
    ):
        if names:
            return f"{what} {listed(names, 1)}"
    return None


def _other_tokenizer(model: ResolvedModel, original: ResolvedModel | None) -> str | None:
    """Return how the tokenizer of a folder differs from that of the original model."""
    name = hub_tokenizer(model)
    if (
        original is not None
        and model.scheme is NamingScheme.TRANSFORMERS
        and hub_tokenizer(original)
    ):
        here, there = _cleaning(model), _cleaning(original)
        if here != there:
            return (
                f"its tokenizer cleans texts by {here!r}, and that of {original.spec} by "
                f"{there!r}, which gives other ids: clean them so before"
            )
    by_name = original is not None and "siglip" in original.identifier.lower()
    if name is None and not by_name:
        return None
    ids = tokenizer(model)(PROBE)
    copied = original is not None and original.folder and original.scheme is model.scheme
    if original is not None and not copied and (ids != tokenizer(original)(PROBE)).any():
        return f"its tokenizer gives other ids than that of {original.spec}"
    return None


def _cleaning(model: ResolvedModel) -> str:
    """Return how a Hugging Face tokenizer cleans texts, in open_clip's words."""
    return str(model.config["text_cfg"].get("tokenizer_kwargs", {}).get("clean", "whitespace"))
