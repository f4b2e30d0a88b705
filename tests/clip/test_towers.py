"""A split forward equals the model's own, for every tower family and every block."""

import functools

import pytest
import torch
import torch.nn.functional as F
from tower_models import CONFIGS, make

from slsgu_cli.clip.towers import EMBED, WholeTower, text_tower, vision_tower


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp("model"))


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
        features = tower.features(inputs, inputs)
        before = functools.cache(functools.partial(tower.advance, inputs, inputs, EMBED))
        for name, parameter in model.named_parameters():
            if name.startswith("visual.") != is_vision or name.startswith("logit"):
                continue
            stage = tower.stage_of(name)
            if 0 < stage < tower.depth - 1 and tower.depth > 6:
                continue  # the inner blocks of a deep tower are alike
            untouched = before(stage)
            original = parameter.data.clone()
            parameter.data += 0.3 * torch.randn_like(parameter)
            after = tower.advance(inputs, inputs, EMBED, stage)
            changed = tower.features(inputs, inputs)
            parameter.data = original
            assert torch.equal(untouched, after), name
            if "token_embedding" not in name and "logit" not in name:
                assert not torch.equal(features, changed), f"{name} acts nowhere"
