"""A split forward equals the model's own, for every tower family and every block."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F

from slsgu_cli.clip.towers import EMBED, WholeTower, text_tower, vision_tower

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
        "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False,
                       "timm_pool": "", "timm_proj": "linear", "image_size": 224},
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
    "eva": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "eva02_tiny_patch14_224", "timm_model_pretrained": False,
                       "timm_pool": "token", "timm_proj": "linear", "image_size": 224},
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
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": TEXT,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp("model"))


def make(kind, folder):
    """Return an untrained model of one of the configurations, by way of `folder`."""
    path = folder / f"test-{kind}.json"
    path.write_text(json.dumps(CONFIGS[kind]))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    built = open_clip.create_model(path.stem).eval()
    for name, parameter in built.named_parameters():
        # Fresh projections and norms are zeros and ones in places, which would hide errors.
        if parameter.ndim < 2 and not name.startswith("logit"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return built


def prompts(rows=5, context=24):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(rows, context, dtype=torch.long)
    for row in range(rows):
        length = int(torch.randint(2, 9, (), generator=generator))
        tokens[row, 1:length] = torch.randint(5, 590, (length - 1,), generator=generator)
        tokens[row, 0], tokens[row, length] = 598, 599
    return tokens


def pixels(model, rows=3):
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_vision_resumes_at_every_stage(model):
    tower, images = vision_tower(model), pixels(model)
    expected = F.normalize(model.encode_image(images), dim=-1)
    for stage in range(EMBED, tower.depth + 1):
        state = tower.advance(images, images, EMBED, stage)
        torch.testing.assert_close(
            tower.features(state, images, stage), expected, atol=2e-6, rtol=1e-5
        )


@torch.no_grad()
def test_text_resumes_at_every_stage_and_at_its_own_length(model):
    tower, full = text_tower(model), prompts()
    expected = F.normalize(model.encode_text(full), dim=-1)
    tokens = tower.trim(full)
    for stage in range(EMBED, tower.depth + 1):
        state = tower.advance(tokens, tokens, EMBED, stage)
        torch.testing.assert_close(
            tower.features(state, tokens, stage), expected, atol=2e-6, rtol=1e-5
        )


def test_causal_towers_shorten_and_others_do_not(model):
    tower, full = text_tower(model), prompts()
    shortened = tower.trim(full).shape[1] < full.shape[1]
    text = getattr(model, "text", model)
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    assert shortened == causal


def test_gradients_equal_the_models_own(model):
    images, tokens = pixels(model), prompts(3)
    model.zero_grad()
    (
        model.encode_image(images, normalize=True) * model.encode_text(tokens, normalize=True)
    ).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    vision, text = vision_tower(model), text_tower(model)
    short = text.trim(tokens)
    (vision.features(images, images) * text.features(short, short)).sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(
                parameter.grad, expected[name], atol=3e-6, rtol=2e-4, msg=lambda m, n=name: n + m
            )


@torch.no_grad()
def test_nothing_before_a_parameters_stage_depends_on_it(model):
    towers = [(vision_tower(model), pixels(model, rows=1)), (text_tower(model), prompts(2))]
    for tower, inputs in towers:
        if isinstance(tower, WholeTower):
            continue
        is_vision = inputs.ndim == 4
        for name, parameter in model.named_parameters():
            if name.startswith("visual.") != is_vision or name.startswith("logit"):
                continue
            stage = tower.stage_of(name)
            if 0 < stage < tower.depth - 1 and tower.depth > 6:
                continue  # the inner blocks of a deep tower are alike
            before = tower.advance(inputs, inputs, EMBED, stage)
            features = tower.features(inputs, inputs)
            original = parameter.data.clone()
            parameter.data += 0.3 * torch.randn_like(parameter)
            after = tower.advance(inputs, inputs, EMBED, stage)
            changed = tower.features(inputs, inputs)
            parameter.data = original
            assert torch.equal(before, after), name
            if "token_embedding" not in name and "logit" not in name:
                assert not torch.equal(features, changed), f"{name} acts nowhere"
