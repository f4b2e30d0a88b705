"""Exact intervals of shares and their differences: against tables, and the definition itself."""

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slsgu_cli.records.figures import Accuracy, Difference, Share, difference


@pytest.mark.parametrize(
    ("count", "total", "interval"),
    [
        # R: binom.test(count, total)$conf.int
        (0, 10, (0.0, 30.84971)),
        (1, 10, (0.2528579, 44.50161)),
        (5, 10, (18.70860, 81.29140)),
        (10, 10, (69.15029, 100.0)),
        (3, 16, (4.047373, 45.64565)),
        (682, 925, (70.76683, 76.54066)),
    ],
)
def test_the_interval_is_the_one_that_tables_have(count, total, interval):
    assert Share(count, total).interval == pytest.approx(interval, rel=1e-6, abs=1e-9)


@given(st.integers(1, 60), st.data())
def test_intervals_end_where_the_tails_have_the_stated_probability(total, data):
    count = data.draw(st.integers(0, total))
    low, high = (end / 100 for end in Share(count, total).interval)

    def likelihood(share, counts):
        return sum(comb(total, k) * share**k * (1 - share) ** (total - k) for k in counts)

    assert low <= count / total <= high
    if count < total:
        assert likelihood(high, range(count + 1)) == pytest.approx(0.025, rel=1e-9)
    if count > 0:
        assert likelihood(low, range(count, total + 1)) == pytest.approx(0.025, rel=1e-9)


@pytest.mark.parametrize("total", [1, 16, 33, 50_000])
def test_the_bound_for_zero_hits_has_a_closed_form(total):
    bound = Share(0, total).upper_bound
    assert 0 <= bound - 100 * (1 - 0.05 ** (1 / total)) < 0.1


def test_many_images_have_the_interval_of_a_normal_distribution():
    low, high = Share(37_500, 50_000).interval
    assert (low, high) == pytest.approx((75 - 0.3796, 75 + 0.3796), abs=5e-3)


def test_a_share_is_described_in_words():
    assert Share(0, 16).in_words("test images") == ("0 of 16 test images (95% upper bound: 17.1%)")
    assert Share(3, 16).in_words("images") == ("3 of 16 images (18.8%; 95% interval 4.0 to 45.6%)")
    assert Share(0, 0).in_words("images") == "0 of 0 images"


@given(st.integers(1, 5000), st.data())
def test_a_share_comes_back_from_its_percentage(total, data):
    count = data.draw(st.integers(0, total))
    assert Share.of(100 * count / total, total) == Share(count, total)
    assert Share.of(float("nan"), 0) == Share(0, 0)


def of(count, total):
    """Return the accuracy of so many hits."""
    return Accuracy(100 * count / total, 100.0, total)


@pytest.mark.parametrize(("first", "second"), [(30, 30), (30, 32), (12, 40)])
def test_a_differences_interval_holds_it_as_often_as_it_says(first, second):
    def likelihoods(total, share):
        return [comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(total + 1)]

    intervals = {
        (i, j): difference(of(i, first), of(j, second))
        for i in range(first + 1)
        for j in range(second + 1)
    }
    shares = (0.02, 0.1, 0.3, 0.5, 0.65, 0.8, 0.9)
    for share, other in ((a, b) for a in shares for b in shares):
        ways, others = likelihoods(first, share), likelihoods(second, other)
        true = 100 * (share - other)
        held = sum(
            ways[i] * others[j]
            for (i, j), found in intervals.items()
            if found.low - 1e-9 <= true <= found.high + 1e-9
        )
        assert held > (0.95 if abs(true) <= 80 else 0.92)


def test_a_difference_is_between_two_accuracies():
    found = difference(of(27, 30), of(18, 30))
    assert found.points == pytest.approx(30)
    assert 0 < found.low < 30 < found.high < 60
    none = difference(of(15, 30), of(15, 30))
    assert none.low == pytest.approx(-none.high)
    assert str(Difference(3.333, -12.04, 18.5)) == ("+3.3 points (95% interval -12.0 to +18.5)")
