"""Families of CLIPs in transformers: their configurations and open_clip's, each way."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slsgu_cli.checkpoints.configurations import (
    CONFIG,
    OPEN_CLIP,
    config_of,
    kind_of,
    read_config,
)
from slsgu_cli.checkpoints.naming_schemes import NamingScheme
from slsgu_cli.checkpoints.targets import NAFLEX, NAFLEX_HINT, SIGLIP
from slsgu_cli.errors import InputError

CLIP, METACLIP, CHINESE_CLIP = "clip", "metaclip_2", "chinese_clip"


def is_clip(folder: Path) -> bool:
    """Return whether a folder holds a model of transformers of one of `FAMILIES`."""
    return model_type(folder) in FAMILIES


def model_type(folder: Path) -> str:
    """Return the type of model that the configuration of a folder names."""
    return str(config_of(folder / CONFIG).get("model_type"))


def other_model(folder: Path) -> tuple[str, str] | None:
    """Return which unsupported model of transformers a folder holds, and a hint.

    None if it holds none, or a supported one.
    """
    config = config_of(folder / CONFIG)
    if not config or is_clip(folder):
        return None
    what = f"it has no {OPEN_CLIP}, and a {CONFIG} of a {kind_of(config)}"
    if config.get("model_type") == NAFLEX:
        return what, NAFLEX_HINT
    return what, f"name a repository or folder of open_clip or of transformers ({KNOWN})"


def require_towers(of: str, model: Mapping[str, Any]) -> None:
    """Raise InputError unless a model_cfg describes two towers; `of` names the model.

    PyTorch would accept heads that are not a whole number.
    """
    for name in ("vision_cfg", "text_cfg"):
        if not isinstance(model.get(name), dict):
            raise invalid_field(of, name, model.get(name))
    heads = model["text_cfg"].get("heads", 1)
    if not _is_size(heads):
        raise invalid_field(of, "heads", heads)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def invalid_field(of: object, name: str, value: Any) -> InputError:
    """Return the error of a configuration whose field `name` has a value that none can have."""
    return InputError(
        f"the configuration of {of} is not valid: {name} cannot be {value!r:.80}",
        hint="get the model again, or correct its configuration",
    )


Part = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """Models of transformers that open_clip builds in the same way; `name` is transformers' class.

    `text` and `vision` are the defaults of transformers, and `preprocess` is how it prepares
    images; with `crops` it takes the center. `fits` maps fields to whether open_clip supports
    their values, and `model_cfg` converts a configuration, with its parts `text` and `vision`
    completed. `for_transformers` converts a model_cfg back; None if that is not possible. `names`
    is the naming scheme of its tensors, and `processor` the prefix of transformers' classes that
    prepare inputs.
    """

    name: str
    text: Part
    vision: Part
    preprocess: Mapping[str, Any]
    crops: bool
    fits: Callable[[Part, Part], dict[str, bool]]
    model_cfg: Callable[[Part, Part, Part], Part]
    for_transformers: Callable[[Part], Part] | None
    names: NamingScheme = NamingScheme.TRANSFORMERS
    processor: str = "CLIP"


def _clip_fits(text: Part, vision: Part) -> dict[str, bool]:
    return {
        "layer_norm_eps": (text["layer_norm_eps"], vision["layer_norm_eps"]) == (1e-5, 1e-5),
        "hidden_act": text["hidden_act"] == vision["hidden_act"] in ("gelu", "quick_gelu"),
        "num_channels": vision["num_channels"] == 3,
        "vocab_size": text["vocab_size"] == CLIP_TEXT["vocab_size"],
        "eos_token_id": text["eos_token_id"] in END_OF_TEXT,
    }


def _clip_config(config: Part, text: Part, vision: Part) -> Part:
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": text["hidden_act"] == "quick_gelu",
        "vision_cfg": _vision_sizes(vision),
        "text_cfg": _text_sizes(text),
    }


def _metaclip_fits(text: Part, vision: Part) -> dict[str, bool]:
    fits = _clip_fits(text, vision)
    return {name: fits[name] for name in ("layer_norm_eps", "hidden_act", "num_channels")} | {
        "eos_token_id": type(text["eos_token_id"]) is int
    }


def _metaclip_config(config: Part, text: Part, vision: Part) -> Part:
    """Return the model_cfg of a CLIP whose texts end with the token of their tokenizer."""
    plain = _clip_config(config, text, vision)
    ends = {"pool_type": "eos", "eos_id": text["eos_token_id"]}
    cleaned = {"tokenizer_kwargs": {"clean": "whitespace"}}
    return plain | {"text_cfg": plain["text_cfg"] | ends | cleaned}


def _chinese_fits(text: Part, vision: Part) -> dict[str, bool]:
    positions, padding = text["max_position_embeddings"], text["pad_token_id"]
    return {
        "layer_norm_eps": vision["layer_norm_eps"] == 1e-5 and _is_positive(text["layer_norm_eps"]),
        "hidden_act": vision["hidden_act"] in ("gelu", "quick_gelu")
        and text["hidden_act"] in BERT_ACTS,
        "num_channels": vision["num_channels"] == 3,
        "max_position_embeddings": _is_size(positions),
        "type_vocab_size": _is_size(text["type_vocab_size"]),
        "pad_token_id": type(padding) is int and padding >= 0,
        "position_embedding_type": text["position_embedding_type"] == "absolute",
    }


def _chinese_config(config: Part, text: Part, vision: Part) -> Part:
    """Return the model_cfg of open_clip's adapter, with a BERT's configuration for its name.

    Texts are cut at the length of training, which is in no file of a folder.
    """
    length = min(CHINESE_LENGTH, text["max_position_embeddings"])
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": vision["hidden_act"] == "quick_gelu",
        "custom_text": True,
        "vision_cfg": _vision_sizes(vision),
        "text_cfg": {
            **_text_sizes(text),
            "context_length": length,
            "hf_config": {name: text[name] for name in BERT_FIELDS},
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "hf_proj_type": "linear",
            "tokenizer_kwargs": {"clean": AS_IT_IS},
        },
    }


def bert_config(text: Mapping[str, Any]) -> Part:
    """Return transformers' configuration of the BERT of a text_cfg with an `hf_config`."""
    return {"model_type": "bert", **_text_for_transformers(text), **text["hf_config"]}


# The names of a tower's sizes in transformers, by their names in open_clip.
_VISION = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
}
_TEXT = {
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
}


def _vision_sizes(vision: Part) -> Part:
    sizes = {ours: vision[theirs] for ours, theirs in _VISION.items()}
    head_width = vision["hidden_size"] // vision["num_attention_heads"]
    return sizes | {"head_width": head_width, "mlp_ratio": _mlp_ratio(vision)}


def _text_sizes(text: Part) -> Part:
    sizes = {ours: text[theirs] for ours, theirs in _TEXT.items()}
    return sizes | {"mlp_ratio": _mlp_ratio(text)}


def _vision_for_transformers(vision: Part) -> Part:
    heads = vision["width"] // vision["head_width"]
    sizes = {theirs: vision[ours] for ours, theirs in _VISION.items()}
    return sizes | {"num_attention_heads": heads, "intermediate_size": _mlp_size(vision)}


def _text_for_transformers(text: Mapping[str, Any]) -> Part:
    sizes = {theirs: text[ours] for ours, theirs in _TEXT.items()}
    return sizes | {"intermediate_size": _mlp_size(text)}


def _mlp_size(part: Mapping[str, Any]) -> int:
    return int(part["width"] * part["mlp_ratio"])


def _clip_for_transformers(model: Part) -> Part:
    act = {"hidden_act": "quick_gelu" if model["quick_gelu"] else "gelu"}
    size = {"projection_dim": model["embed_dim"]}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    return size | {
        "text_config": _text_for_transformers(model["text_cfg"]) | act | size | ends,
        "vision_config": _vision_for_transformers(model["vision_cfg"]) | act | size,
    }


def _metaclip_for_transformers(model: Part) -> Part:
    plain = _clip_for_transformers(model)
    ends = {"bos_token_id": 0, "eos_token_id": model["text_cfg"]["eos_id"]}
    return plain | {"text_config": plain["text_config"] | ends}


def _siglip_for_transformers(model: Part) -> Part:
    text, vision = model["text_cfg"], model["vision_cfg"]
    eps = {"layer_norm_eps": text["norm_kwargs"].get("eps", 1e-5)}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    act, size = {"hidden_act": _act(text)}, {"projection_size": model["embed_dim"]}
    return {
        "text_config": _text_for_transformers(text) | act | eps | size | ends,
        "vision_config": _vision_for_transformers(vision) | {"hidden_act": _act(vision)},
    }


def _act(part: Part) -> str:
    return next((name for name, kwargs in GELU.items() if kwargs == part["act_kwargs"]), "gelu")


def _mlp_ratio(part: Part) -> float:
    """Return open_clip's ratio of the MLP size to the width; open_clip rounds the product down."""
    size, width = part["intermediate_size"], part["hidden_size"]
    ratio = size / width
    return float(ratio if int(width * ratio) == size else (size + 0.5) / width)


def _siglip_fits(text: Part, vision: Part) -> dict[str, bool]:
    return {
        "layer_norm_eps": _is_positive(text["layer_norm_eps"]) and vision["layer_norm_eps"] == 1e-6,
        "hidden_act": {text["hidden_act"], vision["hidden_act"]} <= GELU.keys(),
        "num_channels": vision["num_channels"] == 3,
        "projection_size": _embed_dim(text) == vision["hidden_size"],
        "vision_use_head": vision["vision_use_head"] is True,
    }


def _siglip_config(config: Part, text: Part, vision: Part) -> Part:
    """Return the model_cfg of open_clip's SigLIP, with sizes for the name of timm's tower."""
    return {
        "embed_dim": _embed_dim(text),
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            **_vision_sizes(vision),
            "act_kwargs": GELU[vision["hidden_act"]],
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **_text_sizes(text),
            "act_kwargs": GELU[text["hidden_act"]],
            "norm_kwargs": {"eps": text["layer_norm_eps"]},
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
    }


def _embed_dim(text: Part) -> Any:
    size = text["projection_size"]
    return text["hidden_size"] if size is None else size


# The text length in the training of Chinese CLIP.
CHINESE_LENGTH = 52

# Marks texts that go to a tokenizer unchanged, for which open_clip has no name.
AS_IT_IS = "none"

# Fields of a BERT other than its sizes, and the activations that it may have.
BERT_FIELDS = (
    "max_position_embeddings",
    "type_vocab_size",
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
)
BERT_ACTS = ("gelu", "gelu_new", "relu", "silu")

# Older configurations have a wrong 2 here and mean the last token of a text.
END_OF_TEXT = (2, 49407)

# The keywords of PyTorch's GELU for what transformers calls it.
GELU = {"gelu": {"approximate": "none"}, "gelu_pytorch_tanh": {"approximate": "tanh"}}

_SIZES = {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
CLIP_VISION = {
    "hidden_size": 768,
    **_SIZES,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP_TEXT = {
    "vocab_size": 32000,
    "hidden_size": 768,
    **_SIZES,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "projection_size": None,
}
SIGLIP_VISION = {
    "hidden_size": 768,
    **_SIZES,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
CHINESE_TEXT = {
    "vocab_size": 30522,
    "hidden_size": 768,
    **_SIZES,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
}
SIGLIP_PREPROCESS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"}

# By the type of a model in transformers.
FAMILIES = {
    CLIP: Family(
        "CLIPModel",
        CLIP_TEXT,
        CLIP_VISION,
        {},
        True,
        _clip_fits,
        _clip_config,
        _clip_for_transformers,
    ),
    METACLIP: Family(
        "MetaClip2Model",
        CLIP_TEXT,
        CLIP_VISION,
        {},
        True,
        _metaclip_fits,
        _metaclip_config,
        _metaclip_for_transformers,
    ),
    SIGLIP: Family(
        "SiglipModel",
        SIGLIP_TEXT,
        SIGLIP_VISION,
        SIGLIP_PREPROCESS,
        False,
        _siglip_fits,
        _siglip_config,
        _siglip_for_transformers,
        NamingScheme.SIGLIP,
        "Siglip",
    ),
    CHINESE_CLIP: Family(
        "ChineseCLIPModel",
        CHINESE_TEXT,
        CLIP_VISION,
        {},
        True,
        _chinese_fits,
        _chinese_config,
        None,
        NamingScheme.BERT,
        "ChineseCLIP",
    ),
}
KNOWN = ", ".join(family.name for family in FAMILIES.values())


def model_config(folder: Path) -> dict[str, Any]:
    """Return open_clip's model_cfg for a folder of transformers. Raises InputError."""
    config, family = read_config(folder / CONFIG), FAMILIES[model_type(folder)]
    parts = []
    for name, defaults in (("text_config", family.text), ("vision_config", family.vision)):
        given = config.get(name) or {}, config.get(f"{name}_dict") or {}
        if not all(isinstance(part, dict) for part in given):
            raise invalid_field(folder, name, given[0])
        part = defaults | given[0] | given[1]
        for field in ("hidden_size", "intermediate_size", "num_attention_heads"):
            if not _is_size(part[field]):
                raise invalid_field(folder, field, part[field])
        parts.append(part)
    text, vision = parts
    for field, fits in family.fits(text, vision).items():
        if not fits:
            values = [part[field] for part in (text, vision) if field in part]
            raise InputError(
                f"{folder / CONFIG} has {field} {' and '.join(map(str, values))}, "
                f"which open_clip's {family.name.removesuffix('Model')} cannot have"
            )
    return family.model_cfg(config, text, vision)


def family_of(model: Mapping[str, Any]) -> str:
    """Return the most similar of `FAMILIES` for a model_cfg."""
    if model["vision_cfg"].get("timm_pool") == "map":
        return SIGLIP
    if "hf_config" in model["text_cfg"]:
        return CHINESE_CLIP
    return METACLIP if model["text_cfg"].get("pool_type") == "eos" else CLIP


# Fields of a model_cfg about training and its initialization, and about tokenizers.
_NOT_BUILT = {
    "patch_dropout",
    "timm_drop",
    "timm_drop_path",
    "timm_model_pretrained",
    "hf_model_pretrained",
    "init_logit_scale",
    "nonscalar_logit_scale",
    "pad_id",
}
_TOKENIZER = {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}


def transformers_config(model: Mapping[str, Any]) -> tuple[Part, dict[str, str]]:
    """Return transformers' configuration for a model_cfg, and the fields it cannot express.

    A tower of timm has its sizes in place of its name.
    """
    kind = family_of(model)
    family, full = FAMILIES[kind], _filled(model)
    sizes = {f"{tower}.{name}": full[tower].get(name) for tower, name in _SIZED}
    odd = {name: f"{size!r}" for name, size in sizes.items() if type(size) is not int or size < 1}
    if odd:
        return {}, odd
    if family.for_transformers is None:
        return {}, {"text_cfg.hf_config": "of open_clip's adapter"}
    made = family.for_transformers(full)
    text, vision = family.text | made["text_config"], family.vision | made["vision_config"]
    fits = family.fits(text, vision)
    built, rebuilt = _flat(full, kind), _flat(_filled(family.model_cfg(made, text, vision)), kind)
    other = {
        name: f"{built.get(name)!r} (a {family.name} has {rebuilt.get(name)!r})"
        for name in sorted(built.keys() | rebuilt.keys())
        if built.get(name) != rebuilt.get(name)
    }
    unfit = {name: "another than open_clip's" for name, is_fit in fits.items() if not is_fit}
    whole = {"architectures": [family.name], "model_type": kind, "initializer_factor": 1.0}
    return whole | made, other or unfit


_SIZED = [("vision_cfg", name) for name in _VISION] + [("text_cfg", name) for name in _TEXT]


def _filled(model: Mapping[str, Any]) -> Part:
    """Return a model_cfg with open_clip's defaults."""
    from dataclasses import asdict

    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    full = {"quick_gelu": False, "custom_text": False, **model}
    for name, defaults in (("vision_cfg", CLIPVisionCfg()), ("text_cfg", CLIPTextCfg())):
        full[name] = asdict(defaults) | model[name]
        full[name]["norm_kwargs"] = full[name]["norm_kwargs"] or {}
        full[name]["act_kwargs"] = full[name]["act_kwargs"] or GELU["gelu"]
    return full


def _flat(model: Part, kind: str) -> Part:
    """Return the fields of a complete model_cfg that affect the model, by full name."""
    flat = {name: value for name, value in model.items() if not isinstance(value, dict)}
    flat["init_logit_bias"] = model.get("init_logit_bias") is not None
    if kind != SIGLIP:
        # A separate text tower is the same tower.
        del flat["custom_text"]
    for tower in ("vision_cfg", "text_cfg"):
        flat |= {f"{tower}.{name}": value for name, value in model[tower].items()}
        flat[f"{tower}.mlp_ratio"] = _mlp_size(model[tower])
    left_out = _NOT_BUILT if kind == CLIP else _NOT_BUILT | _TOKENIZER
    return {name: value for name, value in flat.items() if name.split(".")[-1] not in left_out}
