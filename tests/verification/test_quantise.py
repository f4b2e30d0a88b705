"""Weights in 8 and 4 bits, compared with plain loops."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from slsgu_cli.verification.checks.quantise import (
    LEVELS,
    nf4_levels,
    output_axis,
    to_fp8,
    to_int4,
    to_int8,
    to_nf4,
)


def weights(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.05


def by_channel(values, axis):
    return values.movedim(axis, 0).flatten(1)


def test_a_channel_of_zeros_stays_zero():
    weight = weights(3, 5)
    weight[1] = 0
    assert torch.equal(to_int8(weight, 0)[1], torch.zeros(5))


def test_projections_that_stand_right_of_their_input_have_channels_in_columns():
    assert output_axis("visual.proj") == output_axis("text_projection") == 1
    assert output_axis("visual.transformer.resblocks.0.attn.in_proj_weight") == 0
    assert output_axis("transformer.resblocks.0.mlp.c_fc.weight") == 0


def plain_int8(values):
    scale = max(map(abs, values)) / LEVELS
    return [round(v / scale) * scale for v in values]


def plain_int4(values, *, symmetric):
    """Round one group as it is written down."""
    if symmetric:
        scale = max(map(abs, values)) / 7
        return [round(v / scale) * scale for v in values]
    least, most = min(0.0, *values), max(0.0, *values)
    scale = (most - least) / 15
    zero = round(-least / scale)
    return [(min(max(round(v / scale) + zero, 0), 15) - zero) * scale for v in values]


def plain_nf4(values):
    scale = max(map(abs, values))
    levels = nf4_levels().tolist()
    return [min(levels, key=lambda level, v=v: abs(v / scale - level)) * scale for v in values]


def by_groups(weight, axis, size, plain):
    """Round `size` inputs of a channel at a time in a plain loop."""
    rows = []
    for row in by_channel(weight, axis).double().tolist():
        groups = [row[start : start + size] for start in range(0, len(row), size)]
        rows.append([value for group in groups for value in plain(group)])
    return torch.tensor(rows).float()


@pytest.mark.parametrize("shape", [(7, 12), (5, 3, 4, 4)])
@pytest.mark.parametrize("axis", [0, 1])
def test_int8_is_the_plain_loop(shape, axis):
    weight = weights(*shape)
    found = by_channel(to_int8(weight, axis), axis)
    torch.testing.assert_close(found, by_groups(weight, axis, weight.numel(), plain_int8))


@pytest.mark.parametrize("shape", [(3, 200), (5, 64), (4, 3, 7, 7)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_is_the_plain_loop(shape, axis, size, symmetric):
    weight = weights(*shape)
    if not symmetric:
        weight = weight + 0.03
    found = to_int4(weight, axis, group=size, symmetric=symmetric)
    assert found.shape == weight.shape
    plain = by_groups(weight, axis, size, partial(plain_int4, symmetric=symmetric))
    torch.testing.assert_close(by_channel(found, axis), plain, atol=1e-6, rtol=1e-5)
    levels = {len(group.unique()) for row in by_channel(found, axis) for group in row.split(size)}
    assert max(levels) <= (15 if symmetric else 16)
    assert max(levels) > min(8, found.numel() // found.shape[axis] // 2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_keeps_groups_of_one_sign_and_of_zeros(symmetric):
    weight = torch.stack([torch.linspace(0.1, 0.4, 64), torch.zeros(64), -torch.ones(64)])
    found = to_int4(weight, 0, group=64, symmetric=symmetric)
    torch.testing.assert_close(found[1:], weight[1:])
    assert (found[0] - weight[0]).abs().max() <= 0.4 / (7 if symmetric else 15) / 2 + 1e-6


def test_nf4_has_the_numbers_of_qlora():
    published = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
    torch.testing.assert_close(nf4_levels(), torch.tensor(published), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(3, 200), (4, 3, 7, 7)])
@pytest.mark.parametrize("axis", [0, 1])
def test_nf4_is_the_plain_loop(shape, axis):
    weight = weights(*shape)
    found = by_channel(to_nf4(weight, axis), axis)
    torch.testing.assert_close(found, by_groups(weight, axis, 64, plain_nf4))
    assert torch.equal(to_nf4(torch.zeros(2, 70), 0), torch.zeros(2, 70))


def e4m3():
    """Return every number of e4m3 (1 sign, 4 exponent and 3 mantissa bits, bias 7)."""
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    positive = [m / 8 * 2.0**-6 for m in range(8)] + normal[:-1]
    return sorted({*positive, *(-value for value in positive)})


@pytest.mark.parametrize("axis", [0, 1])
def test_fp8_is_the_nearest_number_of_a_plain_list(axis):
    numbers = torch.tensor(e4m3())
    assert (len(numbers), float(numbers.max())) == (253, 448)
    weight = weights(6, 40)
    found = by_channel(to_fp8(weight, axis), axis)
    for row, was in zip(found, by_channel(weight, axis), strict=True):
        scale = was.abs().max() / 448
        nearest = numbers[(was.unsqueeze(1) / scale - numbers).abs().argmin(dim=1)]
        torch.testing.assert_close(row, nearest * scale)
    assert torch.equal(to_fp8(torch.zeros(2, 5), 0), torch.zeros(2, 5))


def test_fewer_bits_round_more():
    weight = weights(16, 256)
    rounded = [
        to_int8(weight, 0),
        to_fp8(weight, 0),
        to_nf4(weight, 0),
        to_int4(weight, 0, group=64, symmetric=True),
    ]
    errors = [float((values - weight).norm()) for values in rounded]
    assert all(first < second for first, second in pairwise(errors))
