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


@pytest.mark.parametrize("names", [("to_v",), ("to_k", "to_v")])
def test_layers_of_cross_attention_are_replaced_and_nothing_else(names):
    from slsgu_cli.compare.cross_attention import edit_layers

    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    torch.manual_seed(0)
    unet = nn.ModuleList(
        [
            attention(query_dim=8, heads=2, dim_head=4),
            attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4),
        ]
    )
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    edit_layers(unet, names, lambda weight: 2 * weight)
    for name, value in unet.state_dict().items():
        factor = 2 if name in [f"1.{each}.weight" for each in names] else 1
        torch.testing.assert_close(value, factor * before[name], rtol=0, atol=0)


def test_speed_keeps_the_values_of_retained_and_of_fixed_keys_exactly(layer):
    from slsgu_cli.compare.baselines.speed import constrained, null_space

    weight, keys, anchors, _ = layer
    retained, fixed = drawn(4, INPUTS, seed=5), drawn(2, INPUTS, seed=6)
    space = null_space(retained, 1e-9)
    assert int(space.trace().round()) == INPUTS - 4
    change = constrained(weight, keys, anchors, space, fixed)
    zeros = torch.zeros(OUTPUTS, dtype=torch.double)
    for key in (*retained, *fixed):
        torch.testing.assert_close(change @ key, zeros)
    assert change.norm() > 0.01
    # Nor is a fixed key moved that the null space does not contain.
    same = constrained(weight, keys, anchors, space, torch.cat([fixed, retained[:1]]))
    torch.testing.assert_close(same, change)


def test_speed_is_the_constrained_least_squares_solution(layer):
    from slsgu_cli.compare.baselines.speed import constrained, null_space

    weight, keys, anchors, _ = layer
    retained, fixed = drawn(4, INPUTS, seed=5), drawn(2, INPUTS, seed=6)
    space = null_space(retained, 1e-9)
    found = constrained(weight, keys, anchors, space, fixed).numpy()
    # Changes B^T with columns in a basis of what is free, by ordinary ridge regression.
    held = torch.cat([retained, fixed]).numpy()
    free = np.linalg.svd(held)[2][len(held) :].T
    inputs = keys.numpy() @ free / len(keys) ** 0.5
    wanted = (anchors - keys).numpy() @ weight.numpy().T / len(keys) ** 0.5
    rows = np.concatenate([inputs, np.eye(free.shape[1])])
    goals = np.concatenate([wanted, np.zeros((free.shape[1], OUTPUTS))])
    solved = np.linalg.lstsq(rows, goals, rcond=None)[0]
    np.testing.assert_allclose(found, (free @ solved).T, atol=1e-9)


def test_speed_preserves_the_keys_that_it_would_move_most(layer):
    from slsgu_cli.compare.baselines.speed import COPIES, refined

    weight, keys, anchors, _ = layer
    retained = drawn(20, INPUTS, seed=7)
    second = keys.T @ keys / len(keys)
    change = weight @ (anchors - keys).T @ keys / len(keys)
    change = change @ torch.linalg.inv(second + torch.eye(INPUTS, dtype=torch.double))
    sizes = (retained @ change.T).norm(dim=1)
    kept = retained[sizes > sizes.mean()]
    found = refined(weight, keys, anchors, retained, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found[: len(kept)], kept)
    copies = found[len(kept) :]
    assert 0 < len(copies) < COPIES * len(kept)
    # A copy differs from its original along one direction, which the layer maps to little.
    apart = (copies[:, None] - kept).norm(dim=2)
    nearest = copies - kept[apart.argmin(dim=1)]
    quiet = torch.linalg.svd(weight)[2][-1]
    torch.testing.assert_close(nearest, torch.outer(nearest @ quiet, quiet))


def test_centres_are_the_means_of_clusters():
    from slsgu_cli.compare.baselines.speed import centres

    places = 10 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    rows = torch.cat([place + 0.1 * drawn(5, 2, seed=n) for n, place in enumerate(places)])
    expected = torch.stack([rows[5 * n : 5 * n + 5].mean(dim=0) for n in range(3)])
    torch.testing.assert_close(centres(rows), expected)
    assert torch.equal(centres(rows[:2]), rows[:2])
