"""The gradient pass gives what a plain loop over mini-batches with open_clip gives."""

import gc
import weakref
from dataclasses import dataclass, field

import numpy as np
import open_clip
import pytest
import tiny_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from slsgu_cli.clip import batches, models, tokenizers
from slsgu_cli.clip.towers import OpenClipVision
from slsgu_cli.engine import gradient_pass
from slsgu_cli.engine.gradient_pass import GradientPass
from slsgu_cli.errors import InputError
from slsgu_cli.records.method import Precision
from slsgu_cli.records.options import PassOptions
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock

SIGLIP = {"custom_text": True, "init_logit_bias": -2.0}
WORDS = ("a red circle", "some blue square there", "ring", "the white pole and a bar", "green")


@dataclass
class Rows:
    """Pairs in memory, read as a data block is."""

    rows: int
    seed: int = 0
    pictures: np.ndarray = field(init=False)
    tokens: np.ndarray = field(init=False)
    keys: list[str] = field(init=False)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.pictures = rng.integers(0, 256, (self.rows, 32, 32, 3), dtype=np.uint8)
        texts = [f"{WORDS[i % len(WORDS)]} {i}" for i in range(self.rows)]
        tokenize = open_clip.SimpleTokenizer(context_length=16)
        self.tokens = tokenize(texts).numpy().astype(np.int32)
        self.keys = [f"row-{i:03d}" for i in range(self.rows)]

    has_images = True
    anchors = None

    def images(self, start, stop):
        return self.pictures[start:stop]

    content_of = images


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders of a CLIP and of a model with the sigmoid loss, both untrained."""
    root = tmp_path_factory.mktemp("models")
    return {
        "contrastive": tiny_clip.write_folder(root / "clip"),
        "sigmoid": tiny_clip.write_folder(root / "siglip", **SIGLIP),
    }


@pytest.fixture
def spec(tiny_model):
    return tokenizers.input_spec(models.resolve(tiny_model))


def load(folder):
    return open_clip.create_model(f"local-dir:{folder}").eval()


def plain_losses(model, loss, block, spec, size):
    """Yield the loss of one mini-batch after another, the way a training loop would."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    dtype = model.logit_scale.dtype
    for start in range(0, block.rows, size):
        stop = min(start + size, block.rows)
        images = torch.from_numpy(block.images(start, stop)).permute(0, 3, 1, 2) / 255
        v = model.encode_image(((images - mean) / std).to(dtype), normalize=True)
        t = model.encode_text(torch.from_numpy(block.tokens[start:stop]).long(), normalize=True)
        if loss == "cosine":
            yield (1 - F.cosine_similarity(v, t)).mean()
        elif loss == "contrastive":
            yield ClipLoss()(v, t, model.logit_scale.exp())
        else:
            yield SigLipLoss()(v, t, model.logit_scale.exp(), model.logit_bias)


def plain_gradient(model, loss, block, spec, size=16):
    """Return the mean gradient over mini-batches, and the mean loss."""
    model.zero_grad()
    values = []
    for value in plain_losses(model, loss, block, spec, size):
        value.backward()
        values.append(value.item())
    gradients = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy() / len(values)
        for name, p in model.named_parameters()
    }
    return gradients, sum(values) / len(values)


def run(model, loss, block, spec, **options):
    prepared = GradientPass(model, loss, spec=spec, options=PassOptions(**options))
    (gradient,), mean_loss = prepared.run(block, "test")
    return gradient, mean_loss


def assert_equal(found, expected, relative=1e-5):
    """Compare each parameter's gradient as a whole, against the largest where it vanishes."""
    assert set(found) == set(expected)
    floor = 1e-3 * max(np.linalg.norm(value) for value in expected.values())
    for name, value in expected.items():
        length = max(np.linalg.norm(value), floor)
        error = np.linalg.norm(found[name].astype(float) - value)
        # The scale's gradient is a sum of many pairs that nearly cancels.
        allowed = 10 * relative if name == "logit_scale" else relative
        assert error <= allowed * length, f"{name}: {error / length:.2g}"


@pytest.fixture(scope="module")
def plain(folders):
    """The plain loop's gradients of 61 pairs, for every loss."""
    spec = tokenizers.input_spec(models.resolve(tiny_spec(folders["contrastive"])))
    block = Rows(61)
    found = {}
    for loss in ("cosine", "contrastive", "sigmoid"):
        model = load(folders["sigmoid" if loss == "sigmoid" else "contrastive"])
        found[loss] = plain_gradient(model, loss, block, spec)
    return found


def tiny_spec(folder):
    return models.ModelSpec(f"local-dir:{folder}")


# At most this many pairs a forward: one mini-batch, some, more than there are.
@pytest.mark.parametrize("pairs", [1, 40, 1024])
@pytest.mark.parametrize("loss", ["cosine", "contrastive", "sigmoid"])
def test_stacked_mini_batches_give_the_gradient_of_a_plain_loop(
    loss, pairs, folders, plain, spec, listener, monkeypatch
):
    monkeypatch.setitem(gradient_pass.BEST_PAIRS, "cpu", pairs)
    model = load(folders["sigmoid" if loss == "sigmoid" else "contrastive"])
    found, mean_loss = run(model, loss, Rows(61), spec)
    expected, expected_loss = plain[loss]
    assert mean_loss == pytest.approx(expected_loss, rel=1e-5)
    assert_equal(found, expected)
    assert all(value.dtype == np.float32 for value in found.values())
    assert not any("recomputed" in text for text in listener.heard)


def plain_squares(model, loss, block, spec, size=16):
    """Return the mean over mini-batches of each squared gradient."""
    total = {name: np.zeros(p.shape) for name, p in model.named_parameters()}
    values = list(plain_losses(model, loss, block, spec, size))
    for value in values:
        model.zero_grad()
        value.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.numpy().astype(float) ** 2
    return {name: value / len(values) for name, value in total.items()}


@pytest.mark.parametrize("loss", ["cosine", "contrastive"])
def test_squares_are_those_of_a_plain_loop(loss, folders, plain, spec):
    model = load(folders["contrastive"])
    prepared = GradientPass(model, loss, spec=spec, options=PassOptions())
    (gradient, squares), mean_loss = prepared.run(Rows(61), "test", squares=True)
    assert_equal(gradient, plain[loss][0])
    assert mean_loss == pytest.approx(plain[loss][1], rel=1e-5)
    assert_equal(squares, plain_squares(model, loss, Rows(61), spec), relative=1e-4)
    # The square of the mean is another thing: the mini-batches differ.
    assert (squares["visual.proj"] > gradient["visual.proj"] ** 2).mean() > 0.9


# A mini-batch of this model keeps about 2.8 MiB, a block at a time less.
@pytest.mark.parametrize(("budget", "pairs"), [(1, 16), (3, 16), (6.5, 32), (64, 61)])
def test_a_memory_budget_limits_the_pairs_of_a_forward(
    budget, pairs, folders, plain, spec, listener, monkeypatch
):
    monkeypatch.setitem(gradient_pass.BEST_PAIRS, "cpu", 64)
    seen = short_of_memory(monkeypatch, 128)
    model, budget_bytes = load(folders["contrastive"]), int(budget * 2**20)
    found, mean_loss = run(model, "contrastive", Rows(61), spec, memory_budget=budget_bytes)
    assert max(seen) == pairs
    assert mean_loss == pytest.approx(plain["contrastive"][1], rel=1e-5)
    assert_equal(found, plain["contrastive"][0])
    recomputed = any("recomputed block by block" in text for text in listener.heard)
    assert recomputed == (budget == 1)


@pytest.mark.parametrize("loss", ["cosine", "contrastive"])
def test_a_gradient_has_the_same_bytes_with_any_memory(loss, folders, spec, monkeypatch):
    model, block = load(folders["contrastive"]), Rows(157, seed=2)
    expected, mean_loss = run(model, loss, block, spec, memory_budget=1 << 30)
    squared = GradientPass(model, loss, spec=spec, options=PassOptions())
    short = [run(model, loss, block, spec, memory_budget=budget) for budget in (1, 3 << 20)]
    monkeypatch.setattr(gradient_pass, "spare", lambda device: 1)
    short.append(run(model, loss, block, spec))
    (beside, _), beside_loss = squared.run(block, "test", squares=True)
    for found, found_loss in [*short, (beside, beside_loss)]:
        assert found_loss == mean_loss
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pass_frees_its_activations(folders, spec):
    model, outputs = load(folders["contrastive"]), []
    for module in model.modules():
        module.register_forward_hook(lambda *call: outputs.append(weakref.ref(call[-1])))
    run(model, "contrastive", Rows(20), spec)
    gc.collect()
    assert outputs
    assert [output for output in outputs if output() is not None] == []


@dataclass
class Stopping:
    """Save sums at every chance, resume from them, and interrupt the run at batch `stop`."""

    stop: int | None = None
    done: int = 0
    sums: dict = field(default_factory=dict)
    due: bool = True

    def read(self, batches):
        return self.done, self.sums

    def write(self, sums, *, done, batches):
        self.done, self.sums = done, {name: value.copy() for name, value in sums.items()}
        if done == self.stop:
            raise KeyboardInterrupt


# At the end of the first chunk of 8 mini-batches, and at the end of the last.
@pytest.mark.parametrize("stop", [8, 10])
def test_a_stopped_pass_resumes_to_the_same_bytes(stop, folders, spec):
    model, block = load(folders["contrastive"]), Rows(157, seed=2)
    prepared = GradientPass(model, "contrastive", spec=spec, options=PassOptions())
    expected, expected_loss = prepared.run(block, "test", squares=True)
    saved = Stopping(stop)
    with pytest.raises(KeyboardInterrupt):
        prepared.run(block, "test", saved, squares=True)
    saved.stop = None
    means, mean_loss = prepared.run(block, "test", saved, squares=True)
    assert mean_loss == expected_loss
    for mine, other in zip(means, expected, strict=True):
        for name, value in other.items():
            np.testing.assert_array_equal(mine[name], value, err_msg=name)


def test_sums_that_are_not_finite_are_not_saved(folders, spec, monkeypatch):
    monkeypatch.setattr(gradient_pass, "CHUNK", 2)
    model, block = load(folders["contrastive"]), Rows(61)
    model.token_embedding.weight.data[40_000] = 1e30
    block.tokens[40, 1] = 40_000
    saved = Stopping()
    with pytest.raises(InputError, match="not finite in mini-batch 2"):
        GradientPass(model, "cosine", spec=spec, options=PassOptions()).run(block, "test", saved)
    assert saved.done == 2


@pytest.mark.parametrize(("rows", "size"), [(7, 16), (16, 16), (33, 16), (20, 19), (5, 2)])
def test_the_last_mini_batch_may_have_any_size(rows, size, folders, spec):
    block = Rows(rows, seed=rows)
    for loss in ("cosine", "contrastive"):
        model = load(folders["contrastive"])
        expected, expected_loss = plain_gradient(model, loss, block, spec, size)
        found, mean_loss = run(model, loss, block, spec, batch_size=size)
        assert mean_loss == pytest.approx(expected_loss, rel=1e-5)
        assert_equal(found, expected)


def test_texts_of_any_length_keep_their_order(folders, plain, spec, monkeypatch):
    monkeypatch.setitem(batches.TEXTS_PER_FORWARD, "cpu", 7)
    found, _ = run(load(folders["contrastive"]), "contrastive", Rows(61), spec)
    assert_equal(found, plain["contrastive"][0])


# bf16 has 8 bits; the residual stream stays fp32.
@pytest.mark.parametrize(("loss", "bound"), [("cosine", 0.02), ("contrastive", 0.05)])
def test_half_precision_is_close(loss, bound, folders, plain, spec):
    model = load(folders["contrastive"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found, mean_loss = run(
        model, loss, Rows(61), spec, precision=Precision.BF16, memory_budget=3 << 20
    )
    assert mean_loss == pytest.approx(plain[loss][1], rel=0.02)
    whole, expected = (
        np.concatenate([gradients[name].ravel() for name in sorted(gradients)])
        for gradients in (found, plain[loss][0])
    )
    assert 0 < np.linalg.norm(whole - expected) < bound * np.linalg.norm(expected)
    assert all(value.dtype == np.float32 for value in found.values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_precision_of_matrix_products_is_restored():
    backend = torch.backends.cuda.matmul
    before = backend.allow_tf32
    with gradient_pass.arithmetic(Precision.TF32):
        assert backend.allow_tf32 and torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError), gradient_pass.arithmetic(Precision.FP32):
        assert not backend.allow_tf32
        raise KeyError
    assert backend.allow_tf32 == before


@torch.no_grad()
def test_ascending_the_stored_gradient_separates_images_from_captions(demo_world):
    """The store holds +grad(1 - cos): up along it the forget pairs' cosines fall."""
    world = demo_world
    block = DataBlock.open(world.store, world.manifest.forget)
    model = load(world.folder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (world.manifest.input.mean,) * 2)
    images = (torch.from_numpy(block.images(0, 12)).permute(0, 3, 1, 2) / 255 - mean) / std
    tokens = torch.from_numpy(block.tokens[:12]).long()

    def cosine():
        v, t = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        return float((v * t).sum(-1).mean())

    before = cosine()
    layers = [
        "visual.conv1.weight",
        "visual.transformer.resblocks.3.attn.in_proj_weight",
        "visual.proj",
        "transformer.resblocks.0.mlp.c_fc.weight",
        "transformer.resblocks.7.ln_2.weight",
        "text_projection",
    ]
    for layer, gradient in world.store.read_tensors(
        Artifact.GRADIENT.path(world.pointer.forget), layers
    ).items():
        parameter = model.get_parameter(layer)
        original = parameter.data
        step = 0.01 * float(original.norm()) / float(np.linalg.norm(gradient))
        parameter.data = original + step * torch.from_numpy(gradient)
        up = cosine()
        parameter.data = original - step * torch.from_numpy(gradient)
        down = cosine()
        parameter.data = original
        assert up < before - 1e-4 < before + 1e-4 < down, layer


def assert_blames(error, first, last, block, size=16):
    text = str(error.value)
    assert f"mini-batch {first // size} (rows {first} to {last})" in text
    named = [key for key in block.keys if key in text]
    assert named == block.keys[first : last + 1]
    assert error.value.hint


@pytest.mark.parametrize(
    ("layer", "value"), [("visual.conv1.weight", float("nan")), ("logit_scale", float("inf"))]
)
def test_weights_that_are_not_finite_are_refused(layer, value, folders, spec):
    model, block = load(folders["contrastive"]), Rows(40)
    model.get_parameter(layer).data.reshape(-1)[0] = value
    with pytest.raises(InputError, match="not finite") as error:
        run(model, "contrastive", block, spec)
    assert_blames(error, 0, 15, block)


@pytest.mark.parametrize("pairs", [16, 128])
@pytest.mark.parametrize("row", [3, 31, 39])
def test_the_mini_batch_that_is_not_finite_is_named(row, pairs, folders, spec, monkeypatch):
    monkeypatch.setitem(gradient_pass.BEST_PAIRS, "cpu", pairs)
    model, block = load(folders["contrastive"]), Rows(40)
    word = block.tokens[row, 1] = 40_000  # a word that no other row has
    model.token_embedding.weight.data[word] = 1e30
    with pytest.raises(InputError, match="not finite") as error:
        run(model, "cosine", block, spec)
    assert_blames(error, row // 16 * 16, min(row // 16 * 16 + 15, 39), block)


def short_of_memory(monkeypatch, limit, *, checkpointed=None):
    """Let forwards of more than `limit` images fail as on a full GPU."""
    embed = OpenClipVision.embed
    seen = []

    def guarded(tower, inputs):
        rows = inputs.shape[0]
        allowed = checkpointed if checkpointed and tower.checkpointing else limit
        if rows > allowed:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        seen.append(rows)
        return embed(tower, inputs)

    monkeypatch.setattr(OpenClipVision, "embed", guarded)
    return seen


def test_a_pass_that_runs_out_of_memory_continues_with_fewer_pairs(
    folders, plain, spec, listener, monkeypatch
):
    monkeypatch.setitem(gradient_pass.BEST_PAIRS, "cpu", 64)
    seen = short_of_memory(monkeypatch, 32)
    found, mean_loss = run(load(folders["contrastive"]), "contrastive", Rows(61), spec)
    assert_equal(found, plain["contrastive"][0])
    assert mean_loss == pytest.approx(plain["contrastive"][1], rel=1e-5)
    assert max(seen) <= 32
    assert any("out of memory: continuing with 32 pairs" in text for text in listener.heard)


def test_a_chunk_that_runs_out_of_memory_is_run_again(folders, plain, spec, monkeypatch):
    monkeypatch.setitem(gradient_pass.BEST_PAIRS, "cpu", 32)
    embed, calls = OpenClipVision.embed, []

    def guarded(tower, inputs):
        calls.append(inputs.shape[0])
        if len(calls) == 3:  # the first is a probe: the second group of pairs fails
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return embed(tower, inputs)

    monkeypatch.setattr(OpenClipVision, "embed", guarded)
    found, _ = run(load(folders["contrastive"]), "contrastive", Rows(61), spec)
    # Their chunk is run again, with fewer pairs.
    assert calls == [16, 32, 29, 16, 16, 16, 13]
    assert_equal(found, plain["contrastive"][0])


def test_a_backward_that_runs_out_of_memory_adds_no_gradients(folders, plain, spec, monkeypatch):
    monkeypatch.setitem(gradient_pass.BEST_PAIRS, "cpu", 32)
    group, calls = GradientPass._group, []

    def guarded(self, images, ids):
        values = group(self, images, ids)
        calls.append(values.numel())
        if len(calls) == 2:  # when what it is to fail at has been added
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return values

    monkeypatch.setattr(GradientPass, "_group", guarded)
    found, _ = run(load(folders["contrastive"]), "contrastive", Rows(61), spec)
    assert calls == [2, 2, 1, 1, 1, 1]
    assert_equal(found, plain["contrastive"][0])


def test_a_mini_batch_too_large_for_the_device_is_recomputed_block_by_block(
    folders, plain, spec, listener, monkeypatch
):
    short_of_memory(monkeypatch, 15, checkpointed=16)
    found, _ = run(load(folders["contrastive"]), "contrastive", Rows(61), spec)
    assert_equal(found, plain["contrastive"][0])
    assert any("recomputed block by block" in text for text in listener.heard)


def test_a_mini_batch_that_never_fits_is_an_error(folders, spec, monkeypatch):
    short_of_memory(monkeypatch, 15)
    with pytest.raises(InputError, match="one mini-batch of 16 pairs does not fit") as error:
        run(load(folders["contrastive"]), "contrastive", Rows(61), spec)
    assert "--batch-size" in error.value.hint


@pytest.mark.slow
def test_gradients_of_the_embedded_model(demo_world):
    """The stored gradients of a trained model, through sets and store."""
    world = demo_world
    model = load(world.folder)
    for role, loss in (("forget", "cosine"), ("retain", "contrastive")):
        block = DataBlock.open(world.store, getattr(world.manifest, role))
        expected, _ = plain_gradient(model, loss, block, world.manifest.input)
        found = world.store.read_tensors(Artifact.GRADIENT.path(getattr(world.pointer, role)))
        # The pairs of a trained model nearly cancel, which leaves fp32 fewer digits.
        assert_equal(found, expected, relative=5e-5)
