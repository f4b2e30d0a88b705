"""Covariances are those of the inputs that open_clip's own modules see, position by position."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import timm
import tiny_clip
import torch
import torch.nn.functional as F
from tower_models import CONFIGS, make

from slsgu_cli.clip.towers import text_tower, vision_tower
from slsgu_cli.engine import applied_layers
from slsgu_cli.engine import covariance as covariance_module
from slsgu_cli.engine.covariance import InputCovariances, layer_sums
from slsgu_cli.method.layers import is_candidate
from slsgu_cli.records.directions import Statistic
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
    return layer_sums(Statistic.INPUTS, model, layers_of(model), block, spec=SPEC, device="cpu")


class Plain(dict):
    """Covariances by the definition: sums over the positions that each layer is applied to."""

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
        "visual.transformer.resblocks",
        model.visual.transformer.resblocks,
        x,
        None,
        everywhere,
        first,
    )[:, 0]
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


def test_covariances_match_the_inputs_of_open_clip_modules(model, block):
    expected = plain(model, block)
    found = found_by(model, block)
    assert set(found) == set(expected) == set(layers_of(model))
    for name, covariance in found.items():
        torch.testing.assert_close(covariance.mean(), expected[name], rtol=1e-4, atol=1e-5)


def test_the_rows_of_a_forward_do_not_change_covariances(model, block, monkeypatch):
    whole = found_by(model, block)
    monkeypatch.setitem(covariance_module.ROWS_PER_FORWARD, "cpu", 2)
    for name, covariance in found_by(model, block).items():
        assert covariance.count == pytest.approx(whole[name].count)
        torch.testing.assert_close(covariance.mean(), whole[name].mean(), rtol=1e-4, atol=1e-5)


def test_large_blocks_are_sampled_at_equal_distances(model, block, monkeypatch):
    monkeypatch.setattr(covariance_module, "MOST_ROWS", 4)
    rows = covariance_module.chosen_rows(ROWS)
    assert rows.tolist() == [0, 2, 4, 6]
    some = Block(4, block.tokens[rows], block.pixels[rows])
    few = found_by(model, block)
    for name, covariance in found_by(model, some).items():
        torch.testing.assert_close(covariance.mean(), few[name].mean())


@pytest.mark.parametrize("kind", ["siglip-like", "eva"])
def test_the_inputs_of_timm_towers_are_captured(kind, tmp_path):
    model = make(kind, tmp_path)
    layers = layers_of(model)
    inputs = InputCovariances(model, layers)
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
    assert set(layers) == set(inputs.covariances)
    assert any(name.startswith("visual.") for name in seen)
    for name, x in seen.items():
        torch.testing.assert_close(
            inputs.covariances[name].mean(), x.T @ x / len(x), rtol=1e-4, atol=1e-5
        )
        assert inputs.covariances[name].axis == 1


CONVOLUTIONS = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "dilation": 2, "padding": "same"},
    {"kernel_size": 2, "stride": 2, "dilation": 2},
    {"kernel_size": 2, "stride": 2, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4},
]


def windows_of(layer, x):
    """Return all that a convolution is applied to, (groups, windows, inputs), fp64: unit kernels.

    Of a convolution whose kernel is 1 at one entry and 0 elsewhere, that entry comes out.
    """
    inputs = layer.weight[0].numel()
    units = torch.eye(inputs, dtype=torch.float64).view(-1, *layer.weight.shape[1:])
    plain = torch.nn.Conv2d(
        layer.in_channels,
        layer.groups * inputs,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        False,
        layer.padding_mode,
        dtype=torch.float64,
    )
    plain.weight.data = units.repeat(layer.groups, 1, 1, 1)
    return (
        plain(x.double()).unflatten(1, (layer.groups, inputs)).permute(1, 0, 3, 4, 2).flatten(1, 3)
    )


def run_convolution(settings):
    """Return a convolution, what it is run on, and what was seen of its inputs."""
    layer = torch.nn.Conv2d(4, 8, bias=False, **settings)
    x = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    inputs = InputCovariances(layer, ["weight"])
    with torch.no_grad():
        with inputs:
            outputs = layer(x)
        torch.testing.assert_close(outputs, layer(x))
        return layer, windows_of(layer, x), inputs.covariances["weight"]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("entries", [1, 2**24])
@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_a_convolution_has_the_covariance_of_its_windows(settings, entries, monkeypatch):
    monkeypatch.setattr(applied_layers, "WINDOW_ENTRIES", entries)
    layer, windows, covariance = run_convolution(settings)
    expected = windows.mT @ windows / windows.shape[1]
    expected = expected if layer.groups > 1 else expected[0]
    assert covariance.axis == 1
    assert covariance.count == windows.shape[1]
    torch.testing.assert_close(covariance.mean(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_images_with_many_windows_are_sampled(groups, monkeypatch):
    monkeypatch.setattr(applied_layers, "MOST_POSITIONS", 20)
    _, windows, covariance = run_convolution({"kernel_size": 3, "padding": 1, "groups": groups})
    chosen = applied_layers.chosen_positions(72)
    assert len(set(chosen.tolist())) == 20
    assert (chosen == applied_layers.chosen_positions(72)).all()
    some = windows.unflatten(1, (3, 72))[:, :, chosen].flatten(1, 2)
    expected = (some.mT @ some / 60).squeeze(0)
    assert covariance.count == 60
    torch.testing.assert_close(covariance.mean(), expected, rtol=1e-5, atol=1e-6)


class Scale(torch.nn.Module):
    """A layer of which each entry scales a channel, channels first or last."""

    def __init__(self, shape):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6))
        self.shape = shape

    def forward(self, x):
        return self.weight.view(self.shape) * x


@pytest.mark.parametrize(
    ("layer", "axis"),
    [
        (torch.nn.BatchNorm2d(6), 1),
        (torch.nn.GroupNorm(3, 6), 1),
        (Scale((6, 1, 1)), 1),
        (Scale((1, 6, 1, 1)), 1),
        (Scale((6,)), 3),
    ],
)
def test_norms_and_scales_of_channels_have_mean_squared_inputs(layer, axis):
    layer.eval()
    generator = torch.Generator().manual_seed(0)
    for values in (layer.weight, *layer.buffers()):
        if values.is_floating_point():
            values.data = 0.5 + torch.rand(6, generator=generator)
    x = torch.randn(3, 6, 4, 5, generator=generator).movedim(1, axis)
    inputs = InputCovariances(layer, ["weight"])
    with torch.no_grad(), inputs:
        # The bias of a fresh norm is zero.
        outputs = layer(x).movedim(axis, 0).flatten(1).double()
    covariance = inputs.covariances["weight"]
    assert (covariance.axis, covariance.count) == (0, 60)
    found = covariance.mean() * layer.weight.detach().double() ** 2
    torch.testing.assert_close(found, outputs.square().mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("itself", "context"), [(True, 8), (False, 8), (False, 12)])
def test_the_inputs_of_fused_attention_are_captured(itself, context):
    """Of a model in evaluation mode PyTorch computes it by one kernel where it can."""
    attention = torch.nn.MultiheadAttention(8, 2, kdim=context, vdim=context, batch_first=True)
    attention = attention.eval()
    generator = torch.Generator().manual_seed(0)
    query, around = (torch.randn(3, n, d, generator=generator) for n, d in ((5, 8), (7, context)))
    around = query if itself else around
    layers = [name for name, _ in attention.named_parameters() if "weight" in name]
    inputs = InputCovariances(attention, layers)
    with torch.no_grad():
        with inputs:
            outputs = attention(query, around, around, need_weights=False)[0]
        plain = attention(query, around, around, need_weights=False)[0]
    torch.testing.assert_close(outputs, plain)
    q, k = (x.flatten(0, 1).double() for x in (query, around))
    expected = {"q": (q.T @ q, len(q)), "k": (k.T @ k, len(k)), "v": (k.T @ k, len(k))}
    if context == 8:
        total, count = (sum(each) / 3 for each in zip(*expected.values(), strict=True))
        torch.testing.assert_close(
            inputs.covariances["in_proj_weight"].mean(), total / count, rtol=1e-5, atol=1e-6
        )
    else:
        for letter, (total, count) in expected.items():
            found = inputs.covariances[f"{letter}_proj_weight"].mean()
            torch.testing.assert_close(found, total / count, rtol=1e-5, atol=1e-6)
    assert set(inputs.covariances) == set(layers)
    # The mean square of the outputs is what the covariance says of them.
    weight = attention.out_proj.weight.double()
    told = torch.einsum("oi,ij,oj->o", weight, inputs.covariances["out_proj.weight"].mean(), weight)
    assert not attention.out_proj.bias.any()
    torch.testing.assert_close(told, plain.double().square().mean((0, 1)), rtol=1e-5, atol=1e-6)


def test_only_the_first_position_of_a_resnet_pool_counts(tmp_path):
    pool = make("resnet", tmp_path).visual.attnpool
    layers = [name for name, _ in pool.named_parameters() if name.endswith("weight")]
    x = torch.randn(3, pool.q_proj.in_features, 1, 1, generator=torch.Generator().manual_seed(0))
    inputs = InputCovariances(pool, layers)
    with torch.no_grad():
        with inputs:
            outputs = pool(x)
        torch.testing.assert_close(outputs, pool(x))
        states = torch.stack([x.mean((2, 3)), x.flatten(2).mean(2)], 1) + pool.positional_embedding
        heads = pool.num_heads
        q, k, v = (
            layer(states).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer in (pool.q_proj, pool.k_proj, pool.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    first, every = states[:, 0], states.flatten(0, 1)
    applied = {"q_proj": first, "k_proj": every, "v_proj": every, "c_proj": mixed[:, 0]}
    assert set(inputs.covariances) == set(layers)
    for name, rows in applied.items():
        torch.testing.assert_close(
            inputs.covariances[f"{name}.weight"].mean(),
            (rows.T @ rows / len(rows)).double(),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("kind", ["coca", "resnet"])
def test_every_candidate_layer_has_a_covariance(kind, block, tmp_path):
    model = make(kind, tmp_path)
    tokens = np.pad(block.tokens % 600, ((0, 0), (0, 8)))
    layers = layers_of(model)
    assert set(found_by(model, Block(ROWS, tokens, block.pixels))) == set(layers)


def coca(folder, *, late):
    """Return a CoCa and the layer that what leaves its first attention enters.

    As its weights were trained, what hides the padding is one position too `late`.
    """
    model = make("coca", folder)
    model.text.correct_cls_mask = not late
    return model, "text.transformer.resblocks.0.mlp.c_fc"


def roberta(folder):
    """Return a model with a text tower of Hugging Face's, and such a layer."""
    return make("roberta", folder), "text.transformer.encoder.layer.0.intermediate.dense"


@pytest.mark.parametrize(
    "built",
    [partial(coca, late=True), partial(coca, late=False), roberta],
    ids=["late", "coca", "hf"],
)
def test_only_positions_that_influence_text_features_count(built, block, tmp_path):
    model, layer = built(tmp_path)
    tokens = np.where(block.tokens > 0, block.tokens % 500 + 1, 0)
    states = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: states.append(args[0])
    )
    features = model.encode_text(torch.from_numpy(tokens).long())
    hook.remove()
    chosen = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    (slopes,) = torch.autograd.grad((features * chosen).sum(), states)
    influences = slopes.abs().sum(-1) > 0
    assert 0 < influences.sum() < influences.numel()
    texts = [name for name in layers_of(model) if name.startswith("text.")]
    found = layer_sums(
        Statistic.INPUTS, model, texts, Block(ROWS, tokens, block.pixels), spec=SPEC, device="cpu"
    )
    assert set(found) == set(texts)
    x = states[0][influences].detach().double()
    covariance = found[f"{layer}.weight"]
    assert covariance.count == len(x)
    torch.testing.assert_close(covariance.mean(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["fastvit_t8", "test_convnext"])
def test_every_layer_of_a_convolutional_tower_has_a_covariance(kind):
    """The towers of MobileCLIP and ConvNeXt: in groups, strided, padded, with BatchNorm."""
    trunk = timm.create_model(kind, num_classes=0).eval()
    layers = layers_of(trunk)
    inputs = InputCovariances(trunk, layers)
    with torch.no_grad(), inputs:
        trunk(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert set(inputs.covariances) == set(layers)
    assert any(covariance.total.ndim == 3 for covariance in inputs.covariances.values())


def test_the_norms_of_t5_have_the_mean_squares_of_normalised_inputs():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    )
    encoder = transformers.T5EncoderModel(config).eval()
    layers = [name for name in layers_of(encoder) if "embed" not in name]
    inputs = InputCovariances(encoder, layers)
    entering = []
    norm = encoder.encoder.final_layer_norm
    norm.register_forward_pre_hook(lambda _, args: entering.append(args[0].double()))
    ids = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), inputs:
        encoder(ids)
    assert set(inputs.covariances) == set(layers)
    x = entering[0] * torch.rsqrt(entering[0].square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(
        inputs.covariances["encoder.final_layer_norm.weight"].mean(),
        x.square().mean((0, 1)),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("columns", [1, 255, 256, 257, 700, 1024])
def test_the_blockwise_gram_matrix_is_the_plain_product(rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    product = covariance_module.gram(x)
    assert torch.equal(product, product.T)
    torch.testing.assert_close(product, x.T @ x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_covariances_of_a_16_bit_model_are_summed_in_fp32_or_more(kind):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)).to(kind)
    # Sums of their squares are beyond fp16's largest number.
    x = (300 * torch.randn(64, 16)).to(kind)
    seen = InputCovariances(layers, ["1.weight"])
    with torch.no_grad(), seen:
        F.linear(x, layers[1].weight)
    exact = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(seen.covariances["1.weight"].mean(), exact, rtol=1e-5, atol=1e-2)
