"""What `apply --target` wrote, by the libraries that run it, against open_clip's edited CLIP."""

import hf_clip
import pytest
import torch
from safetensors.torch import load_file
from tiny_targets import transformers_weights

from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import resolve
from slsgu_cli.engine.apply import apply
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.options import ApplyRequest
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.blocks import DataBlock

LAYERS = (
    "transformer.resblocks.1.attn.in_proj_weight",
    "transformer.resblocks.1.attn.in_proj_weight.v",
    "transformer.resblocks.0.mlp.c_fc.weight",
)
KINDS = {
    "StableDiffusionPipeline": {"text_encoder": "CLIPTextModel"},
    "StableDiffusionXLPipeline": {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    },
}


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="pip install 'slsgu[targets]' brings diffusers")


@pytest.fixture(scope="module")
def state(shared_world):
    return load_file(shared_world.folder / "open_clip_model.safetensors")


def encoder(name, state):
    """Return one of transformers' text encoders with the weights of an open_clip state dict."""
    import transformers

    config = hf_clip.config().text_config
    config.projection_dim = len(state["text_projection"].T)
    built = getattr(transformers, name)(config)
    theirs = transformers_weights(state)
    built.load_state_dict({key: theirs[spelt(key)] for key in built.state_dict()})
    return built


def spelt(key):
    """Return a text encoder's name of a weight as a CLIPModel has it."""
    return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request, diffusers, state, tmp_path_factory):
    """A tiny pipeline, saved by diffusers; the first of SDXL's encoders has other weights."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 32),
        cross_attention_dim=24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
    names = KINDS[request.param]
    foreign = {key: value * 1.25 for key, value in state.items()}
    parts = {
        key: encoder(name, state if key == [*names][-1] else foreign) for key, name in names.items()
    }
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    nothing = dict.fromkeys(["safety_checker", "feature_extractor", "tokenizer"])
    if "XL" in request.param:
        nothing = dict.fromkeys(["tokenizer", "tokenizer_2"])
    made = getattr(diffusers, request.param)(
        vae=vae, unet=unet, scheduler=scheduler, **parts, **nothing
    )
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    made.save_pretrained(folder)
    return folder


def hidden(model, texts):
    """Return what enters the last block, leaves the last norm, and is pooled, by open_clip."""
    x = model.token_embedding(texts) + model.positional_embedding
    *first, last = model.transformer.resblocks
    for block in first:
        x = block(x, attn_mask=model.attn_mask)
    return x, model.ln_final(last(x, attn_mask=model.attn_mask)), model.encode_text(texts)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_pipeline_conditions_as_open_clip_does(pipeline, diffusers, world, tmp_path, layer):
    def applied(out, **where):
        request = ApplyRequest(
            names=[world.name],
            out=tmp_path / out,
            layer=layer,
            step=4.0,
            direction=Direction.GRADIENT,
            **where,
        )
        apply(world.store, request)
        return tmp_path / out

    def opened(folder):
        return diffusers.DiffusionPipeline.from_pretrained(folder, tokenizer=None)

    edited = load(resolve(ModelSpec(f"local-dir:{applied('clip', model=world.model)}")))
    loaded, untouched = opened(applied("sd", target=pipeline)), opened(pipeline)
    pooled = hasattr(loaded, "text_encoder_2")
    ours = loaded.text_encoder_2 if pooled else loaded.text_encoder
    original = untouched.text_encoder_2 if pooled else untouched.text_encoder
    expected = transformers_weights(edited.state_dict())
    assert all(torch.equal(v, expected[spelt(key)]) for key, v in ours.state_dict().items())
    texts = torch.from_numpy(DataBlock.open(world.store, world.manifest.forget).tokens[:5]).long()
    with torch.no_grad():
        entering, leaving, projected = hidden(edited, texts)
        found, before = (each(texts, output_hidden_states=True) for each in (ours, original))
    close = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(found.hidden_states[-2], entering, **close)
    torch.testing.assert_close(found.last_hidden_state, leaving, **close)
    assert (found.last_hidden_state - before.last_hidden_state).abs().max() > 1e-2
    if pooled:
        torch.testing.assert_close(found.text_embeds, projected, **close)
        one, two = (each.text_encoder.state_dict() for each in (loaded, untouched))
        assert all(torch.equal(one[key], two[key]) for key in two)
