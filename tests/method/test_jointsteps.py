"""Steps adjusted together, on made-up accuracies."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slsgu_cli.method.scoring import CLOSE, RAISE, JointSteps


def adjusted(steps, too_short, accuracies, *, rounds=60):
    """Run the adjustment to its end; return it and every combination that was measured."""
    search = JointSteps(dict(steps), dict(too_short))
    tried = []
    for _ in range(rounds):
        tried.append(dict(search.steps))
        search.observe(accuracies(search.steps))
        if search.done:
            break
    return search, tried


def test_steps_that_forget_are_shortened_as_far_as_they_were_unknown():
    search, tried = adjusted(
        {"a": 1.0, "b": 2.0}, {"a": 0.5, "b": 1.99}, lambda s: {"a": s["a"] < 0.7, "b": s["b"] < 2}
    )
    assert tried[0] == {"a": 1.0, "b": 2.0}
    assert search.done
    assert search.forgetting["b"] == 2.0
    assert search.forgetting["a"] == pytest.approx(0.7, rel=2 * CLOSE)
    assert search.forgetting["a"] >= 0.7


def test_small_steps_are_known_as_well_as_large_ones():
    scale = 1e-3
    search, _ = adjusted({"a": scale}, {"a": scale / 2}, lambda s: {"a": s["a"] < 0.7 * scale})
    assert search.done
    assert search.forgetting["a"] == pytest.approx(0.7 * scale, rel=2 * CLOSE)


def test_only_what_is_still_recognised_is_raised():
    search, tried = adjusted(
        {"a": 1.0, "b": 1.0}, {"a": 0.99, "b": 0.99}, lambda s: {"a": 0, "b": s["b"] < 1.5}
    )
    assert tried[1] == {"a": 1.0, "b": RAISE}
    assert tried[2] == {"a": 1.0, "b": RAISE**2}
    assert search.forgetting["a"] == 1.0
    assert 1.5 <= search.forgetting["b"] <= 1.5 * (1 + 2 * CLOSE)


def test_what_comes_back_when_all_are_shortened_goes_to_where_it_was():
    search = JointSteps({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 0.0})
    search.observe({"a": 0, "b": 0})
    assert search.steps == {"a": 0.5, "b": 0.5}
    search.observe({"a": 12.5, "b": 0})
    assert search.steps == {"a": 1.0, "b": 0.5}
    search.observe({"a": 0, "b": 0})
    assert search.forgetting == {"a": 1.0, "b": 0.5}
    assert search.steps == {"a": 0.75, "b": 0.25}


def test_without_an_end_nothing_forgets():
    search, _ = adjusted({"a": 1.0}, {"a": 0.5}, lambda s: {"a": 50.0}, rounds=10)
    assert search.forgetting is None
    assert search.steps["a"] == pytest.approx(RAISE**10)


thresholds = st.floats(0.3, 4)


@given(st.lists(st.tuples(thresholds, st.floats(-0.3, 0.3)), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_what_is_found_forgets_all_and_is_no_longer_than_what_forgot_first(curves):
    """Each concept needs a step of its own, and more or less of it the more the others move."""

    def accuracies(steps):
        left = {}
        for name, (threshold, pull) in enumerate(curves):
            others = sum(step for other, step in steps.items() if other != name)
            left[name] = max(0.0, threshold * (1 + pull * others / 10) - steps[name])
        return left

    names = range(len(curves))
    search, tried = adjusted(dict.fromkeys(names, 1.0), dict.fromkeys(names, 0.2), accuracies)
    if search.forgetting is None:
        return
    assert search.forgetting in tried
    assert not any(accuracies(search.forgetting).values())
    first = next(steps for steps in tried if not any(accuracies(steps).values()))
    assert all(search.forgetting[name] <= first[name] for name in names)
