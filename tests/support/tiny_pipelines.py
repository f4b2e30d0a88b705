"""Tiny untrained diffusers pipelines with several text encoders, each as diffusers saves it.

The first CLIP has the given open_clip weights; the second is wider (`SECOND`).
"""

from pathlib import Path

import tiny_clip
import torch
from tiny_targets import transformers_weights

KINDS = ("sdxl", "sd3", "flux")
CONTEXT, WIDTH, T5_WIDTH = 16, 24, 72
SECOND = tiny_clip.CONFIG | {
    "embed_dim": 40,
    "text_cfg": tiny_clip.CONFIG["text_cfg"] | {"width": 32, "layers": 4},
}


def second_clip():
    """Return open_clip's model whose text tower is the second encoder."""
    return tiny_clip.fresh_model(SECOND, seed=1)


def text_encoder(name, config, state):
    """Return a text encoder of transformers with the weights of an open_clip state dict."""
    import transformers

    text = config["text_cfg"]
    built = getattr(transformers, name)(
        transformers.CLIPTextConfig(
            hidden_size=text["width"],
            intermediate_size=4 * text["width"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            max_position_embeddings=text["context_length"],
            hidden_act="gelu",
            vocab_size=text["vocab_size"],
            eos_token_id=49407,
            bos_token_id=49406,
            projection_dim=config["embed_dim"],
        )
    )
    theirs = transformers_weights(state)
    spelt = {
        key: key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
        for key in built.state_dict()
    }
    built.load_state_dict({key: theirs[name] for key, name in spelt.items()})
    return built


def clip_tokenizer():
    """Return CLIP's tokenizer without its merges, which are slow to read: one token per letter."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    letters = list(bytes_to_unicode().values())
    known = [*letters, *(f"{letter}</w>" for letter in letters)]
    ends = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    vocab = {word: number for number, word in enumerate(known)} | ends
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CONTEXT)


def t5():
    """Return a T5 encoder and a tokenizer of its characters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [(letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=CONTEXT)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=8,
            d_ff=32,
            num_heads=2,
            num_layers=1,
            feed_forward_proj="gated-gelu",
        )
        return T5EncoderModel(config).eval(), tokenizer


def write_pipeline(folder: Path, kind: str, state) -> Path:
    """Write a pipeline of a kind around the tiny CLIP with the weights `state`."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = {"sdxl": _sdxl, "sd3": _sd3, "flux": _flux}[kind](diffusers, state)
    made.save_pretrained(folder)
    return folder


def _vae(diffusers, channels, **config):
    return diffusers.AutoencoderKL(
        block_out_channels=(4,),
        norm_num_groups=1,
        latent_channels=channels,
        sample_size=8,
        **config,
    )


def _two(state, name):
    return {
        "text_encoder": text_encoder(name, tiny_clip.CONFIG, state),
        "text_encoder_2": text_encoder(
            "CLIPTextModelWithProjection", SECOND, second_clip().state_dict()
        ),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
    }


def _sdxl(diffusers, state):
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH + 32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 40,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(diffusers, 4),
        unet=unet,
        **_two(state, "CLIPTextModel"),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    )


def _sd3(diffusers, state):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=24 + 40,
    )
    encoder, tokenizer = t5()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(diffusers, 4, shift_factor=0.06, scaling_factor=1.5),
        **_two(state, "CLIPTextModelWithProjection"),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )


def _flux(diffusers, state):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    encoder, tokenizer = t5()
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(diffusers, 1, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=text_encoder("CLIPTextModel", tiny_clip.CONFIG, state),
        tokenizer=clip_tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
    )
