"""Folders that are written for others to load: the tokenizer in them, and whether open_clip does.

Nothing is told of a folder that was not looked at: its configuration, the names and shapes
of its weights by their header, and its tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path

from slsgu_cli.checkpoints.layouts import clip_shapes
from slsgu_cli.checkpoints.targets import read_config
from slsgu_cli.checkpoints.tensor_file import canonical_name
from slsgu_cli.checkpoints.transformers_clip import FETCH_ERRORS
from slsgu_cli.checkpoints.weights import open_weights
from slsgu_cli.clip.models import (
    LOCAL,
    ResolvedModel,
    built_shapes,
    probe_tokens,
    resolve,
    save_tokenizer,
)
from slsgu_cli.errors import SlsguError, first_lines
from slsgu_cli.records.sets import ModelSpec

# What transformers reads a tokenizer from, whatever its kind.
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_CONFIG, "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model",
)  # fmt: skip
# A buffer of older checkpoints, which open_clip leaves out.
POSITIONS = "position_ids"
# What open_clip adds to a checkpoint that has none.
BIAS = "logit_bias"


def hub_tokenizer(model: ResolvedModel) -> str | None:
    """Return the name of the Hugging Face tokenizer of a model; None of CLIP's own."""
    name = model.config["text_cfg"].get("hf_tokenizer_name")
    return str(name) if name else None


def tokenizer_files(model: ResolvedModel, scratch: Path) -> dict[str, Path]:
    """Return the files that a folder of a model needs for its tokenizer, by their names there.

    They are those that the model's tokenizer was loaded from, or, where these do not say by
    themselves which tokenizer they are of, saved anew in the empty folder `scratch`. CLIP's
    own tokenizer is part of open_clip and needs none. Raises MissingError or InputError.
    """
    name = hub_tokenizer(model)
    if name is None:
        return {}
    source = _tokenizer_folder(name)
    if source is None or "tokenizer_class" not in _said(source / TOKENIZER_CONFIG):
        save_tokenizer(model, scratch)
        return {path.name: path for path in sorted(scratch.iterdir())}
    return {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}


def _tokenizer_folder(name: str) -> Path | None:
    """Return the folder that a tokenizer is loaded from: a local one, or one of the hub."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except FETCH_ERRORS:
        return None


def _said(path: Path) -> Mapping[str, object]:
    return read_config(path) if path.is_file() else {}


def why_not_loaded(folder: Path, original: ResolvedModel | None) -> str | None:
    """Return why it is not certain that open_clip loads a folder; None where it is.

    Its tokenizer must give the ids that `original`'s gives, of the model that it was made from.
    """
    try:
        model = resolve(ModelSpec(f"{LOCAL}{folder}"))
        return _other_weights(model) or _other_tokenizer(model, original)
    except SlsguError as error:
        return first_lines(error).replace(f"{folder}/", "")


def _other_weights(model: ResolvedModel) -> str | None:
    """Return how the header of a model's weights differs from what its configuration builds."""
    wanted = clip_shapes(model.config) or built_shapes(model)
    file = open_weights(model.weights)
    held = {canonical_name(name): file.entry(name).shape for name in file.names()}
    if "positional_embedding" in held and "positional_embedding" not in wanted:
        # A text tower of its own is loaded from the names of one without as well.
        wanted = {name.removeprefix("text."): shape for name, shape in wanted.items()}
    missing = sorted(wanted.keys() - held.keys() - {BIAS})
    more = sorted(name for name in held.keys() - wanted.keys() if POSITIONS not in name)
    other = sorted(name for name in wanted.keys() & held.keys() if wanted[name] != held[name])
    for names, what in (
        (missing, "its weights lack"),
        (more, "its configuration has no place for"),
        (other, "its configuration has another shape for"),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{what} {names[0]}{others}"
    return None


def _other_tokenizer(model: ResolvedModel, original: ResolvedModel | None) -> str | None:
    """Return in what the tokenizer of a folder is not that of the model it was made from."""
    name = hub_tokenizer(model)
    by_name = original is not None and "siglip" in original.identifier.lower()
    if name is None and not by_name:
        return None
    ids = probe_tokens(model)
    if original is not None and original.folder is None and ids != probe_tokens(original):
        return f"its tokenizer gives other ids than that of {original.spec}"
    return None
