"""A tiny Chinese CLIP as transformers saves it: CLIP's vision tower and a BERT."""

import json
from pathlib import Path

import hf_siglip
import tiny_clip
import tiny_targets
import torch

POSITIONS, PROJECTION = 20, 20
TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 36,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": tiny_clip.SIZE,
    "patch_size": 8,
}
# The Chinese comma and the English one.
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "，", ",", "一", "只", "蓝", "红", "环"]


def model(**text):
    """Return an untrained ChineseCLIPModel whose biases and norms are not 0 and 1."""
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ChineseCLIPConfig(
            text_config=TEXT | text, vision_config=VISION, projection_dim=PROJECTION
        )
        built = ChineseCLIPModel(config).eval()
        for parameter in built.parameters():
            if parameter.ndim < 2:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return built


def write_folder(folder: Path, **text) -> Path:
    """Write a ChineseCLIPModel folder as its authors do, with a vocabulary as its tokenizer."""
    model(**text).save_pretrained(folder)
    side = {"height": tiny_clip.SIZE, "width": tiny_clip.SIZE}
    told = {
        "image_processor_type": "ChineseCLIPImageProcessor",
        "size": side,
        "crop_size": side,
        "do_center_crop": True,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    words = [*WORDS, *hf_siglip.WORDS, *tiny_clip.COLOURS, *tiny_clip.SHAPES]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


def in_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors or gradients of open_clip's module under transformers' names."""
    plain = {name: value for name, value in state.items() if not name.startswith("text.")}
    found = tiny_targets.transformers_weights(plain)
    for name in state.keys() - plain.keys():
        theirs = name.replace("text.transformer.", "text_model.")
        found[theirs.replace("text.proj.", "text_projection.")] = state[name]
    return found
