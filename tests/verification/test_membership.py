"""The membership attack: chance where there is nothing to tell, certainty where all differs."""

import numpy as np
import pytest

from slsgu_cli.verification.training import _splits, attack, fit


def sample(seed, size, *, shift=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(shift, scale, size)


def problem(seed=3, size=60, shift=0.8):
    values = np.concatenate([sample(seed, size), sample(seed + 1, size, shift=shift)])
    return values, np.repeat([0.0, 1.0], size)


def objective(w, values, truth):
    z = w[0] * values + w[1]
    return 0.5 * w[0] ** 2 + np.sum(np.logaddexp(0, z) - truth * z)


def test_one_distribution_is_told_apart_by_chance():
    found = attack(sample(0, 400), sample(1, 400))
    assert found.shape == (10,)
    assert found.mean() == pytest.approx(50, abs=5)


def test_two_separate_distributions_are_told_apart_always():
    found = attack(sample(0, 80), sample(1, 50, shift=20))
    assert found.min() == 100
    assert attack(sample(0, 80, shift=20), sample(1, 50)).min() == 100


def test_half_of_a_shift_is_told():
    # Two unit normals two apart are told apart by their midpoint in 84% of cases.
    assert attack(sample(0, 2000), sample(1, 2000, shift=2)).mean() == pytest.approx(84.1, abs=2)


def test_an_attack_is_fixed_by_its_seed():
    members, others = sample(0, 40), sample(1, 30, shift=1)
    first = attack(members, others)
    np.testing.assert_array_equal(first, attack(members, others))
    # Each seed stands alone: later ones are the same whichever is the first.
    np.testing.assert_array_equal(first[3:], attack(members, others, seed=3)[:7])


def test_a_tenth_of_each_side_is_tested_on():
    for size, expected in ((50, {5}), (33, {3, 4}), (2, {0, 1})):
        masks = _splits(size, np.random.default_rng(0))
        sides = [mask.reshape(2, size).sum(axis=1) for mask in masks]
        assert {int(n) for side in sides for n in side} == expected
        assert {int(side.sum()) for side in sides} == {int(np.ceil(0.2 * size))}


@pytest.mark.parametrize("shift", [0.0, 0.8, 30.0])
def test_the_fit_is_where_plain_descent_ends(shift):
    values, truth = problem(shift=shift)
    found = np.array(fit(values, truth))
    # The problem is convex: no step in any direction may lower the objective.
    least = objective(found, values, truth)
    for direction in np.random.default_rng(0).normal(size=(50, 2)):
        for length in (1e-2, 1e-4):
            assert objective(found + length * direction, values, truth) >= least - 1e-9
    z = found[0] * values + found[1]
    error = 1 / (1 + np.exp(-z)) - truth
    assert error @ values + found[0] == pytest.approx(0, abs=1e-6)
    assert error.sum() == pytest.approx(0, abs=1e-6)


def test_the_fit_is_where_a_plain_optimisation_ends():
    values, truth = problem()
    w = np.zeros(2)
    for _ in range(20_000):
        error = 1 / (1 + np.exp(-(w[0] * values + w[1]))) - truth
        w -= 0.01 * np.array([error @ values + w[0], error.sum()])
    np.testing.assert_allclose(fit(values, truth), w, atol=1e-6)


def test_the_fit_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not here")
    for shift in (0.0, 0.8, 30.0):
        values, truth = problem(shift=shift)
        model = linear_model.LogisticRegression(tol=1e-10, max_iter=10_000)
        model.fit(values[:, None], truth)
        expected = (model.coef_[0, 0], model.intercept_[0])
        np.testing.assert_allclose(fit(values, truth), expected, rtol=1e-4, atol=1e-4)
