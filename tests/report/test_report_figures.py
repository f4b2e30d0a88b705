import re
from dataclasses import replace

import edit_headers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slsgu_cli.figures.numbers import change, cosine, count, interval, number, percent
from slsgu_cli.records.figures import Accuracy, ClassLoss, Share
from slsgu_cli.report.result_sections import lead


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


def test_zero_of_33_has_an_upper_bound():
    assert interval(Share(0, 33)) == "0.0 to 10.6%"


@pytest.mark.parametrize("is_test", [True, False])
def test_the_first_sentence_says_which_images_were_measured(is_test):
    edit = replace(
        edit_headers.header("visual.proj", np.ones((2, 2), np.float32)),
        baseline_forget=Accuracy(100.0, 100.0, 16, is_test),
        forget=Accuracy(0.0, 0.0, 16, is_test),
        harmed=(ClassLoss("ubuntu", 5, 80.0, 20.0),),
    )
    text = re.sub(r"<[^>]+>", "", str(lead(edit)))
    recognised = "the model recognised 100.00% before the edit"
    test = f"16 test images of facebook: {recognised}"
    validation = f"16 images of facebook, which also selected the edit: {recognised}"
    assert text.startswith(test if is_test else validation)
    assert "The largest loss is on ubuntu: 80.00% of its 5 images before, 20.00% after" in text
