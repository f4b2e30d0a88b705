"""Activations are kept within a budget, of the rows that matter most."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slsgu_cli.clip.activations import Activations, CacheBudget, allocate

ROWS = 100


def offered(room, keys, batch=7):
    x = torch.arange(ROWS * 3.0).view(ROWS, 3)
    kept = Activations(ROWS, room, x)
    for start in range(0, ROWS, batch):
        rows = torch.arange(start, min(start + batch, ROWS))
        kept.offer(rows, x[rows], keys[rows])
    return kept, x


@pytest.mark.parametrize("room", [1, 5, 40, 99, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_with_the_smallest_keys_are_sampled(room, seed):
    keys = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed))
    kept, x = offered(room, keys)
    there = (kept.places >= 0).nonzero().squeeze(1)
    assert set(there.tolist()) == set(torch.argsort(keys)[:room].tolist())
    torch.testing.assert_close(kept.values[kept.places[there]], x[there], rtol=0, atol=0)
    assert len(set(kept.places[there].tolist())) == room


def test_rows_without_a_key_are_skipped():
    keys = torch.linspace(0, 1, ROWS)
    keys[:90] = float("nan")
    kept, x = offered(20, keys)
    there = (kept.places >= 0).nonzero().squeeze(1)
    assert set(range(90, 100)) <= set(there.tolist())
    torch.testing.assert_close(kept.values[kept.places[there]], x[there], rtol=0, atol=0)


POOLED, WHOLE = 8 * 4 * ROWS, 50 * 8 * 4 * ROWS


# Of edits many resume at the head, some before stage 9, and few at stage 2.
RESUMED = {2: 1, 9: 2, 12: 4}


def rooms(size, share=1.0, resumed=RESUMED, least=0.0):
    entering = {2: torch.zeros(7, 50, 8), 9: torch.zeros(7, 50, 8), 12: torch.zeros(7, 8)}
    entering = {stage: entering[stage] for stage in resumed}
    budget = CacheBudget(size)
    kept = allocate(entering, ROWS, budget, resumed, share, least)
    assert budget.left == size - sum(one.values.nbytes for one in kept.values())
    return {stage: len(one.values) for stage, one in kept.items()}


def test_stages_that_save_the_most_are_cached_for_all_rows():
    assert rooms(POOLED + 2 * WHOLE) == {2: ROWS, 9: ROWS, 12: ROWS}
    assert rooms(POOLED + WHOLE) == {9: ROWS, 12: ROWS}
    assert rooms(2 * (POOLED + WHOLE), 0.5) == {9: ROWS, 12: ROWS}
    # With so many edits at stage 2, what enters it saves more: 9 of theirs run from there, too.
    assert rooms(POOLED + WHOLE, resumed={2: 40, 9: 2, 12: 4}) == {2: ROWS, 12: ROWS}


def test_the_last_stage_that_fits_is_cached_for_some_rows():
    assert rooms(POOLED + WHOLE + WHOLE // 2) == {2: ROWS // 2, 9: ROWS, 12: ROWS}
    assert rooms(POOLED + WHOLE // 4) == {9: ROWS // 4, 12: ROWS}
    assert rooms(POOLED // 2) == {12: ROWS // 2}
    assert rooms(8 * 4 - 1) == {}
    assert rooms(0) == {}


def test_stages_that_save_almost_nothing_are_not_cached():
    # Up to theirs all edits run 10 n + 3 stages, of which what enters stage 2 saves the last 3.
    assert rooms(3 * WHOLE, resumed={2: 1, 9: 14}, least=0.02) == {2: ROWS, 9: ROWS}
    assert rooms(3 * WHOLE, resumed={2: 1, 9: 15}, least=0.02) == {9: ROWS}
    assert rooms(3 * WHOLE, resumed={2: 1, 9: 15}) == {2: ROWS, 9: ROWS}


def plain_runs(kept, resumed):
    """Return how many stages all edits run of a row, each from the deepest kept one before it."""
    return sum(
        count * (at - max([stage for stage in kept if stage <= at], default=-1))
        for at, count in resumed.items()
    )


@given(
    st.dictionaries(st.integers(0, 20), st.integers(1, 9), min_size=1, max_size=9),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.02, 0.1]),
)
def test_no_other_stage_would_save_more_than_the_next_one(resumed, fit, least):
    entering = {stage: torch.zeros(2, 3) for stage in resumed}
    kept = list(allocate(entering, ROWS, CacheBudget(fit * ROWS * 12), resumed, least=least))
    least *= plain_runs([], resumed)
    for place in range(len(kept) + 1):
        before, others = kept[:place], set(resumed) - set(kept[:place])
        saved = [plain_runs(before, resumed) - plain_runs([*before, s], resumed) for s in others]
        if place < len(kept):
            runs = plain_runs(before, resumed) - plain_runs(kept[: place + 1], resumed)
            assert least <= runs == max(saved)
        else:
            assert len(kept) == fit or not others or max(saved) < least
