import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slsgu_cli.figures.html import change, cosine, count, interval, number, percent, wilson


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (12.0, "12"),
        (0.5, "0.5"),
        (0.0004509, "0.0004509"),
        (-41.493, "−41.49"),
        (1234567.0, "1.235e+06"),
        (3e-9, "3e−09"),
    ],
)
def test_numbers_have_four_digits(value, shown):
    assert number(value) == shown


@given(st.floats(1e-6, 1e6))
def test_a_number_is_itself_to_four_digits(value):
    assert float(number(value)) == pytest.approx(value, rel=6e-4)


def test_other_figures():
    assert (percent(96.969), count(12345)) == ("96.97%", "12,345")
    assert (change(-0.436), change(0.09), change(-0.001)) == ("−0.44", "+0.09", "0.00")
    assert (cosine(-0.058), cosine(-0.001)) == ("−0.06", "0.00")


@given(st.integers(1, 5000), st.data())
def test_the_interval_holds_the_share_and_solves_its_equation(rows, data):
    hits = data.draw(st.integers(0, rows))
    low, high = wilson(hits / rows, rows)
    assert 0 <= low <= hits / rows <= high <= 1
    # Its ends are the shares from which what was seen lies 1.96 standard deviations away.
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            distance = abs(hits / rows - end) / math.sqrt(end * (1 - end) / rows)
            assert distance == pytest.approx(1.959964, rel=1e-6)


def test_zero_of_33_is_not_zero_for_sure():
    assert interval(0.0, 33) == "0.0 to 10.4%"
