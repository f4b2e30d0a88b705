"""Weights in int8: the bound on the error, and what is exact."""

import pytest
import torch

from slsgu_cli.verification.probes import LEVELS, output_axis, to_int8

SHAPES = pytest.mark.parametrize("shape", [(7, 12), (5, 3, 4, 4)])


def weights(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.05


def by_channel(values, axis):
    return values.movedim(axis, 0).flatten(1)


@SHAPES
@pytest.mark.parametrize("axis", [0, 1])
def test_no_weight_moves_by_more_than_half_a_level(shape, axis):
    weight = weights(*shape)
    moved = by_channel((to_int8(weight, axis) - weight).abs(), axis)
    level = by_channel(weight.abs(), axis).amax(dim=1) / LEVELS
    assert (moved <= level.unsqueeze(1) / 2 * (1 + 1e-5)).all()
    assert moved.max() > 0


@SHAPES
def test_each_channel_has_at_most_255_values_and_keeps_its_largest(shape):
    weight = weights(*shape)
    rows, before = by_channel(to_int8(weight, 0), 0), by_channel(weight, 0)
    for row, was in zip(rows, before, strict=True):
        levels = row / (was.abs().max() / LEVELS)
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
        assert levels.round().abs().max() == LEVELS
    torch.testing.assert_close(rows.abs().amax(dim=1), before.abs().amax(dim=1))


def test_what_is_quantised_already_stays_and_signs_turn_with_it():
    weight = weights(6, 40)
    once = to_int8(weight, 0)
    torch.testing.assert_close(to_int8(once, 0), once, rtol=1e-6, atol=0)
    assert torch.equal(to_int8(-weight, 0), -once)


def test_channels_do_not_see_each_other():
    weight = weights(4, 9)
    larger = weight.clone()
    larger[2] *= 1000
    assert torch.equal(to_int8(larger, 0)[[0, 1, 3]], to_int8(weight, 0)[[0, 1, 3]])


def test_a_channel_of_zeros_stays_zero():
    weight = weights(3, 5)
    weight[1] = 0
    assert torch.equal(to_int8(weight, 0)[1], torch.zeros(5))


def test_projections_that_stand_right_of_their_input_have_channels_in_columns():
    assert output_axis("visual.proj") == output_axis("text_projection") == 1
    assert output_axis("visual.transformer.resblocks.0.attn.in_proj_weight") == 0
    assert output_axis("transformer.resblocks.0.mlp.c_fc.weight") == 0
