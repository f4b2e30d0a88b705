import pytest
from hypothesis import given
from hypothesis import strategies as st

from slsgu_cli.figures.html import change, cosine, count, interval, number, percent
from slsgu_cli.records.method import Share


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


def test_zero_of_33_is_not_zero_for_sure():
    assert interval(Share(0, 33)) == "0.0 to 10.6%"
