"""Moments are those of the inputs that open_clip's own modules see, position by position."""

from dataclasses import dataclass

import numpy as np
import pytest
import tiny_clip
import torch
import torch.nn.functional as F
from tower_models import CONFIGS, make

from slsgu_cli.checkpoints.layers import is_candidate
from slsgu_cli.clip import processes
from slsgu_cli.clip.towers import text_tower, vision_tower
from slsgu_cli.method import moments
from slsgu_cli.method.moments import InputMoments, input_moments
from slsgu_cli.records.sets import InputSpec

ROWS, SIZE = 7, tiny_clip.SIZE
SPEC = InputSpec(SIZE, SIZE, (0.3, 0.4, 0.5), (0.2, 0.3, 0.4), "bicubic", "shortest", 0, "t", 16)


@dataclass
class Block:
    """Rows of images and captions of different lengths, as a data block gives them."""

    rows: int
    tokens: np.ndarray
    pixels: np.ndarray

    def take(self, indices):
        return self.pixels[indices]


@pytest.fixture(scope="module")
def block():
    rng = np.random.default_rng(0)
    tokens = np.zeros((ROWS, 16), np.int32)
    for row, length in enumerate(rng.integers(3, 16, ROWS)):
        tokens[row, :length] = [49406, *rng.integers(1, 900, length - 2), 49407]
    return Block(ROWS, tokens, rng.integers(0, 256, (ROWS, SIZE, SIZE, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model():
    return tiny_clip.fresh_model()


def layers_of(model):
    return [name for name, _ in model.named_parameters() if is_candidate(name)]


def found_by(model, block):
    return input_moments(model, layers_of(model), block, spec=SPEC, device="cpu")


class Plain(dict):
    """Moments by the definition: sums over the positions that each layer is applied to."""

    def add(self, name, inputs, share=1.0):
        x = inputs.reshape(-1, inputs.shape[-1]).double()
        total, count = self.get(name, (0.0, 0.0))
        own = x.square().sum(0) if ".ln_" in f".{name}" else x.T @ x
        self[name] = total + share * own, count + share * len(x)

    def blocks(self, prefix, blocks, x, mask, valid, pooled):
        """Run blocks by open_clip's own modules; `valid` and `pooled` choose positions."""
        for index, block in enumerate(blocks):
            name = f"{prefix}.{index}"
            last = index == len(blocks) - 1
            leaving = pooled if last else valid
            self.add(f"{name}.ln_1.weight", normed(x)[valid])
            h = block.ln_1(x)
            self.add(f"{name}.attn.in_proj_weight", h[valid], 2 / 3 if last else 1.0)
            if last:
                self.add(f"{name}.attn.in_proj_weight", h[pooled], 1 / 3)
            mixed = attention_values(block.attn, h, mask)
            self.add(f"{name}.attn.out_proj.weight", mixed[leaving])
            middle = x + block.attn.out_proj(mixed)
            torch.testing.assert_close(
                middle, x + block.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
            )
            self.add(f"{name}.ln_2.weight", normed(middle)[leaving])
            h = block.ln_2(middle)
            self.add(f"{name}.mlp.c_fc.weight", h[leaving])
            self.add(f"{name}.mlp.c_proj.weight", block.mlp[:2](h)[leaving])
            x = block(x, attn_mask=mask)
        return x


def normed(x):
    return F.layer_norm(x, x.shape[-1:])


def attention_values(attention, x, mask):
    """Return what the output projection of an attention is applied to."""
    rows, length, width = x.shape
    q, k, v = (
        part.reshape(rows, length, attention.num_heads, -1).transpose(1, 2)
        for part in F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    )
    weights = q @ k.transpose(-1, -2) / (width // attention.num_heads) ** 0.5
    weights = (weights if mask is None else weights + mask).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(rows, length, width)


@torch.no_grad()
def plain(model, block):
    found = Plain()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (SPEC.mean, SPEC.std))
    pixels = (torch.from_numpy(block.pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    patch = model.visual.conv1.kernel_size[0]
    found.add("visual.conv1.weight", F.unfold(pixels, patch, stride=patch).transpose(1, 2))
    entering = []
    hook = model.visual.ln_pre.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    x = model.visual._embeds(pixels)
    hook.remove()
    found.add("visual.ln_pre.weight", normed(entering[0]))
    everywhere, first = (slice(None),), (slice(None), 0)
    x = found.blocks(
        "visual.transformer.resblocks", model.visual.transformer.resblocks,
        x, None, everywhere, first,
    )[:, 0]  # fmt: skip
    found.add("visual.ln_post.weight", normed(x))
    found.add("visual.proj", model.visual.ln_post(x))
    ids = torch.from_numpy(block.tokens).long()
    ends = ids.argmax(-1)
    x = model.token_embedding(ids) + model.positional_embedding
    valid = torch.arange(ids.shape[1]) <= ends[:, None]
    pooled = torch.arange(ROWS), ends
    x = found.blocks(
        "transformer.resblocks", model.transformer.resblocks, x, model.attn_mask, valid, pooled
    )[pooled]
    found.add("ln_final.weight", normed(x))
    found.add("text_projection", model.ln_final(x))
    return {name: total / count for name, (total, count) in found.items()}


def test_moments_are_those_of_open_clips_own_modules(model, block):
    expected = plain(model, block)
    found = found_by(model, block)
    assert set(found) == set(expected) == set(layers_of(model))
    for name, moment in found.items():
        torch.testing.assert_close(moment.mean(), expected[name], rtol=1e-4, atol=1e-5)


def test_groups_of_rows_change_nothing(model, block, monkeypatch):
    whole = found_by(model, block)
    monkeypatch.setitem(moments.ROWS_PER_FORWARD, "cpu", 2)
    for name, moment in found_by(model, block).items():
        assert moment.count == pytest.approx(whole[name].count)
        torch.testing.assert_close(moment.mean(), whole[name].mean(), rtol=1e-4, atol=1e-5)


def test_of_many_rows_some_are_taken_at_equal_distances(model, block, monkeypatch):
    monkeypatch.setattr(moments, "MOST_ROWS", 4)
    rows = moments.chosen_rows(ROWS)
    assert rows.tolist() == [0, 2, 4, 6]
    some = Block(4, block.tokens[rows], block.pixels[rows])
    few = found_by(model, block)
    for name, moment in found_by(model, some).items():
        torch.testing.assert_close(moment.mean(), few[name].mean())


@pytest.mark.parametrize("kind", ["siglip-like", "eva"])
def test_towers_of_timm_show_their_inputs(kind, tmp_path):
    model = make(kind, tmp_path)
    layers = layers_of(model)
    inputs = InputMoments(model, layers)
    modules = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in layers
    }
    seen = {}
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2).double()})
        )
    size = CONFIGS[kind]["vision_cfg"]["image_size"]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(1, 500, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), inputs:
        vision_tower(model).features(pixels, pixels)
        text_tower(model).features(ids, ids)
    assert set(layers) == set(inputs.moments)
    assert any(name.startswith("visual.") for name in seen)
    for name, x in seen.items():
        torch.testing.assert_close(
            inputs.moments[name].mean(), x.T @ x / len(x), rtol=1e-4, atol=1e-5
        )
        assert inputs.moments[name].axis == 1


# In halves, and in whole blocks; in one piece.
@pytest.mark.parametrize("kind", ["clip", "siglip-like", "resnet"])
def test_a_sharded_model_has_the_same_moments(kind, block, group, tmp_path, monkeypatch):
    monkeypatch.setitem(moments.ROWS_PER_FORWARD, "cpu", 3)
    model = make(kind, tmp_path)
    times = CONFIGS[kind]["vision_cfg"]["image_size"] // SIZE
    tokens = np.pad(block.tokens % 600, ((0, 0), (0, 8)))
    block = Block(ROWS, tokens, block.pixels.repeat(times, 1).repeat(times, 2))
    expected = found_by(model, block)
    processes.shard(model, [*vision_tower(model).blocks, *text_tower(model).blocks], "cpu")
    found = found_by(model, block)
    assert found.keys() == expected.keys() != set()
    for name, moment in found.items():
        assert moment.axis == expected[name].axis
        assert moment.count == pytest.approx(expected[name].count)
        torch.testing.assert_close(moment.total, expected[name].total, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"kernel_size": 2, "stride": 2}, True),
        ({"kernel_size": 1}, True),
        ({"kernel_size": 3, "padding": 1}, False),
        ({"kernel_size": 2, "stride": 2, "groups": 2}, False),
        ({"kernel_size": 3, "padding": "same"}, False),
    ],
)
def test_a_convolution_of_patches_that_do_not_overlap_is_a_linear_map(settings, seen):
    layer = torch.nn.Conv2d(4, 6, bias=False, **settings)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = InputMoments(layer, ["weight"])
    with torch.no_grad():
        with inputs:
            found = layer(x)
        torch.testing.assert_close(found, layer(x))
    assert set(inputs.moments) == ({"weight"} if seen else set())
    if seen:
        # The mean square of the outputs is what the moment says of them.
        rows = layer.weight.detach().reshape(6, -1).double()
        told = torch.einsum("oi,ij,oj->o", rows, inputs.moments["weight"].mean(), rows)
        torch.testing.assert_close(told, found.double().square().mean((0, 2, 3)), rtol=1e-4,
                                   atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("columns", [1, 255, 256, 257, 700, 1024])
def test_a_symmetric_product_by_blocks_is_the_plain_product(rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    product = moments.gram(x)
    assert torch.equal(product, product.T)
    torch.testing.assert_close(product, x.T @ x, rtol=1e-5, atol=1e-4)
