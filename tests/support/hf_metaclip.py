"""A tiny MetaCLIP 2 as transformers saves it: a CLIP with another tokenizer and end of text."""

from pathlib import Path

import hf_siglip
import tiny_clip
import torch

EOS = 1
TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 10,
    "hidden_act": "quick_gelu",
    "eos_token_id": EOS,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 36,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": tiny_clip.SIZE,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}


def model():
    """Return transformers' MetaClip2Model, untrained."""
    from transformers import MetaClip2Config, MetaClip2Model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MetaClip2Config(text_config=TEXT, vision_config=VISION, projection_dim=20)
        return MetaClip2Model(config).eval()


def write_folder(folder: Path) -> Path:
    """Write a MetaClip2Model folder with a tokenizer of whole words."""
    model().save_pretrained(folder)
    hf_siglip.write_tokenizer(folder)
    return folder
