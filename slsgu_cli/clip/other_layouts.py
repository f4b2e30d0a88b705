"""A folder of a model in another layout: of transformers, open_clip or ComfyUI."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slsgu_cli.checkpoints.apply import STANDARD_NAME
from slsgu_cli.checkpoints.configurations import CONFIG, OPEN_CLIP, config_of
from slsgu_cli.checkpoints.conversion import OtherLayout
from slsgu_cli.checkpoints.destinations import README
from slsgu_cli.checkpoints.edits import Edit
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.layouts import WeightSet
from slsgu_cli.checkpoints.model_card import hub_id
from slsgu_cli.checkpoints.naming_schemes import NamingScheme, TowerPlace, tensor_places
from slsgu_cli.checkpoints.targets import Target
from slsgu_cli.checkpoints.transformers_families import (
    CLIP,
    CLIP_TEXT,
    FAMILIES,
    GELU,
    family_of,
    transformers_config,
)
from slsgu_cli.checkpoints.transformers_inputs import PREPROCESSOR, transformers_preprocess
from slsgu_cli.clip.loading import without_weights
from slsgu_cli.clip.model_folder import (
    TOKENIZER_FILES,
    hub_tokenizer,
    present_files,
    tokenizer_files,
)
from slsgu_cli.clip.models import ResolvedModel
from slsgu_cli.clip.tokenizers import TOKENIZER_CONFIG
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.method import ModelLayout, Tower
from slsgu_cli.text import listed

WEIGHTS = "model.safetensors"
# Files to copy from the original folder, whatever its layout.
COPIED = (README, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
# The text encoders of ComfyUI by blocks and width, with their activation.
COMFY_TOWERS = {
    (12, 768): ("CLIP ViT-L", "quick_gelu"),
    (24, 1024): ("OpenCLIP ViT-H", "gelu"),
    (32, 1280): ("OpenCLIP ViT-bigG", "gelu"),
}
COMFY_HEAD_WIDTH = 64
PROJECTION = "text_projection"
START, END = "<|startoftext|>", "<|endoftext|>"


def other_layout(
    wanted: ModelLayout | None,
    model: ResolvedModel | None,
    target: Target,
    edits: Sequence[Edit],
    scratch: Path,
) -> OtherLayout | None:
    """Return how to write a target in the `wanted` layout; None if it already has that layout.

    `model` is the target if it is a whole CLIP. New files are written to `scratch`. Raises
    UsageError or InputError if the layout cannot express the model.
    """
    if wanted is None:
        return None
    if wanted is ModelLayout.COMFY:
        return _for_comfy(model, target, edits)
    if model is None:
        raise UsageError(
            f"{target.path} is not a whole CLIP, which --format {wanted} needs",
            hint="leave --format out to write it in its own layout",
        )
    if (wanted is ModelLayout.HF) is (model.scheme is NamingScheme.TRANSFORMERS):
        return None
    layout = _for_transformers if wanted is ModelLayout.HF else _for_open_clip
    made = layout(model, scratch)
    copied = present_files(model.folder, COPIED) if model.folder else {}
    return replace(made, weights=model.weights, files={**made.files, **copied})


def _for_transformers(model: ResolvedModel, scratch: Path) -> OtherLayout:
    """Return how to write an open_clip model for transformers."""
    config = model.config
    if config["vision_cfg"].get("timm_pool") == "map":
        visual: Any = without_weights(model).visual
        rest = {k: v for k, v in config["vision_cfg"].items() if k != "timm_model_name"}
        config = config | {"vision_cfg": rest | (trunk_sizes(visual.trunk) or config["vision_cfg"])}
    family = FAMILIES[family_of(config)]
    made, lacks = transformers_config(config)
    processor, other = transformers_preprocess(config, model.preprocess)
    if lacks or other:
        reasons = [f"{field} {value}" for field, value in lacks.items()]
        reasons += [other] if other else []
        raise InputError(
            f"{model.spec} cannot be written for transformers, where its {family.name} has no "
            f"place for {listed(reasons, separator='; ')}",
            hint="leave --format out to write it for open_clip",
        )
    texts = {CONFIG: _json(made), PREPROCESSOR: _json(processor)}
    if hub_tokenizer(model) is None:
        texts |= clip_tokenizer(config["text_cfg"].get("context_length", 77))
    prefixes = {Tower.TEXT: "text_model.", Tower.VISION: "vision_model."}
    towers = tuple(TowerPlace(tower, family.names, prefixes[tower]) for tower in Tower)
    files = tokenizer_files(model, scratch)
    return OtherLayout("transformers", WEIGHTS, family.names, towers, files=files, texts=texts)


def clip_tokenizer(context_length: int) -> dict[str, str]:
    """Return the files of CLIP's own tokenizer for transformers."""
    import open_clip

    tokenizer = open_clip.SimpleTokenizer()
    words = list(tokenizer.encoder)[: -len((START, END))]
    tokens = {word: number for number, word in enumerate([*words, START, END])}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
    }
    return {
        "vocab.json": json.dumps(tokens, ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(merges) + "\n",
        TOKENIZER_CONFIG: _json(config),
    }


def _for_open_clip(model: ResolvedModel, scratch: Path) -> OtherLayout:
    """Return what open_clip loads a model of transformers from."""
    config, family = model.config, FAMILIES[family_of(model.config)]
    text, is_siglip = config["text_cfg"], family.names is NamingScheme.SIGLIP
    if family.names is NamingScheme.BERT:
        raise InputError(
            f"{model.spec} cannot be written for open_clip, which builds a BERT from the "
            "name of a repository only, not from a model folder",
            hint="leave --format out to write it for transformers",
        )
    files = {}
    if "tokenizer_kwargs" in text and model.folder is not None:
        # open_clip then loads a Hugging Face tokenizer; in a folder, the one of the folder.
        named = hub_id(model.spec, model.folder) or model.folder.resolve().name
        config = config | {"text_cfg": text | {"hf_tokenizer_name": named}}
        files = present_files(model.folder, TOKENIZER_FILES)
    if is_siglip:
        config = config | {"vision_cfg": _named_by_timm(model)}
    content = _json({"model_cfg": config, "preprocess_cfg": model.preprocess})
    prefixes = {Tower.TEXT: "text." if is_siglip else "", Tower.VISION: ""}
    towers = tuple(TowerPlace(tower, NamingScheme.OPEN_CLIP, prefixes[tower]) for tower in Tower)
    return OtherLayout(
        "open_clip",
        STANDARD_NAME["safetensors"],
        family.names,
        towers,
        files=files,
        texts={OPEN_CLIP: content},
    )


def _named_by_timm(model: ResolvedModel) -> dict[str, Any]:
    """Return the vision_cfg of a SigLIP with timm's name for a tower of its sizes.

    open_clip builds such towers by timm's names only. Raises InputError if no name fits.
    """
    import timm
    import torch

    vision = model.config["vision_cfg"]
    wanted = _compared(vision)
    like = f"*_patch{vision['patch_size']}_siglip_{vision['image_size']}"
    for name in timm.list_models(like):
        with torch.device("meta"):
            trunk = timm.create_model(name, num_classes=0, global_pool="map")
        sizes = trunk_sizes(trunk)
        if sizes is not None and _compared(sizes) == wanted:
            return {
                "image_size": vision["image_size"],
                "timm_model_name": name,
                "timm_model_pretrained": False,
                "timm_pool": "map",
                "timm_proj": "none",
            }
    act = "tanh's approximation of GELU" if wanted["act_kwargs"] != GELU["gelu"] else "exact GELU"
    raise InputError(
        f"{model.spec} cannot be written for open_clip, which builds SigLIP's vision tower by "
        f"timm's names: none is of {wanted['layers']} blocks {wanted['width']} wide for images "
        f"of {wanted['image_size']} in patches of {wanted['patch_size']} with {act}",
        hint="leave --format out to write it for transformers",
    )


_ACTS = {"GELU": GELU["gelu"], "GELUTanh": GELU["gelu_pytorch_tanh"]}


def trunk_sizes(trunk: Any) -> dict[str, Any] | None:
    """Return the sizes of a plain ViT of timm as in a model_cfg; None for another tower."""
    if type(trunk).__name__ != "VisionTransformer":
        return None
    block, patches = trunk.blocks[0], trunk.patch_embed
    act = _ACTS.get(type(block.mlp.act).__name__)
    if act is None or len({*patches.img_size}) > 1 or len({*patches.patch_size}) > 1:
        return None
    return {
        "image_size": patches.img_size[0],
        "patch_size": patches.patch_size[0],
        "layers": len(trunk.blocks),
        "width": trunk.embed_dim,
        "head_width": trunk.embed_dim // block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / trunk.embed_dim,
        "act_kwargs": act,
    }


def _compared(vision: Mapping[str, Any]) -> dict[str, Any]:
    names = ("image_size", "patch_size", "layers", "width", "head_width", "act_kwargs")
    inside = round(vision["width"] * vision["mlp_ratio"])
    return {name: vision[name] for name in names} | {"inside": inside}


def _for_comfy(model: ResolvedModel | None, target: Target, edits: Sequence[Edit]) -> OtherLayout:
    """Return how to write a text encoder for ComfyUI. Raises InputError if ComfyUI lacks it."""
    layers = [edit.header.layer for edit in edits]
    if others := [layer for layer in layers if Layer.parse(layer).tower is not Tower.TEXT]:
        raise InputError(f"{others[0]} is not in a text encoder, and ComfyUI loads only those")
    encoders = [one for one in target.encoders if any(w.towers for w in one.copies)]
    copies = [weights for encoder in encoders for weights in encoder.copies]
    if model is not None:
        copies = [weights for weights in copies if model.weights in weights.files]
    why_not = [why for weights in copies if (why := _why_not_comfy(weights, model)) is not None]
    if len(why_not) == len(copies):
        known = ", ".join(
            f"{name} ({blocks} blocks, {width} wide, {act})"
            for (blocks, width), (name, act) in COMFY_TOWERS.items()
        )
        raise InputError(f"ComfyUI has no place for {target.path}: {why_not[0]}; it knows {known}")
    towers = (TowerPlace(Tower.TEXT, NamingScheme.TRANSFORMERS, "text_model."),)
    return OtherLayout(
        "ComfyUI",
        "",
        NamingScheme.TRANSFORMERS,
        towers,
        optional=(PROJECTION,),
        weights=None if model is None else model.weights,
    )


def _why_not_comfy(weights: WeightSet, model: ResolvedModel | None) -> str | None:
    """Return why ComfyUI would run a text encoder differently; None if it would not."""
    tower = weights.tower(Tower.TEXT)
    if tower.scheme is NamingScheme.SIGLIP:
        return "it is a SigLIP"
    if tower.scheme is NamingScheme.BERT:
        return "its text tower is a BERT"

    def shape(name: str) -> tuple[int, ...]:
        places = tensor_places(name, tower)
        return weights.shape(places) if weights.holds(places) else ()

    sizes = weights.blocks(tower), *shape("token_embedding.weight")[1:]
    if sizes not in COMFY_TOWERS:
        return f"its text tower is of {' blocks, '.join(map(str, sizes))} wide"
    name, act = COMFY_TOWERS[sizes]
    vocabulary, width = shape("token_embedding.weight")
    positions, projection = shape("positional_embedding")[0], shape(PROJECTION)
    activation, heads, other = _text_of(weights, model)
    reasons = {
        f"its MLPs have {activation}, and those of {name} {act}": activation != act,
        f"it has {heads} heads": heads != width // COMFY_HEAD_WIDTH,
        f"it has {vocabulary} tokens": vocabulary != CLIP_TEXT["vocab_size"],
        f"it has {positions} positions": positions != CLIP_TEXT["max_position_embeddings"],
        f"it projects to {projection[-1:]} values": projection not in ((), (width, width)),
        f"its text tower has {', '.join(other)}": bool(other),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _text_of(weights: WeightSet, model: ResolvedModel | None) -> tuple[str, int, list[str]]:
    """Return a text tower's activation and heads, and its other differences from CLIP's."""
    if model is None:
        config: dict[str, Any] = {**CLIP_TEXT, **config_of(weights.path.parent / CONFIG)}
        return str(config["hidden_act"]), int(config["num_attention_heads"]), []
    config = model.config | {"vision_cfg": {}, "init_logit_bias": None}
    made, lacks = transformers_config(config)
    other = [f"{field} {value}" for field, value in lacks.items() if field.startswith("text_cfg")]
    if family_of(config) != CLIP:
        other += ["another end of text"]
    text = made.get("text_config", CLIP_TEXT)
    return text["hidden_act"], text["num_attention_heads"], other


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
