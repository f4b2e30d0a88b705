"""Each grouped loss is its plain formula, one mini-batch at a time."""

import math

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

from slsgu_cli.engine.gradient_pass import per_batch
from slsgu_cli.method.losses import contrastive, cosine_forget, sigmoid

SCALE, BIAS = 12.5, -3.0
# Pairs and mini-batch size: whole, ragged, a last batch of one pair, one short batch, single pairs.
CASES = [(12, 4), (11, 4), (9, 4), (3, 4), (3, 1)]


def plain_cosine(v, t, scale, bias):
    return sum(1 - a @ b for a, b in zip(v, t, strict=True)) / len(v)


def plain_contrastive(v, t, scale, bias):
    """Eq. 4: each image picks its text among the mini-batch's, each text its image."""
    total = 0.0
    for i in range(len(v)):
        own = torch.exp(scale * (v[i] @ t[i]))
        among_texts = sum(torch.exp(scale * (v[i] @ t[j])) for j in range(len(v)))
        among_images = sum(torch.exp(scale * (v[j] @ t[i])) for j in range(len(v)))
        total = total - (torch.log(own / among_texts) + torch.log(own / among_images)) / 2
    return total / len(v)


def plain_sigmoid(v, t, scale, bias):
    total = 0.0
    for i in range(len(v)):
        for j in range(len(v)):
            sign = 1 if i == j else -1
            total = total + torch.log(1 + torch.exp(-sign * (scale * (v[i] @ t[j]) + bias)))
    return total / len(v)


GROUPED = {
    "cosine": (lambda scale, bias: cosine_forget, plain_cosine),
    "contrastive": (lambda scale, bias: contrastive(scale), plain_contrastive),
    "sigmoid": (sigmoid, plain_sigmoid),
}


def leaves(pairs, seed=0):
    """Unit features, scale and bias, in fp64, that gradients can be taken of."""
    generator = torch.Generator().manual_seed(seed)
    shape = (pairs, 6)
    v, t = (
        F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(2)
    )
    scale, bias = (torch.tensor(value, dtype=torch.float64) for value in (SCALE, BIAS))
    return [value.requires_grad_() for value in (v, t, scale, bias)]


def gradients(values, inputs):
    found = torch.autograd.grad(values.sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize(("pairs", "size"), CASES)
@pytest.mark.parametrize("kind", sorted(GROUPED))
def test_grouped_is_one_batch_at_a_time(kind, pairs, size):
    make, plain = GROUPED[kind]
    grouped_inputs, plain_inputs = leaves(pairs), leaves(pairs)
    v, t, scale, bias = grouped_inputs
    grouped = per_batch(make(scale, bias), (v, t), size)
    v, t, scale, bias = plain_inputs
    starts = range(0, pairs, size)
    one_by_one = torch.stack([plain(v[i : i + size], t[i : i + size], scale, bias) for i in starts])
    assert grouped.shape == (math.ceil(pairs / size),)
    torch.testing.assert_close(grouped, one_by_one, rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(
        gradients(grouped, grouped_inputs), gradients(one_by_one, plain_inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_contrastive_is_open_clips():
    v, t, scale, _ = leaves(7)
    torch.testing.assert_close(contrastive(scale)(v, t), open_clip.loss.ClipLoss()(v, t, scale))


def test_sigmoid_is_open_clips():
    v, t, scale, bias = leaves(7)
    expected = open_clip.loss.SigLipLoss()(v, t, scale, bias)
    torch.testing.assert_close(sigmoid(scale, bias)(v, t), expected)


def test_mini_batches_do_not_see_each_other():
    v, t, scale, bias = leaves(12)
    for make, _ in GROUPED.values():
        loss = make(scale, bias)
        before = per_batch(loss, (v, t), 4)
        changed = v.detach().clone()
        changed[4:8] = changed[4:8].flip(0)
        after = per_batch(loss, (changed, t), 4)
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert not torch.equal(before[1], after[1])


def test_cosine_is_torchs():
    v, t, *_ = leaves(7)
    expected = (1 - F.cosine_similarity(v, t)).mean()
    torch.testing.assert_close(cosine_forget(v, t), expected)


def test_cosine_goes_from_0_for_equal_to_2_for_opposite():
    v = leaves(4)[0]
    assert cosine_forget(v, v).item() == pytest.approx(0, abs=1e-15)
    assert cosine_forget(v, -v).item() == pytest.approx(2)


def test_the_contrastive_loss_of_one_pair_is_zero():
    v, t, scale, _ = inputs = leaves(1)
    value = contrastive(scale)(v, t)
    assert value.item() == 0
    assert all(not g.any() for g in gradients(value, inputs[:3]))
