from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from slsgu_cli.sets.sampling import Candidate, SeededSample, priority, row_identity


def candidate(seed: int, index: int) -> Candidate:
    return Candidate(priority(seed, f"shard\0{index}"), 0, index, f"k{index}", "caption")


@given(st.permutations(range(30)), st.integers(1, 40), st.integers(0, 9))
def test_the_sample_does_not_depend_on_the_order_of_arrival(order, size, seed):
    draw = SeededSample(size)
    for index in order:
        draw.offer(candidate(seed, index))
    everything = sorted(candidate(seed, index) for index in range(30))
    assert draw.ranked() == everything[:size]
    assert draw.offered == 30


def test_without_a_size_every_row_is_sampled():
    draw = SeededSample(None)
    for index in range(50):
        draw.offer(candidate(0, index))
    assert len(draw.ranked()) == 50


def test_seeds_give_different_and_even_draws():
    hits = Counter()
    for seed in range(400):
        draw = SeededSample(3)
        for index in range(10):
            draw.offer(candidate(seed, index))
        hits.update(c.index for c in draw.ranked())
    # 1,200 picks over 10 rows: 120 each, give or take five standard deviations.
    assert all(70 < hits[index] < 170 for index in range(10))


def test_priority_accepts_names_that_are_not_utf8():
    assert priority(1, "bad\udcff") != priority(2, "bad\udcff")


def test_a_row_keeps_its_place_when_its_source_moves():
    assert row_identity("/here/laion/00001.tar", 7) == row_identity("s3://there/laion/00001.tar", 7)
    assert row_identity("/here/laion/00001.tar", 7) != row_identity("/here/coyo/00001.tar", 7)
