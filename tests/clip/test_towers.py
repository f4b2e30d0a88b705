"""A split forward equals the model's own, for every tower family and every block."""

import functools

import pytest
import torch
import torch.nn.functional as F
from tower_models import CONFIGS, HUGGING_FACE, make

from slsgu_cli.clip.packing import packed
from slsgu_cli.clip.towers import (
    EMBED,
    HuggingFaceText,
    OpenClipText,
    WholeTower,
    text_tower,
    vision_tower,
)


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


@torch.no_grad()
def test_the_pooled_state_of_a_text_projects_to_its_feature(model):
    tower, tokens = text_tower(model), prompts()
    if not isinstance(tower, OpenClipText):
        pytest.skip("no tower of open_clip")
    states, rows = tower.states(tokens), torch.arange(len(tokens))
    x, projection = states[rows, tower.pooled_at(tokens)], tower.owner.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection
    expected = tower.features(tokens, tokens)
    torch.testing.assert_close(F.normalize(x, dim=-1), expected, atol=2e-6, rtol=1e-5)


def ends_texts(model):
    """Return whether no position behind the end of a text reaches it, by a causal mask."""
    text = getattr(model, "text", model)
    return getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None


def texts(rows=60, context=24):
    """Return prompts of which many begin alike: some all but the end, and some are others."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(5, 12, (rows, 6), generator=generator)
    words[: rows // 2, :3] = torch.tensor([7, 8, 9])
    tokens = torch.zeros(rows, context, dtype=torch.long)
    for row in range(rows):
        length = int(torch.randint(0, 7, (), generator=generator))
        tokens[row, 0], tokens[row, length + 1] = 598, 599
        tokens[row, 1 : length + 1] = words[row, :length]
    return torch.cat([tokens, tokens[:5], prompts()])


@pytest.mark.parametrize("kind", [texts, prompts, lambda: prompts(1)])
def test_packed_prompts_have_the_features_of_each_alone(kind, model):
    tower, tokens = text_tower(model), kind()
    together = packed(tower, tokens)
    assert (together is not None) == ends_texts(model)
    if together is None:
        return
    expected = tower.features(tokens, tokens)
    assert len(together.rows) <= int(tower.lengths(tokens).sum())
    with torch.no_grad():
        for stage in range(EMBED, tower.depth + 1):
            state = together.advance(tokens, tokens, EMBED, stage)
            found = together.features(state, tokens, stage)
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    names, parameters = zip(*getattr(model, "text", model).named_parameters(), strict=True)
    slopes = [
        torch.autograd.grad((features * weights).sum(), parameters, allow_unused=True)
        for features in (expected, together.features(tokens, tokens))
    ]
    for name, *pair in zip(names, *slopes, strict=True):
        if pair[0] is not None:
            torch.testing.assert_close(*pair, atol=2e-5, rtol=2e-4, msg=lambda m, n=name: n + m)


def test_packing_runs_common_prefixes_once(model):
    tower, tokens = text_tower(model), torch.zeros(40, 24, dtype=torch.long)
    tokens[:, :5] = torch.tensor([598, 60, 50, 40, 599])
    tokens[:, 3] += torch.arange(40)
    others = tokens.clone()
    others[:, 1] += torch.arange(40)
    if together := packed(tower, tokens):
        assert len(together.rows) == 3 + 40 * 2
        assert len(packed(tower, others).rows) == 1 + 40 * 4


def test_texts_are_trimmed_if_padding_has_no_influence(model):
    tower, full = text_tower(model), prompts()
    shortened = tower.trim(full).shape[1] < full.shape[1]
    assert shortened == (ends_texts(model) or isinstance(tower, HuggingFaceText))


@pytest.mark.parametrize("kind", [*HUGGING_FACE, "coca"])
@torch.no_grad()
def test_a_text_tower_of_unknown_structure_runs_whole(kind, tmp_path):
    model, tokens = make(kind, tmp_path), prompts()
    assert text_tower(model).exact_split
    if kind == "coca":
        model.text.transformer.resblocks[1].attn.add_zero_attn = True
    else:
        model.text.transformer.config.is_decoder = True
    tower = text_tower(model)
    assert isinstance(tower, WholeTower)
    expected = F.normalize(model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(tower.features(tower.trim(tokens), tokens), expected)


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
        assert tower.exact_split
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
            # Softmax takes no notice of what is added to all keys alike.
            inert = name.endswith(("key.bias", "k_proj.bias"))
            if "token_embedding" not in name and "logit" not in name and not inert:
                assert not torch.equal(features, changed), f"{name} acts nowhere"
