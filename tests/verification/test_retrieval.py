"""Retrieval figures are those of a plain loop, and shifts are 1 - cosine."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slsgu_cli.verification.checks.retrieval import ranking_figures, shift


def points(seed, rows, width=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def plain_ranking(cosines, relevant):
    precisions, hits = [], {1: 0, 5: 0, 10: 0}
    for values, right in zip(cosines.tolist(), relevant.tolist(), strict=True):
        order = sorted(range(len(values)), key=lambda place, v=values: (-v[place], place))
        found = [place for place, index in enumerate(order, 1) if right[index]]
        precisions.append(np.mean([count / place for count, place in enumerate(found, 1)]))
        for k in hits:
            hits[k] += found[0] <= k
    return (np.mean(precisions), *(count / len(cosines) for count in hits.values()))


def test_ranking_figures_are_those_of_a_plain_loop():
    cosines = points(0, 12, width=40).round(decimals=1)
    relevant = points(1, 12, width=40) > 1
    relevant[:, 3] = True
    found = ranking_figures(cosines, relevant)
    assert found == pytest.approx([100 * figure for figure in plain_ranking(cosines, relevant)])
    assert len(set(found)) > 2


def test_features_move_by_what_their_cosines_lack():
    before = F.normalize(points(0, 5).float(), dim=1)
    after = before.clone()
    after[1] = torch.nextafter(before[1], torch.ones(6))
    after[2] = -before[2]
    found = shift("images", before, after)
    assert (found.rows, found.identical, found.far) == (5, 3, 1)
    assert found.largest == pytest.approx(2)
    assert found.mean == pytest.approx(0.4, abs=1e-6)
    same = shift("images", before, before.clone())
    assert (same.identical, same.far, same.mean, same.largest) == (5, 0, 0, 0)
