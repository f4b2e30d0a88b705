"""Closed forms on the cross-attention of a UNet have the properties that their papers promise."""

import numpy as np
import pytest
import torch
from torch import nn

OUTPUTS, INPUTS = 7, 12


def drawn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@pytest.fixture
def layer():
    """A weight, keys of the concept and of the anchor, and the covariance of retained keys."""
    retained = drawn(40, INPUTS, seed=1)
    covariance = retained.T @ retained / len(retained)
    return drawn(OUTPUTS, INPUTS), drawn(3, INPUTS, seed=2), drawn(3, INPUTS, seed=3), covariance


@pytest.mark.parametrize("erase", [1.0, 100.0])
def test_oce_rotates_and_so_keeps_singular_values_and_the_angles_of_columns(layer, erase):
    from slsgu_cli.compare.baselines.oce import rotation

    weight, *_ = layer
    turn = rotation(*layer, erase)
    torch.testing.assert_close(turn @ turn.T, torch.eye(OUTPUTS, dtype=torch.double))
    assert float(torch.linalg.det(turn)) == pytest.approx(1)
    after = turn @ weight
    torch.testing.assert_close(*map(torch.linalg.svdvals, (after, weight)))
    torch.testing.assert_close(after.T @ after, weight.T @ weight)
    assert (after - weight).norm() > 0.01


def test_oce_maximises_the_trace_among_rotations(layer):
    from slsgu_cli.compare.baselines.oce import IDENTITY, PRESERVE, rotation

    weight, keys, anchors, covariance = (each.numpy() for each in layer)
    outputs = [weight @ each.T for each in (keys, anchors)]
    of_keys, of_anchors = (each @ np.linalg.pinv(each) for each in outputs)
    matrix = (
        -3 * of_keys @ (np.eye(OUTPUTS) - of_anchors)
        + PRESERVE * weight @ covariance @ weight.T
        + IDENTITY * weight @ weight.T
    )
    turn = rotation(*layer, 3.0).numpy()
    best = np.trace(turn.T @ matrix)
    generator = np.random.default_rng(4)
    for size in (1e-3, 1e-2, 1.0):
        for _ in range(20):
            skew = generator.normal(size=(OUTPUTS, OUTPUTS))
            other = torch.linalg.matrix_exp(torch.from_numpy(size * (skew - skew.T))).numpy()
            assert np.trace((other @ turn).T @ matrix) < best


def test_oce_without_erasing_changes_nothing(layer):
    from slsgu_cli.compare.baselines.oce import rotation

    torch.testing.assert_close(rotation(*layer, 0.0), torch.eye(OUTPUTS, dtype=torch.double))


def test_a_projector_ignores_lengths_and_repeated_columns():
    from slsgu_cli.compare.baselines.oce import projector

    columns = drawn(OUTPUTS, 3)
    repeated = torch.cat([columns, 1e6 * columns, columns], dim=1)
    torch.testing.assert_close(projector(repeated), columns @ torch.linalg.pinv(columns))


def test_values_of_cross_attention_are_replaced_and_nothing_else():
    from slsgu_cli.compare.cross_attention import edit_values

    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    torch.manual_seed(0)
    unet = nn.ModuleList(
        [
            attention(query_dim=8, heads=2, dim_head=4),
            attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4),
        ]
    )
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    edit_values(unet, lambda weight: 2 * weight)
    for name, value in unet.state_dict().items():
        factor = 2 if name == "1.to_v.weight" else 1
        torch.testing.assert_close(value, factor * before[name], rtol=0, atol=0)
