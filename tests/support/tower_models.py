"""Untrained models of every tower family."""

import json

import open_clip
import pytest
import timm
import torch

VISION = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": 24, "vocab_size": 600, "width": 32, "heads": 2, "layers": 3}
CONFIGS = {
    "clip": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
    "clip-quickgelu": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "layer-scale": {
        "embed_dim": 16,
        "vision_cfg": VISION | {"ls_init_value": 0.5},
        "text_cfg": TEXT | {"ls_init_value": 0.5},
    },
    "average-pool": {
        "embed_dim": 16,
        "vision_cfg": VISION | {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        "text_cfg": TEXT,
    },
    "custom-text": {"embed_dim": 16, "custom_text": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "siglip-like": {
        "embed_dim": 16,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
    "eva": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": "eva02_tiny_patch14_224",
            "timm_model_pretrained": False,
            "timm_pool": "token",
            "timm_proj": "linear",
            "image_size": 56,
        },
        "text_cfg": TEXT,
    },
    "coca": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2},
        "text_cfg": TEXT | {"embed_cls": True},
    },
    "resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 2, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": TEXT,
    },
}
CONFIGS["coca-corrected"] = CONFIGS["coca"]
# Text towers of Hugging Face: pooler, projection, and configuration.
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_MT5 = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 2,
    "num_decoder_layers": 1,
}
_NLLB = {
    "d_model": 32,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
}
HUGGING_FACE = {
    "bert": ("cls_pooler", "mlp", _BERT),
    "roberta": ("mean_pooler", "linear", _BERT),
    "xlm-roberta": ("mean_pooler", "mlp", _BERT),
    "mt5": ("mean_pooler", "mlp", _MT5),
    "m2m_100": ("cls_pooler", "linear", _NLLB),
}
CONFIGS |= {
    kind: {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {"hf_pooler_type": pooler, "hf_proj_type": projection},
    }
    for kind, (pooler, projection, _) in HUGGING_FACE.items()
}
# Arguments that shrink timm's models; the first matching prefix of the name applies.
WIDTH, SIDE = 48, 64
PLAIN = {"img_size": SIDE, "patch_size": 16, "embed_dim": WIDTH, "depth": 3, "num_heads": 2}
SMALL = {
    "vit_base_mci": {"img_size": SIDE, "depth": 2},
    "vit_relpos": PLAIN,
    "vitamin": {"img_size": SIDE, "depth": 2},
    "vit": PLAIN,
    "eva": PLAIN,
    "convnext": {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)},
    "fastvit_mci3": {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 32, 64, 128, 256)},
    "fastvit_mci4": {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 32, 64, 128, 256)},
    "fastvit": {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)},
    "swin": {
        "img_size": SIDE,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 2),
        "window_size": 4,
    },
}
# timm's towers that have no small variants.
LARGE = {
    "convnext": "convnext_tiny",
    "fastvit": "fastvit_mci0",
    "swin": "swin_tiny_patch4_window7_224",
    "relpos": "vit_relpos_small_patch16_224",
}
CONFIGS |= {
    kind: {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": name, "timm_model_pretrained": False, "image_size": SIDE},
        "text_cfg": TEXT,
    }
    for kind, name in LARGE.items()
}


def shrinking(create):
    """Return timm's `create_model` with the arguments that shrink."""

    def small(name, **arguments):
        sizes = next(sizes for start, sizes in SMALL.items() if name.startswith(start))
        return create(name, **arguments, **sizes)

    return small


def make(kind, folder):
    """Return an untrained model of one of the configurations; its files go to `folder`."""
    path, config = folder / f"test-{kind}.json", CONFIGS[kind]
    if kind in HUGGING_FACE:
        pytest.importorskip("transformers")
        about = {"model_type": kind, "vocab_size": 600, "pad_token_id": 0, "eos_token_id": 599}
        (folder / "config.json").write_text(json.dumps(about | HUGGING_FACE[kind][-1]))
        config = config | {"text_cfg": config["text_cfg"] | {"hf_model_name": str(folder)}}
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if kind in LARGE:
            patch.setattr(timm, "create_model", shrinking(timm.create_model))
        built = open_clip.create_model(path.stem, pretrained_text=False).eval()
    if kind == "coca-corrected":
        built.text.correct_cls_mask = True
    if isinstance(built.visual, open_clip.timm_model.TimmModel) and kind not in LARGE:
        # timm's models expect larger images, whatever the configuration says.
        built.visual.trunk.set_input_size(built.visual.image_size)
    for name, parameter in built.named_parameters():
        # Fresh projections and norms have zeros and ones, which would hide errors.
        if parameter.ndim < 2 and not name.startswith("logit"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return built
