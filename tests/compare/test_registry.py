"""Every method of a comparison is declared, with a label of its own."""

import pytest

from slsgu_cli.compare.registry import ClosedForm, Trained, baseline, label_of, on_pipeline
from slsgu_cli.records.comparison import CLIP_METHODS, PIPELINE_METHODS, Method

ROWS = (Method.ORIGINAL, Method.OURS)


@pytest.mark.parametrize("method", [method for method in CLIP_METHODS if method not in ROWS])
def test_a_baseline_on_clip_is_trained_or_a_closed_form(method):
    assert isinstance(baseline(method), Trained | ClosedForm)


@pytest.mark.parametrize("method", [method for method in PIPELINE_METHODS if method not in ROWS])
def test_a_baseline_on_a_pipeline_is_declared(method):
    assert on_pipeline(method) is not None


def test_the_original_and_our_edit_are_no_baselines():
    assert {baseline(method) for method in ROWS} == {None}


def test_labels_are_distinct():
    assert len({label_of(method) for method in Method}) == len(Method)
