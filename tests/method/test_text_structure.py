"""Spread and overlap of text embeddings, compared with plain loops."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from slsgu_cli.method.text_structure import neighbour_overlap, spread_ratio


def embeddings(seed, prompts=40, width=6):
    drawn = torch.randn(prompts, width, generator=torch.Generator().manual_seed(seed))
    return normalize(drawn + 1, dim=1)


def plain_spread(rows):
    mean = [sum(float(row[i]) for row in rows) / len(rows) for i in range(len(rows[0]))]
    distances = [sum((float(x) - m) ** 2 for x, m in zip(row, mean, strict=True)) for row in rows]
    return sum(distances) / len(distances)


def plain_nearest(rows, place, count):
    cosines = {other: float(rows[place] @ rows[other]) for other in range(len(rows))}
    del cosines[place]
    return set(sorted(cosines, key=cosines.get, reverse=True)[:count])


def test_the_spread_is_that_of_a_plain_loop():
    before, after = embeddings(0), normalize(embeddings(0) + 0.4, dim=1)
    expected = 100 * plain_spread(after) / plain_spread(before)
    assert spread_ratio(before, after) == pytest.approx(expected)
    assert expected < 90


@pytest.mark.parametrize(("count", "rows"), [(15, 1024), (15, 7), (3, 40), (100, 9)])
def test_the_overlap_is_that_of_a_plain_loop(count, rows):
    before = embeddings(0)
    after = normalize(before + 0.3 * embeddings(1), dim=1)
    shares = []
    for place in range(len(before)):
        first, second = (plain_nearest(each, place, count) for each in (before, after))
        shares.append(len(first & second) / len(first | second))
    expected = 100 * sum(shares) / len(shares)
    assert neighbour_overlap(before, after, nearest=count, rows=rows) == pytest.approx(expected)
    assert expected == 100 if count == 100 else 20 < expected < 90


def test_unchanged_embeddings_have_both_figures_at_100():
    before = embeddings(0)
    assert spread_ratio(before, before.clone()) == 100
    assert neighbour_overlap(before, before.clone()) == 100


def test_rotated_embeddings_keep_their_structure():
    before = embeddings(0)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))
    assert spread_ratio(before, before @ rotation) == pytest.approx(100, abs=1e-3)
    assert neighbour_overlap(before, before @ rotation) == pytest.approx(100)


def test_a_collapsed_tower_has_no_spread():
    before = embeddings(0)
    collapsed = before[:1].expand_as(before)
    assert spread_ratio(before, collapsed) == pytest.approx(0, abs=1e-9)
    assert not math.isfinite(spread_ratio(collapsed, before))


def test_a_single_prompt_has_no_figures():
    one = embeddings(0, prompts=1)
    assert math.isnan(spread_ratio(one, one)) and math.isnan(neighbour_overlap(one, one))
