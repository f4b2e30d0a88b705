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
    tokenize = _tokenizer_of(model)

    def encode(texts: Sequence[str]) -> npt.NDArray[np.int32]:
        return np.asarray(tokenize(list(texts)).numpy(), dtype=np.int32)

    return encode


def probe_tokens(model: ResolvedModel) -> list[list[int]]:
    """Return the ids of a few texts by a model's tokenizer, read again from its files."""
    ids: list[list[int]] = fresh_tokenizer(model)(list(PROBE)).tolist()
    return ids


def fresh_tokenizer(model: ResolvedModel) -> Any:
    """Return open_clip's tokenizer of a model, read again from its files."""
    with quiet(), explained(model):
        return _opened_tokenizer(*_named_tokenizer(model))


def token_words(model: ResolvedModel) -> dict[int, str]:
    """Return the words of letters that are one token each, by their id.

    The result is empty for a tokenizer that cannot decode.
    """
    return _token_words(_tokenizer_of(model))


def _tokenizer_of(model: ResolvedModel) -> Any:
    try:
        with quiet():
            tokenize = _tokenizer(*_named_tokenizer(model))
    except Exception as error:  # transformers and its hub raise many kinds here
        raise _no_tokenizer(model, error) from error
    text = model.config["text_cfg"]
    if model.scheme is NamingScheme.TRANSFORMERS:
        if "tokenizer_kwargs" not in text:
            _check_vocabulary(model, tokenize.encoder)
        if "hf_config" in text:
            _check_padding(model, tokenize.tokenizer.pad_token_id)
    return tokenize


def _named_tokenizer(model: ResolvedModel) -> tuple[str, int | None, str | None]:
    """Return the arguments of `_opened_tokenizer`: name, context length, cleaning.

    The latter two are None where open_clip knows the tokenizer by name.
    """
    if model.scheme is not NamingScheme.TRANSFORMERS:
        return model.identifier, None, None
    text = model.config["text_cfg"]
    cleaned = text.get("tokenizer_kwargs", {}).get("clean")
    return model.identifier, text["context_length"], cleaned


def _no_tokenizer(model: ResolvedModel, error: Exception) -> SlsguError:
    """Return the error for a tokenizer that cannot be loaded, with a hint by its origin."""
    name = model.config["text_cfg"].get("hf_tokenizer_name")
    hint = "correct the tokenizer in text_cfg of the configuration"
    if isinstance(error, ImportError) and "SiglipTokenizer" in str(error):
        hint = "pip install sentencepiece protobuf"
    elif isinstance(error, ImportError):
        hint = "pip install 'slsgu[targets]', which has transformers"
    elif model.scheme is NamingScheme.TRANSFORMERS:
        hint = f"put the model's tokenizer into {model.folder}: {TOKENIZER_CONFIG} and its files"
    elif name and model.folder is not None:
        hint = f"put the files of {name} next to the weights: {TOKENIZER_CONFIG}, tokenizer.json"
    elif name:
        hint = f"it is {name} of the Hugging Face hub: check the connection"
    what = f"cannot load the tokenizer of {model.spec}: {first_lines(error)}"
    kind = MissingError if isinstance(error, OSError | ImportError) else InputError
    return kind(what, hint=hint)


def _opened_tokenizer(identifier: str, context_length: int | None, cleaned: str | None) -> Any:
    """Return open_clip's tokenizer by name, or one that wraps the tokenizer of a folder."""
    import open_clip

    if context_length is None:
        return open_clip.get_tokenizer(identifier)
    if cleaned is None:
        return open_clip.SimpleTokenizer(context_length=context_length)
    # transformers would look for a relative path on the hub.
    folder = str(Path(identifier).absolute())
    if not any(any(Path(folder).glob(name)) for name in TOKENIZER):
        raise FileNotFoundError(f"{folder} has no {TOKENIZER_CONFIG}")
    if cleaned != AS_IT_IS:
        return open_clip.tokenizer.HFTokenizer(folder, context_length, clean=cleaned)
    tokenize = open_clip.tokenizer.HFTokenizer(folder, context_length)
    tokenize.clean_fn = str
    return tokenize


# Reading a vocabulary takes a tenth of a second.
_tokenizer = functools.cache(_opened_tokenizer)


def _check_vocabulary(model: ResolvedModel, ours: dict[str, int]) -> None:
    """Raise InputError if a folder's tokenizer has other tokens than CLIP's, the last two aside."""
    theirs = vocabulary(model.weights.parent)
    words = {token: number for token, number in ours.items() if number < len(ours) - 2}
    if theirs is not None and any(theirs.get(word) != number for word, number in words.items()):
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
    own = getattr(tokenize, "tokenizer", tokenize)
    decode, size = getattr(own, "decode", None), getattr(own, "vocab_size", None)
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
