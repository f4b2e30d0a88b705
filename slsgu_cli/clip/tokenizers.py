"""A model's own tokenizer, and the input that a model takes."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slsgu_cli.checkpoints.configurations import CONFIG
from slsgu_cli.checkpoints.naming_schemes import NamingScheme
from slsgu_cli.checkpoints.transformers_families import AS_IT_IS
from slsgu_cli.checkpoints.transformers_inputs import vocabulary
from slsgu_cli.clip.models import ResolvedModel, explained, quiet
from slsgu_cli.errors import InputError, MissingError, SlsguError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.sets import InputSpec
from slsgu_cli.text import first_lines

# The file from which transformers reads any tokenizer.
TOKENIZER_CONFIG = "tokenizer_config.json"
# A BERT may have its vocabulary only.
TOKENIZER = ("tokenizer*", "vocab.txt")
PROBE = ("a photo of a dog.", "Ünïcode & 'quotes', 1234-5678")
Tokenize = Callable[[Sequence[str]], npt.NDArray[np.int32]]


def input_spec(model: ResolvedModel) -> InputSpec:
    """Return how `model` takes images and text."""
    size = model.config["vision_cfg"].get("image_size", 224)
    with explained(model):
        height, width = size if isinstance(size, list | tuple) else (size, size)
        tokens = tokenizer(model)(PROBE)
        preprocess = model.preprocess
        return InputSpec(
            height=int(height),
            width=int(width),
            mean=tuple(float(value) for value in preprocess["mean"]),
            std=tuple(float(value) for value in preprocess["std"]),
            interpolation=str(preprocess["interpolation"]),
            resize_mode=str(preprocess["resize_mode"]),
            fill_color=int(preprocess.get("fill_color", 0)),
            tokenizer=digest(tokens.tolist()),
            context_length=int(tokens.shape[1]),
        )


def tokenizer(model: ResolvedModel) -> Tokenize:
    """Return the model's own tokenizer: texts to int32 ids of shape (texts, context)."""
    tokenize = open_clip_tokenizer(model)
    return lambda texts: np.asarray(tokenize(list(texts)).numpy(), dtype=np.int32)


def token_words(model: ResolvedModel) -> dict[int, str]:
    """Return the words of letters that are one token each, by their id.

    The result is empty for a tokenizer that cannot decode.
    """
    return _token_words(open_clip_tokenizer(model))


def open_clip_tokenizer(model: ResolvedModel) -> Any:
    """Return open_clip's tokenizer of a model. Raises MissingError or InputError."""
    text = model.config["text_cfg"]
    in_transformers = model.scheme is NamingScheme.TRANSFORMERS
    length = text["context_length"] if in_transformers else None
    clean = text.get("tokenizer_kwargs", {}).get("clean") if in_transformers else None
    try:
        with quiet():
            tokenize = _tokenizer(model.identifier, length, clean)
    except Exception as error:  # transformers and its hub raise many kinds here
        raise _no_tokenizer(model, error) from error
    if in_transformers:
        if "tokenizer_kwargs" not in text:
            _check_vocabulary(model, tokenize.encoder)
        if "hf_config" in text:
            _check_padding(model, tokenize.tokenizer.pad_token_id)
    return tokenize


def _no_tokenizer(model: ResolvedModel, error: Exception) -> SlsguError:
    """Return the error for a tokenizer that cannot be loaded, with a hint by its origin."""
    name = model.config["text_cfg"].get("hf_tokenizer_name")
    hint = "correct the tokenizer in text_cfg of the configuration"
    if isinstance(error, ImportError) and "SiglipTokenizer" in str(error):
        hint = "pip install sentencepiece protobuf"
    elif isinstance(error, ImportError):
        hint = "pip install 'slsgu[targets]', which has transformers"
    elif model.folder is not None and (name or model.scheme is NamingScheme.TRANSFORMERS):
        files = f"the files of {name or 'its tokenizer'}"
        hint = f"put {files} next to the weights: {TOKENIZER_CONFIG}, tokenizer.json"
    elif name:
        hint = f"it is {name} of the Hugging Face hub: check the connection"
    what = f"cannot load the tokenizer of {model.spec}: {first_lines(error)}"
    kind = MissingError if isinstance(error, OSError | ImportError) else InputError
    return kind(what, hint=hint)


# Reading a vocabulary takes a tenth of a second.
@functools.cache
def _tokenizer(identifier: str, context_length: int | None, clean: str | None) -> Any:
    """Return open_clip's tokenizer by name, or one that wraps the tokenizer of a folder.

    Without a context length, open_clip knows the tokenizer by the model's name; without a way to
    `clean` texts, it is CLIP's own.
    """
    import open_clip

    if context_length is None:
        return open_clip.get_tokenizer(identifier)
    if clean is None:
        return open_clip.SimpleTokenizer(context_length=context_length)
    # transformers would look for a relative path on the hub.
    folder = Path(identifier).absolute()
    if not any(any(folder.glob(name)) for name in TOKENIZER):
        raise FileNotFoundError(f"{folder} has no {TOKENIZER_CONFIG}")
    if clean != AS_IT_IS:
        return open_clip.tokenizer.HFTokenizer(str(folder), context_length, clean=clean)
    tokenize = open_clip.tokenizer.HFTokenizer(str(folder), context_length)
    tokenize.clean_fn = str
    return tokenize


def _check_vocabulary(model: ResolvedModel, clip: dict[str, int]) -> None:
    """Raise InputError if a folder's tokenizer has other tokens than CLIP's, the last two aside."""
    tokens = vocabulary(model.weights.parent)
    words = {token: number for token, number in clip.items() if number < len(clip) - 2}
    if tokens is not None and any(tokens.get(word) != number for word, number in words.items()):
        raise InputError(f"{model.spec} has its own vocabulary, which slsgu cannot use")


def _check_padding(model: ResolvedModel, pads_with: int | None) -> None:
    """Raise InputError if a folder's tokenizer pads with another token than its BERT masks."""
    padding = model.config["text_cfg"]["hf_config"]["pad_token_id"]
    if pads_with != padding:
        raise InputError(
            f"the tokenizer of {model.spec} pads texts with {pads_with}, and its {CONFIG} has "
            f"pad_token_id {padding}",
            hint="get the model again, or correct its configuration",
        )


@functools.cache
def _token_words(tokenize: Any) -> dict[int, str]:
    # open_clip's tokenizer of a model from the hub holds the one of transformers.
    inner = getattr(tokenize, "tokenizer", tokenize)
    decode, size = getattr(inner, "decode", None), getattr(inner, "vocab_size", None)
    if decode is None or size is None:
        return {}
    words = {number: str(decode([number])).strip() for number in range(int(size))}
    words = {number: word for number, word in words.items() if word.isalpha()}
    frame, other = tokenize(["a", "i"])
    places = (frame != other).nonzero().flatten().tolist()
    if len(places) != 1 or not words:
        return {}
    rows = tokenize(list(words.values()))
    tokens = rows[:, places[0]].tolist()
    rows[:, places[0]] = frame[places[0]]
    framed = (rows == frame).all(dim=1).tolist()
    return {
        number: word
        for (number, word), token, alone in zip(words.items(), tokens, framed, strict=True)
        if alone and token == number
    }
