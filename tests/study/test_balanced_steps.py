"""Steps balanced together, on made-up costs."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slsgu_cli.study.balanced_steps import CLOSE, PACE, BalancedSteps


def balanced(steps, slopes, left, *, rounds=60):
    """Balance steps; return every combination that was measured."""
    search, tried = BalancedSteps(dict(steps)), []
    for _ in range(rounds):
        tried.append(dict(search.steps))
        search.observe(slopes(search.steps), left(search.steps))
    return tried


def nothing(steps):
    return dict.fromkeys(steps, 0.0)


def test_steps_reach_the_lowest_cost():
    best = {"a": 3.0, "b": 0.2}

    def slopes(steps):
        return {name: math.log(step / best[name]) for name, step in steps.items()}

    tried = balanced({"a": 1.0, "b": 1.0}, slopes, nothing)
    assert tried[1] == {"a": math.exp(PACE), "b": math.exp(-PACE)}
    assert tried[-1] == pytest.approx(best, rel=0.02)


def test_a_recognised_concept_gets_a_longer_step_at_any_cost():
    tried = balanced({"a": 1.0}, lambda s: {"a": 1.0}, lambda s: {"a": float(s["a"] < 2)})
    shortest = min(step["a"] for step in tried if step["a"] >= 2)
    assert shortest <= tried[-1]["a"] <= shortest * (1 + 2 * CLOSE)


thresholds = st.floats(0.3, 4)


@given(st.lists(st.tuples(thresholds, st.floats(-0.3, 0.3)), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_no_step_is_as_short_again_as_an_insufficient_one(curves):
    """Each concept needs a step of its own, and more or less of it the more the others move."""

    def left(steps):
        remaining = {}
        for name, (threshold, pull) in enumerate(curves):
            others = sum(step for other, step in steps.items() if other != name)
            remaining[name] = max(0.0, threshold * (1 + pull * others / 10) - steps[name])
        return remaining

    tried = balanced(dict.fromkeys(range(len(curves)), 1.0), lambda s: dict.fromkeys(s, 1.0), left)
    for name in range(len(curves)):
        too_short = 0.0
        for before, after in pairwise(tried):
            if left(before)[name]:
                too_short = max(too_short, before[name])
                assert after[name] > before[name]
            assert after[name] > too_short
