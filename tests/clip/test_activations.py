"""Activations are kept within a budget, of the rows that matter most."""

import pytest
import torch

from slsgu_cli.clip.inputs import Activations, CacheBudget, room_for_all, room_for_some

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
def test_rows_of_the_least_keys_are_kept(room, seed):
    keys = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed))
    kept, x = offered(room, keys)
    there = (kept.places >= 0).nonzero().squeeze(1)
    assert set(there.tolist()) == set(torch.argsort(keys)[:room].tolist())
    torch.testing.assert_close(kept.values[kept.places[there]], x[there], rtol=0, atol=0)
    assert len(set(kept.places[there].tolist())) == room


def test_rows_without_a_key_are_left_out_and_harm_none():
    keys = torch.linspace(0, 1, ROWS)
    keys[:90] = float("nan")
    kept, x = offered(20, keys)
    there = (kept.places >= 0).nonzero().squeeze(1)
    assert set(range(90, 100)) <= set(there.tolist())
    torch.testing.assert_close(kept.values[kept.places[there]], x[there], rtol=0, atol=0)


POOLED, WHOLE = 8 * 4 * ROWS, 50 * 8 * 4 * ROWS


def rooms(make_room, size, *share):
    entering = {2: torch.zeros(7, 50, 8), 9: torch.zeros(7, 50, 8), 12: torch.zeros(7, 8)}
    budget = CacheBudget(size)
    kept = make_room(entering, ROWS, budget, *share)
    assert budget.left == size - sum(one.values.nbytes for one in kept.values())
    return {stage: len(one.values) for stage, one in kept.items()}


def test_a_budget_is_divided_among_stages():
    assert rooms(room_for_some, POOLED + 2 * WHOLE, 1.0) == {2: ROWS, 9: ROWS, 12: ROWS}
    # What enters the head is small and kept of all rows; the rest is shared evenly.
    half = {2: ROWS // 2, 9: ROWS // 2, 12: ROWS}
    assert rooms(room_for_some, POOLED + WHOLE, 1.0) == half
    assert rooms(room_for_some, 2 * (POOLED + WHOLE), 0.5) == half
    assert rooms(room_for_some, 3 * 8 * 4 - 1, 1.0) == {}
    assert rooms(room_for_some, 0, 1.0) == {}


def test_all_rows_are_kept_at_the_deepest_stages_that_fit():
    assert rooms(room_for_all, POOLED + 2 * WHOLE) == {2: ROWS, 9: ROWS, 12: ROWS}
    assert rooms(room_for_all, 2 * WHOLE - 1) == {9: ROWS, 12: ROWS}
    assert rooms(room_for_all, WHOLE) == {12: ROWS}
    assert rooms(room_for_all, POOLED - 1) == {}
