"""A tiny SigLIP as transformers saves it, and the same model under open_clip's names."""

import json
from pathlib import Path

import open_clip
import tiny_clip
import torch

TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 10,
    "projection_size": 36,
    "eos_token_id": 1,
    "bos_token_id": 1,
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
IN_TEXT = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
IN_VISION = {
    "attn.proj": "self_attn.out_proj",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

# Words of captions and prompts, besides colours and shapes.
WORDS = ["a", "picture", "photo", "drawing", "of", "the", "itap"]


def model():
    """Return an untrained SiglipModel whose biases and norms are not 0 and 1."""
    from transformers import SiglipConfig, SiglipModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).eval()
        for parameter in built.parameters():
            if parameter.ndim < 2:
                parameter.data += 0.1 * torch.randn_like(parameter)
    built.logit_scale.data.fill_(2.0)
    built.logit_bias.data.fill_(-3.0)
    return built


def write_folder(folder: Path) -> Path:
    """Write a SiglipModel folder with a tokenizer of whole words."""
    model().save_pretrained(folder)
    told = {
        "size": {"height": tiny_clip.SIZE, "width": tiny_clip.SIZE},
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer for the words of the tiny CLIP's captions; it ends texts with 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = ["[PAD]", "[EOS]", "[UNK]", *WORDS, *tiny_clip.COLOURS, *tiny_clip.SHAPES]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(known)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    )
    fast.save_pretrained(folder)


def in_open_clip(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors or gradients of a SiglipModel under open_clip's and timm's names."""
    found = {name: theirs[name].reshape(()) for name in ("logit_scale", "logit_bias")}
    text, vision = "text_model.", "vision_model."
    found["text.token_embedding.weight"] = theirs[f"{text}embeddings.token_embedding.weight"]
    found["text.positional_embedding"] = theirs[f"{text}embeddings.position_embedding.weight"]
    found["visual.trunk.pos_embed"] = theirs[f"{vision}embeddings.position_embedding.weight"][None]
    found["visual.trunk.attn_pool.latent"] = theirs[f"{vision}head.probe"]
    modules = {
        "text.ln_final": f"{text}final_layer_norm",
        "text.text_projection": f"{text}head",
        "visual.trunk.patch_embed.proj": f"{vision}embeddings.patch_embedding",
        "visual.trunk.norm": f"{vision}post_layernorm",
        "visual.trunk.attn_pool.proj": f"{vision}head.attention.out_proj",
        "visual.trunk.attn_pool.norm": f"{vision}head.layernorm",
        "visual.trunk.attn_pool.mlp.fc1": f"{vision}head.mlp.fc1",
        "visual.trunk.attn_pool.mlp.fc2": f"{vision}head.mlp.fc2",
    }
    for kind in ("weight", "bias"):
        pool = theirs[f"{vision}head.attention.in_proj_{kind}"]
        width = len(pool) // 3
        found[f"visual.trunk.attn_pool.q.{kind}"] = pool[:width]
        found[f"visual.trunk.attn_pool.kv.{kind}"] = pool[width:]
        for ours, block, fused, inside in (
            ("text.transformer.resblocks", text, f"attn.in_proj_{kind}", IN_TEXT),
            ("visual.trunk.blocks", vision, f"attn.qkv.{kind}", IN_VISION),
        ):
            for number in range(2):
                prefix = f"{block}encoder.layers.{number}."
                parts = [theirs[f"{prefix}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                found[f"{ours}.{number}.{fused}"] = torch.cat(parts)
                for one, other in inside.items():
                    found[f"{ours}.{number}.{one}.{kind}"] = theirs[f"{prefix}{other}.{kind}"]
        for one, other in modules.items():
            found[f"{one}.{kind}"] = theirs[f"{other}.{kind}"]
    return found


def open_clips(state: dict[str, torch.Tensor]):
    """Return open_clip's module with the given weights; its vision tower is built by hand."""
    from timm.models.vision_transformer import VisionTransformer

    width, heads = VISION["hidden_size"], VISION["num_attention_heads"]
    trunk = VisionTransformer(
        img_size=VISION["image_size"],
        patch_size=VISION["patch_size"],
        embed_dim=width,
        depth=VISION["num_hidden_layers"],
        num_heads=heads,
        class_token=False,
        global_pool="map",
        mlp_ratio=VISION["intermediate_size"] / width,
        num_classes=0,
        act_layer="gelu_tanh",
    )
    text = {
        "context_length": TEXT["max_position_embeddings"],
        "vocab_size": TEXT["vocab_size"],
        "width": TEXT["hidden_size"],
        "heads": TEXT["num_attention_heads"],
        "layers": TEXT["num_hidden_layers"],
        "mlp_ratio": TEXT["intermediate_size"] / TEXT["hidden_size"],
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    }
    small = {"layers": 1, "width": 32, "head_width": 32, "image_size": 8, "patch_size": 8}
    built = open_clip.CustomTextCLIP(TEXT["projection_size"], small, text, init_logit_bias=-10)
    built.visual = trunk
    named = {name.replace("visual.trunk.", "visual."): value for name, value in state.items()}
    built.load_state_dict(named)
    return built.eval()
