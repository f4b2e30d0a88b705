"""The membership attack: chance where there is nothing to tell, certainty where all differs."""

import numpy as np
import pytest

from slsgu_cli.verification.checks.membership import attack


def sample(seed, size, *, shift=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(shift, scale, size)


def test_samples_of_one_distribution_are_separated_by_chance_only():
    found = attack(sample(0, 400), sample(1, 400))
    assert found.shape == (10,)
    assert found.mean() == pytest.approx(50, abs=5)


def test_disjoint_distributions_are_always_separated():
    found = attack(sample(0, 80), sample(1, 50, shift=20))
    assert found.min() == 100
    assert attack(sample(0, 80, shift=20), sample(1, 50)).min() == 100


def test_two_shifted_distributions_are_separated_by_their_midpoint():
    # Two unit normals two apart are told apart by their midpoint in 84% of cases.
    assert attack(sample(0, 2000), sample(1, 2000, shift=2)).mean() == pytest.approx(84.1, abs=2)


def test_an_attack_is_fixed_by_its_seed():
    members, others = sample(0, 40), sample(1, 30, shift=1)
    first = attack(members, others)
    np.testing.assert_array_equal(first, attack(members, others))
    # Each seed stands alone: later ones are the same whichever is the first.
    np.testing.assert_array_equal(first[3:], attack(members, others, seed=3)[:7])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_few_pairs_are_attacked_too(size):
    found = attack(sample(0, size), sample(1, size, shift=50))
    assert found.shape == (10,)
    assert ((found >= 0) & (found <= 100)).all()


def test_values_beyond_all_bounds_are_clipped():
    members, others = sample(0, 40), sample(1, 40, shift=1)
    bounded, unbounded = others.copy(), others.copy()
    bounded[0], unbounded[0] = 100.0, np.inf
    np.testing.assert_array_equal(attack(members, unbounded), attack(members, bounded))
