"""Models built on the tiny CLIP, in every layout that people have them in.

All hold the weights of one open_clip state dict. The layouts are written from a table of
names of their own, so that the package's mapping is tested against something else.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]
HIDDEN = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
          "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
PLAIN = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}


def transformers_weights(state: Weights) -> Weights:
    """Return an open_clip state dict as transformers' CLIPModel keeps it."""
    found = {}
    for name, value in state.items():
        if name in PLAIN:
            found[PLAIN[name]] = value
        elif name in ("text_projection", "visual.proj"):
            found["text_projection.weight" if name[0] == "t" else "visual_projection.weight"] = (
                value.T
            )
        else:
            tower = "vision_model" if name.startswith("visual.") else "text_model"
            number, rest = re.search(r"resblocks\.(\d+)\.(.*)", name).groups()
            prefix = f"{tower}.encoder.layers.{number}."
            if "in_proj" in rest:
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{prefix}self_attn.{letter}_proj.{rest[13:]}"] = part
            else:
                module, kind = rest.rsplit(".", 1)
                found[f"{prefix}{HIDDEN[module]}.{kind}"] = value
    return {name: value.clone().contiguous() for name, value in found.items()}


def tower(state: Weights, name: str, *, inner: bool = True) -> Weights:
    """Return one tower (`text` or `vision`) in transformers' names, its projection left out.

    With `inner`, names begin with `text_model.` or `vision_model.`, as transformers 4 wrote.
    """
    prefix = f"{name}_model."
    return {
        key if inner else key.removeprefix(prefix): value
        for key, value in transformers_weights(state).items()
        if key.startswith(prefix)
    }


def under(prefix: str, weights: Weights) -> Weights:
    """Return weights with a prefix before every name."""
    return {prefix + name: value for name, value in weights.items()}


def save(weights: Weights, path: Path) -> Path:
    """Write weights as safetensors, or by torch.save where the name asks for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in weights.items()}, path, {"format": "pt"})
    else:
        torch.save(weights, path)
    return path


def save_shards(weights: Weights, folder: Path, count: int, variant: str = "") -> None:
    """Write weights cut into shards so that neighbours in name lie apart, with their index."""
    names = sorted(weights)
    where = {}
    for number in range(count):
        file = f"model{variant}-{number + 1:05}-of-{count:05}.safetensors"
        own = names[number::count]
        save({name: weights[name] for name in own}, folder / file)
        where |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"model.safetensors.index{variant}.json").write_text(json.dumps(index))


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def pipeline(folder: Path, kind: str, encoders: dict[str, tuple[str, Weights]]) -> Path:
    """Write a diffusers pipeline of text encoders (class and weights) and a stand-in UNet."""
    index = {"_class_name": kind, "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {name: ["transformers", class_name] for name, (class_name, _) in encoders.items()}
    write_json(folder / "model_index.json", {**index, "safety_checker": [None, None]})
    save({"conv_in.weight": torch.ones(3, 3)}, folder / "unet/diffusion_pytorch_model.safetensors")
    for name, (class_name, weights) in encoders.items():
        write_json(folder / name / "config.json", {"architectures": [class_name]})
        save(weights, folder / name / "model.safetensors")
    return folder


def llava(folder: Path, state: Weights, prefix: str, *, shards: int = 0, **config) -> Path:
    """Write a LLaVA folder whose vision tower's names begin with `prefix`."""
    inner = prefix.endswith("vision_model.")
    own = prefix.removesuffix("vision_model.") if inner else prefix
    weights = under(own, tower(state, "vision", inner=inner))
    weights["language_model.model.layers.0.self_attn.q_proj.weight"] = torch.ones(4, 4)
    weights["multi_modal_projector.linear_1.weight"] = torch.ones(4, 4)
    write_json(folder / "config.json", {"model_type": "llava", "vision_feature_layer": -2} | config)
    if shards:
        save_shards(weights, folder, shards)
    else:
        save(weights, folder / "model.safetensors")
    return folder
