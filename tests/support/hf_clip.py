"""The tiny CLIP as transformers saves it."""

import json
from pathlib import Path

import tiny_clip
import tiny_targets
import torch


def config():
    """Return transformers' configuration of the tiny CLIP."""
    from transformers import CLIPConfig

    vision, text = tiny_clip.CONFIG["vision_cfg"], tiny_clip.CONFIG["text_cfg"]
    return CLIPConfig(
        projection_dim=tiny_clip.CONFIG["embed_dim"],
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "hidden_act": "gelu",
            "vocab_size": text["vocab_size"],
            "eos_token_id": 49407,
            "bos_token_id": 49406,
        },
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "hidden_act": "gelu",
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
    )


def untrained():
    """Return transformers' CLIPModel in the tiny CLIP's shape."""
    from transformers import CLIPModel

    return CLIPModel(config()).eval()


def model(state: dict[str, torch.Tensor]):
    """Return transformers' CLIPModel with the weights of an open_clip state dict."""
    built = untrained()
    built.load_state_dict(tiny_targets.transformers_weights(state))
    return built


def write_folder(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """Write a CLIPModel folder with the preprocessing of the tiny CLIP."""
    model(state).save_pretrained(folder)
    preprocess = tiny_clip.PREPROCESS
    told = {
        "image_mean": preprocess["mean"],
        "image_std": preprocess["std"],
        "resample": 3,
        "size": {"shortest_edge": tiny_clip.SIZE},
        "do_center_crop": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder
