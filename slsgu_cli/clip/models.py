"""From a model's name to its files, inputs and module."""

import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slsgu_cli import progress
from slsgu_cli.checkpoints.configurations import CONFIG, OPEN_CLIP
from slsgu_cli.checkpoints.hub import FETCH_ERRORS, HUB, fetch_clip, unreachable
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.layouts import file_fingerprint, open_weights, read_layer, weight_files
from slsgu_cli.checkpoints.naming_schemes import NamingScheme
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.checkpoints.tensor_file import COMPILED, canonical_name
from slsgu_cli.checkpoints.transformers_families import (
    AS_IT_IS,
    KNOWN,
    bert_config,
    is_clip,
    model_config,
    other_model,
    require_towers,
)
from slsgu_cli.checkpoints.transformers_inputs import preprocess_config, vocabulary
from slsgu_cli.checkpoints.transformers_weights import ClipWeights
from slsgu_cli.errors import InputError, MissingError, SlsguError, UsageError, lacks_memory
from slsgu_cli.records.codec import digest, parse_json
from slsgu_cli.records.sets import LOCAL, InputSpec, ModelSpec
from slsgu_cli.text import first_lines, near, reason_of

if TYPE_CHECKING:
    import torch


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

# What open_clip takes where a configuration is silent, as most are on these.
SILENT = {"vision_cfg": {"head_width": 64, "mlp_ratio": 4.0}, "text_cfg": {"mlp_ratio": 4.0}}
QUICK_GELU = ("quick_gelu", False)
# What transformers reads a tokenizer from, whatever its kind.
TOKENIZER_CONFIG = "tokenizer_config.json"
# A BERT's may be its words alone.
TOKENIZER = ("tokenizer*", "vocab.txt")
# What timm calls a tower of SigLIP's, whatever its sizes.
TIMM_SIGLIP = "vit_base_patch16_siglip_224"
PROBE = ("a photo of a dog.", "Ünïcode & 'quotes', 1234-5678")
Tokenize = Callable[[Sequence[str]], npt.NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model's configuration and where its weights lie.

    `folder` is set for models that are folders. `identifier` is what open_clip calls it;
    it has no word for a folder of transformers, which `scheme` tells.
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
    model = _resolved(spec)
    require_towers(str(spec), model.config)
    return model


def _resolved(spec: ModelSpec) -> ResolvedModel:
    if spec.name.startswith(LOCAL):
        return _resolve_folder(spec, Path(spec.name.removeprefix(LOCAL)))
    if (Path(spec.name) / OPEN_CLIP).is_file() or is_clip(Path(spec.name)):
        return _resolve_folder(spec, Path(spec.name))
    if spec.name.startswith(HUB):
        return _resolve_hub(spec)
    return _resolve_name(spec)


def input_spec(model: ResolvedModel) -> InputSpec:
    """Return how `model` takes images and text."""
    size = model.config["vision_cfg"].get("image_size", 224)
    with _explained(model):
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
    """Return the ids of a few texts by a model's tokenizer, read anew from its files."""
    ids: list[list[int]] = fresh_tokenizer(model)(list(PROBE)).tolist()
    return ids


def fresh_tokenizer(model: ResolvedModel) -> Any:
    """Return open_clip's tokenizer of a model, read anew from its files."""
    with _quiet(), _explained(model):
        return _opened_tokenizer(*_named_tokenizer(model))


def token_words(model: ResolvedModel) -> dict[int, str]:
    """Return the words of letters that are one token each and come back from it, by their id.

    Nothing is returned of a tokenizer that cannot say what its tokens are.
    """
    return _token_words(_tokenizer_of(model))


def load(
    model: ResolvedModel, device: str = "cpu", *, warn: Callable[[str], None] | None = None
) -> "torch.nn.Module":
    """Build the module in fp32 and evaluation mode on `device`, with its weights loaded."""
    import open_clip

    if model.scheme is NamingScheme.TRANSFORMERS or not is_read_by_open_clip(model):
        return _load_ourselves(model, device, warn)
    # An absolute path: a file may have the name of a tag, which open_clip would take first.
    pretrained = None if ":" in model.identifier else str(model.weights.absolute())
    with _quiet(), _explained(model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        module: torch.nn.Module = open_clip.create_model(
            model.identifier,
            pretrained=pretrained,
            device=device,
            precision="fp32",
            require_pretrained=True,
        )
    if warn and model.spec.pretrained:
        _check_activation(model, warn)
    for message in caught:
        if warn and "QuickGELU" in str(message.message):
            warn(str(message.message))
    return module.eval().requires_grad_(True)


def is_read_by_open_clip(model: ResolvedModel) -> bool:
    """Return whether open_clip takes a file as it is: not TorchScript, nor compiled models'.

    Of one that is damaged, that is for open_clip to tell.
    """
    try:
        file = open_weights(model.weights)
    except SlsguError:
        return True
    return not (file.is_script or any(COMPILED in name for name in file.names()))


def _load_ourselves(
    model: ResolvedModel, device: str, warn: Callable[[str], None] | None
) -> "torch.nn.Module":
    """Build the module and read its weights from files that open_clip cannot read."""
    module, read = _built(model)
    with _explained(model):
        if read is None:
            raise ValueError("it has other weights than the architecture is built of")
        _fill(module, read, device)
    if warn and open_weights(model.weights).is_script and not model.config.get("quick_gelu"):
        warn(
            f"{model.spec} is TorchScript, as OpenAI's models are, which were trained with "
            "QuickGELU, but is built with GELU: use the -quickgelu architecture name for those"
        )
    return module.to(device).eval().requires_grad_(True)


def load_sharded(model: ResolvedModel, device: str) -> "torch.nn.Module":
    """Build the module with its weights sharded over the processes that a launcher started.

    Each reads one parameter after another from the file and keeps its part. Where the file
    has other names or shapes than the module, each loads the whole on the host before.
    """
    from slsgu_cli.clip import processes
    from slsgu_cli.clip.towers import text_tower, vision_tower

    module, read = _built(model)
    if read is None:
        progress.note(f"{model.spec} needs to be converted: each process loads the whole at first")
        module = load(model)
    blocks = [*vision_tower(module).blocks, *text_tower(module).blocks]
    processes.shard(module.requires_grad_(True), blocks, device)
    if read is not None:
        with _explained(model):
            _fill(module, read, device)
    return module.eval()


def _built(model: ResolvedModel) -> "tuple[torch.nn.Module, Callable[[str], Floats] | None]":
    """Return the module without weights, and what reads them where the file has just these."""
    with _quiet(), _explained(model):
        module = _without_weights(model)
        shapes, read = contents(model)
    is_alike = all(shapes.get(name) == shape for name, shape in _shapes(module).items())
    return module, read if is_alike else None


def _without_weights(model: ResolvedModel) -> "torch.nn.Module":
    """Build the module in evaluation mode with its buffers, and parameters of no memory."""
    import torch

    register = torch.nn.Module.register_parameter

    def without_memory(
        module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None
    ) -> None:
        register(module, name, _of_no_memory(parameter))

    kind: Any = torch.nn.Module
    kind.register_parameter = without_memory
    try:
        return _unfilled(model)
    except RuntimeError:
        # Some of timm's towers run a part of themselves to know its size.
        kind.register_parameter = register
        built = _unfilled(model)
        for module in built.modules():
            for name, parameter in module.named_parameters(recurse=False):
                register(module, name, _of_no_memory(parameter))
        return built
    finally:
        kind.register_parameter = register


def _of_no_memory(parameter: "torch.nn.Parameter | None") -> "torch.nn.Parameter | None":
    import torch

    if parameter is None or parameter.is_meta:
        return parameter
    return torch.nn.Parameter(parameter.detach().to("meta"))


def _unfilled(model: ResolvedModel) -> "torch.nn.Module":
    """Build the module of a model's configuration, without its weights."""
    import open_clip

    on_no_device: Any = None
    if model.scheme is NamingScheme.TRANSFORMERS:
        return _built_by_config(model.config)
    return open_clip.create_model(  # type: ignore[no-any-return]
        model.identifier, load_weights=False, pretrained_text=False, device=on_no_device
    )


def built_shapes(model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a model's configuration builds, by its name."""
    with _quiet(), _explained(model):
        return _shapes(_without_weights(model))


def _shapes(module: "torch.nn.Module") -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def built_tower(model: ResolvedModel) -> Any:
    """Return the vision tower that a model's configuration builds, without weights."""
    with _quiet(), _explained(model):
        return _without_weights(model).visual


def contents(
    model: ResolvedModel,
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Floats]]:
    """Return the shapes of what a model's files hold by the names of open_clip, and a reader."""
    if model.scheme is NamingScheme.TRANSFORMERS:
        weights = ClipWeights(model.weights.parent)
        return weights.shapes(), weights.read
    file = open_weights(model.weights)
    names = {canonical_name(name): name for name in file.names()}
    shapes = {name: file.entry(stored).shape for name, stored in names.items()}
    return shapes, lambda name: file.read(names[name])


def _fill(module: "torch.nn.Module", read: Callable[[str], Floats], device: str) -> None:
    """Load what a process keeps of each parameter of a module that has none."""
    import torch

    from slsgu_cli.clip import processes

    parts = {
        name: processes.shard_of(torch.tensor(read(name)).to(value.dtype), value, device)
        for name, value in module.state_dict().items()
    }
    module.load_state_dict(parts, assign=True)


def fingerprint(model: ResolvedModel, instead: Mapping[str, Floats] | None = None) -> str:
    """Return a digest of weights and architecture, the same for every container of them.

    Parameters of `instead` count with these values in place of their own.
    """
    if model.scheme is NamingScheme.TRANSFORMERS:
        weights = ClipWeights(model.weights.parent).fingerprint(instead)
    else:
        weights = file_fingerprint(model.weights, instead)
    return digest({"weights": weights, "config": plain_config(model.config)})


def has_model(spec: ModelSpec, weights: str | None) -> bool:
    """Return whether a model is there, with the weights of a fingerprint or with any."""
    try:
        model = resolve(spec)
        return weights is None or fingerprint(model) == weights
    except SlsguError:
        return False


def model_layer(model: ResolvedModel, name: str) -> Floats:
    """Return a layer in the precision of the file: fp16 stays fp16, bf16 comes as fp32."""
    if model.scheme is NamingScheme.OPEN_CLIP:
        return read_layer(model.weights, name)
    layer = Layer.parse(name)
    values: Floats = layer.rows(ClipWeights(model.weights.parent).read(layer.parameter))
    return values


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model_cfg without what it would be anyway, to compare two by."""
    towers = {
        name: {key: value for key, value in config[name].items() if SILENT[name].get(key) != value}
        for name in SILENT
    }
    rest = {key: value for key, value in config.items() if key not in SILENT}
    return {key: value for key, value in rest.items() if (key, value) != QUICK_GELU} | towers


def pick_device(name: str) -> str:
    """Return the torch device for `auto` (cuda, else mps, else cpu) or check the named one.

    Of several processes, each has the card of its number on its machine.
    """
    import torch

    from slsgu_cli.clip import processes

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    has = {"cuda": cuda, "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in has.items() if available)
    kind, _, number = name.partition(":")
    numbered = not number or number.isdecimal()
    known = numbered and int(number or 0) < max(1, torch.cuda.device_count())
    if not has.get(kind, False) or not known:
        usable = ", ".join(kind for kind, available in has.items() if available)
        raise UsageError(f"device {name} is not available here", hint=f"--device auto ({usable})")
    return processes.card(name) if kind == "cuda" else name


def device_name(device: str) -> str:
    """Return what a device of PyTorch's is called, beside figures of time."""
    import torch

    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"{device}, {torch.get_num_threads()} threads"


def _tokenizer_of(model: ResolvedModel) -> Any:
    try:
        with _quiet():
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
    """Return what a tokenizer is named by, and its context length where open_clip has no name.

    Then, how texts are cleaned where it lies in the model's own folder.
    """
    if model.scheme is not NamingScheme.TRANSFORMERS:
        return model.identifier, None, None
    text = model.config["text_cfg"]
    cleaned = text.get("tokenizer_kwargs", {}).get("clean")
    return model.identifier, text["context_length"], cleaned


def _no_tokenizer(model: ResolvedModel, error: Exception) -> SlsguError:
    """Return the error for a tokenizer that cannot be had, which says where it comes from."""
    name = model.config["text_cfg"].get("hf_tokenizer_name")
    hint = "correct what the configuration says of it in text_cfg"
    if isinstance(error, ImportError) and "SiglipTokenizer" in str(error):
        hint = "pip install sentencepiece protobuf"
    elif isinstance(error, ImportError):
        hint = "pip install 'slsgu[targets]', which has transformers"
    elif model.scheme is NamingScheme.TRANSFORMERS:
        hint = f"put the model's tokenizer into {model.folder}: {TOKENIZER_CONFIG} and its files"
    elif name and model.folder is not None:
        hint = f"put the files of {name} beside the weights: {TOKENIZER_CONFIG}, tokenizer.json"
    elif name:
        hint = f"it is {name} of the Hugging Face hub: check the connection"
    what = f"cannot load the tokenizer of {model.spec}: {first_lines(error)}"
    kind = MissingError if isinstance(error, OSError | ImportError) else InputError
    return kind(what, hint=hint)


def _opened_tokenizer(identifier: str, context_length: int | None, cleaned: str | None) -> Any:
    """Return open_clip's tokenizer of a name, or around the one that lies in a folder."""
    import open_clip

    if context_length is None:
        return open_clip.get_tokenizer(identifier)
    if cleaned is None:
        return open_clip.SimpleTokenizer(context_length=context_length)
    # What transformers takes for a name of the hub's would be looked for there.
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
    """Refuse a folder whose tokenizer has other tokens than CLIP's; two have other names."""
    theirs = vocabulary(model.weights.parent)
    words = {token: number for token, number in ours.items() if number < len(ours) - 2}
    if theirs is not None and any(theirs.get(word) != number for word, number in words.items()):
        raise InputError(f"{model.spec} has a tokenizer of its own, which slsgu cannot use")


def _check_padding(model: ResolvedModel, pads_with: int | None) -> None:
    """Refuse a folder whose tokenizer pads with another token than its BERT takes for padding."""
    padding = model.config["text_cfg"]["hf_config"]["pad_token_id"]
    if pads_with != padding:
        raise InputError(
            f"the tokenizer of {model.spec} pads texts with {pads_with}, and its {CONFIG} has "
            f"pad_token_id {padding}",
            hint="get the model again, or correct its configuration",
        )


def _nbytes(model: ResolvedModel) -> int:
    """Return how many bytes a model's weights have; of transformers', all of its files."""
    of_transformers = model.scheme is NamingScheme.TRANSFORMERS
    files = weight_files(model.weights.parent) if of_transformers else [model.weights]
    return sum(path.stat().st_size for path in files)


def _built_by_config(config: Mapping[str, Any]) -> "torch.nn.Module":
    """Build open_clip's module for the model_cfg of a folder of transformers.

    A tower of timm's or of Hugging Face's, which open_clip builds by a name, is described in a
    folder of its own, whose path open_clip takes for the name.
    """
    import open_clip

    rest = {name: value for name, value in config.items() if name != "custom_text"}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    with TemporaryDirectory() as folder:
        rest["vision_cfg"] = _vision_in(Path(folder), config["vision_cfg"])
        rest["text_cfg"] = _text_in(Path(folder), config["text_cfg"])
        return kind(**rest)  # type: ignore[no-any-return]


def _vision_in(folder: Path, vision: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a vision_cfg with a folder for the tower of timm's that pools by attention.

    It is of the sizes that the vision_cfg says, which none of timm's names need have.
    """
    if vision.get("timm_pool") != "map":
        return vision
    arguments = {
        "img_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embed_dim": vision["width"],
        "depth": vision["layers"],
        "num_heads": vision["width"] // vision["head_width"],
        "mlp_ratio": vision["mlp_ratio"],
        "act_layer": "gelu_tanh" if vision["act_kwargs"]["approximate"] == "tanh" else "gelu",
    }
    tower = {"architecture": TIMM_SIGLIP, "model_args": arguments, "pretrained_cfg": {}}
    (folder / CONFIG).write_text(json.dumps(tower))
    return {**vision, "timm_model_name": f"{LOCAL}{folder}"}


def _text_in(folder: Path, text: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a text_cfg with a folder for the BERT that its `hf_config` describes."""
    if "hf_config" not in text:
        return text
    (folder / CONFIG).write_text(json.dumps(bert_config(text)))
    named = {"hf_model_name": str(folder), "hf_model_pretrained": False}
    return {name: value for name, value in text.items() if name != "hf_config"} | named


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
    """Return the error for a folder that is no model, or one of another kind."""
    lacks = f"it has no {OPEN_CLIP}" if folder.is_dir() else "there is no such folder"
    weights = next(iter(weight_files(folder)), "FILE") if folder.is_dir() else "FILE"
    usual = (
        f"name a folder written by open_clip, or by transformers ({KNOWN}), "
        f"or --model ARCH --pretrained {weights}"
    )
    what, hint = other_model(folder) or (lacks, usual)
    return MissingError(f"{folder} is not an open_clip model folder: {what}", hint=hint)


def _resolve_transformers(spec: ModelSpec, folder: Path) -> ResolvedModel:
    weights = ClipWeights(folder).weights.path
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
    """Return the configuration and weights of an open_clip repository; None where it is none.

    Raises MissingError where the weights cannot be fetched.
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
    """Return what open_clip calls an architecture, and its model_cfg."""
    import open_clip

    if name.endswith(".json"):
        if not Path(name).is_file():
            raise MissingError(f"there is no architecture file {name}")
        try:
            # What open_clip cannot read would be read again by all that follows.
            _require_towers(parse_json(Path(name).read_bytes()))
            open_clip.add_model_config(name)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{name} is no architecture of open_clip: {error}") from error
        name = Path(name).stem
    with _quiet():
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
    """Raise ValueError unless a model_cfg has what makes it one."""
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


def _check_activation(model: ResolvedModel, warn: Callable[[str], None]) -> None:
    """Warn of a tag of open_clip's that was trained with another activation than is built."""
    import open_clip

    tag = open_clip.get_pretrained_cfg(model.identifier, model.spec.pretrained) or {}
    quick = bool(tag.get("quick_gelu", False))
    if tag and quick != bool(model.config.get("quick_gelu", False)):
        trained, used, name = (
            ("QuickGELU", "GELU", "-quickgelu") if quick else ("GELU", "QuickGELU", "plain")
        )
        warn(
            f"{model.spec} was trained with {trained} but is built with {used}; its accuracy "
            f"suffers. Use the {name} architecture name unless you reproduce a result that was "
            "made this way"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's own logging off the terminal."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _explained(model: ResolvedModel) -> Iterator[None]:
    """Turn a library's failure to build or load into one message."""
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
