import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slsgu_cli.engine.shortest_step import ShortestStep
from slsgu_cli.method.step_search import best, first_step, next_step

FIRST = st.floats(1e-6, 1e6)
STEPS = st.integers(1, 14)


def run(accuracy, first, steps, tried=()):
    """Try `steps` steps in all, as a search does."""
    tried = list(tried)
    while len(tried) < steps:
        step = next_step(tried, first)
        tried.append((step, accuracy(step)))
    return tried


def bracket(tried):
    """Return the largest step that does not forget and the smallest that does, if any."""
    low = max((step for step, accuracy in tried if accuracy > 0), default=0.0)
    return low, min((step for step, accuracy in tried if accuracy == 0), default=None)


def test_first_step_moves_the_layer_by_a_tenth():
    assert first_step(40.0, 0.5) * 0.5 / 40.0 == pytest.approx(0.1)


def test_the_path_of_the_paper():
    tried = run(lambda step: 0.0 if step >= 5 else 50.0, 1.0, 7)
    assert [step for step, _ in tried] == [1, 2, 4, 8, 6, 5, 4.5]


@given(FIRST, STEPS, st.floats(1e-3, 1e3))
def test_bracket_holds_the_threshold_and_halves(first, steps, ratio):
    threshold = ratio * first
    tried = run(lambda step: 0.0 if step >= threshold else 100 / (1 + step), first, steps)
    low, high = bracket(tried)
    assert low < threshold
    if high is None:
        assert [step for step, _ in tried] == [first * 2**i for i in range(steps)]
        return
    assert threshold <= high
    doublings = next(i for i, (_, accuracy) in enumerate(tried) if accuracy == 0)
    width = first * (2 ** (doublings - 1) if doublings else 1)
    assert high - low <= width / 2 ** (steps - doublings - 1) * (1 + 1e-9)


@given(FIRST, STEPS, st.randoms(use_true_random=False))
def test_any_curve_gives_positive_finite_steps_inside_the_bracket(first, steps, random):
    tried = []
    for _ in range(steps):
        step = next_step(tried, first)
        assert math.isfinite(step) and step > 0
        low, high = bracket(tried)
        if high is not None:
            assert low <= step <= high
        tried.append((step, random.choice([0.0, 0.0, 12.5, 100.0])))


@given(FIRST, STEPS, st.integers(0, 14), st.floats(0.1, 100))
def test_resuming_gives_the_result_of_one_run(first, steps, before, ratio):
    def accuracy(step):
        return 0.0 if step >= ratio * first else 80.0

    recorded = run(accuracy, first, min(before, steps))
    assert run(accuracy, first, steps, recorded) == run(accuracy, first, steps)


def seek(slack, first, trials):
    """Return the steps tried for the shortest one that is enough, and that one if there is."""
    sought, tried = ShortestStep(first, trials, slack(0.0)), []
    while (step := sought.next()) is not None:
        tried.append(step)
        sought.observe(slack(step), enough=slack(step) >= 0)
    return tried, min((step for step in tried if slack(step) >= 0), default=None)


CURVES = {
    "power": lambda bend: lambda share: share**bend - 1,
    "jump": lambda bend: lambda share: 1.0 if share >= 1 else -1.0,
    "flat": lambda bend: lambda share: 0.0 if share >= 1 else bend * (share - 1),
    "late": lambda bend: lambda share: max(share - 1, -1e-6) if share < 1 else bend,
}


@given(FIRST, STEPS, st.floats(1e-3, 1e5), st.floats(0.2, 5), st.sampled_from(sorted(CURVES)))
def test_the_shortest_step_is_the_one_that_bisection_finds(first, trials, ratio, bend, kind):
    """And the longest that was not enough is bisection's too: they are next to each other."""
    curve = CURVES[kind](bend)

    def slack(step):
        return curve(step / (ratio * first))

    low, high = bracket(run(lambda step: 0.0 if slack(step) >= 0 else 9.0, first, trials))
    tried, shortest = seek(slack, first, trials)
    assert shortest == high
    assert max((step for step in tried if slack(step) < 0), default=0.0) == low
    assert len(tried) == len(set(tried)) <= 4 * trials


def test_nearly_linear_margins_need_half_of_the_trials():
    counts = [
        len(seek(lambda step, b=bend, r=ratio: (step / r) ** b - 1, 1.0, 10)[0])
        for bend in (0.8, 1.0, 1.3)
        for ratio in (0.3, 0.9, 1.5, 2.7, 6.1, 11.0)
    ]
    assert sum(counts) <= 5 * len(counts)


@given(FIRST, STEPS, st.randoms(use_true_random=False))
def test_the_step_search_ends_on_any_curve(first, trials, random):
    sought, tried = ShortestStep(first, trials, random.choice([-1.0, 0.0, 1.0])), []
    while (step := sought.next()) is not None:
        assert math.isfinite(step) and step > 0 and step not in tried
        tried.append(step)
        slack = random.choice([-1.0, -1e-9, 0.0, 1e-9, 1.0, 1.0])
        sought.observe(slack, enough=slack >= 0)
    assert 0 < len(tried) <= 4 * trials


CANDIDATES = st.lists(
    st.tuples(st.sampled_from([0.0, 12.5, 25.0]), st.sampled_from([40.0, 50.0, 60.0])), min_size=1
)


@given(CANDIDATES)
def test_best_is_by_forgetting_then_utility_then_order(candidates):
    chosen = best(candidates)
    least = min(accuracy for accuracy, _ in candidates)
    most = max(utility for accuracy, utility in candidates if accuracy == least)
    assert candidates[chosen] == (least, most)
    assert chosen == candidates.index((least, most))
