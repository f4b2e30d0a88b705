"""Classifiers on image features: against plain loops, and on data with a known answer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slsgu_cli.verification.checks.probe import (
    linear_probe,
    neighbour_scores,
    scored,
    threshold,
)


def points(seed, rows, width=6, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    values[:, 0] += shift
    return values


def weighted_loss(weights, own, others):
    """Return the objective of the linear probe, written out row by row."""
    train = torch.cat([own, others])
    mean, deviation = train.mean(dim=0), ((train - train.mean(dim=0)) ** 2).mean(dim=0).sqrt()
    total = float((weights[:-1] ** 2).sum()) / 2
    for row, values in enumerate(train):
        side, sign = (own, 1) if row < len(own) else (others, -1)
        logit = float(((values - mean) / deviation * weights[:-1]).sum() + weights[-1])
        total += len(train) / (2 * len(side)) * float(np.logaddexp(0, -sign * logit))
    return total


def weights_of(own, others):
    """Return the weights that the probe's logits of the unit vectors amount to."""
    train = torch.cat([own, others])
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
    units = torch.cat([mean.unsqueeze(0), mean + deviation.diag()])
    logits = linear_probe(own, others, units)
    return torch.cat([logits[1:] - logits[0], logits[:1]])


@pytest.mark.parametrize("sizes", [(20, 20), (5, 60)])
@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0])
def test_the_linear_probe_is_where_its_objective_is_least(sizes, shift):
    own, others = points(0, sizes[0], shift=shift), points(1, sizes[1])
    weights = weights_of(own, others)
    least = weighted_loss(weights, own, others)
    for direction in points(2, 20, width=7):
        # The problem is convex: no step in any direction may lower the objective.
        for length in (1e-2, 1e-3):
            assert weighted_loss(weights + length * direction, own, others) >= least - 1e-9


def test_a_constant_dimension_changes_nothing():
    own, others, tests = (points(seed, 10, shift=seed == 0) for seed in range(3))
    still = [F.pad(side, (0, 1), value=0.5) for side in (own, others, tests)]
    torch.testing.assert_close(linear_probe(*still), linear_probe(own, others, tests))


@pytest.mark.parametrize("sizes", [(3, 40), (12, 4)])
def test_neighbours_are_those_of_a_plain_loop(sizes):
    own, others, tests = (
        F.normalize(points(seed, rows), dim=1) for seed, rows in enumerate((*sizes, 7))
    )
    for score, test in zip(neighbour_scores(own, others, tests), tests, strict=True):
        means = []
        for side in (own, others):
            nearest = sorted((float(row @ test) for row in side), reverse=True)[:5]
            means.append(sum(nearest) / len(nearest))
        assert float(score) == pytest.approx(means[0] - means[1])


def test_at_most_one_percent_of_scores_exceed_the_threshold():
    scores = torch.randperm(250, generator=torch.Generator().manual_seed(0)).double()
    assert int((scores > threshold(scores)).sum()) == 2
    assert int((scores[:99] > threshold(scores[:99])).sum()) == 0
    assert int((torch.ones(300) > threshold(torch.ones(300))).sum()) == 0


@pytest.mark.parametrize("classifier", [linear_probe, neighbour_scores])
def test_separate_classes_are_found_and_equal_ones_by_chance(classifier):
    def score(shift):
        sides = [
            F.normalize(points(seed, rows, shift=shift if seed % 2 == 0 else 0), dim=1)
            for seed, rows in enumerate((30, 200, 400, 400))
        ]
        own, others, own_tried, others_tried = sides
        return scored(classifier, own, others, own_tried, others_tried, labels=("a", "b"))

    apart, alike = score(40), score(0)
    assert apart.accuracy > 98
    assert apart.recall == 100
    assert alike.accuracy == pytest.approx(50, abs=5)
    assert alike.recall < 5
    assert (apart.images, apart.rows, apart.others) == (30, 400, 400)


def test_accuracy_weighs_both_sides_alike():
    own, others = points(0, 8, shift=9), points(1, 8, shift=-9)
    # A quarter of what shows the concept lies on the other side, of very many that do not none.
    tests = torch.cat([own, own, own, others])
    score = scored(linear_probe, own, others, tests, others, labels=("a", "b"))
    assert (score.accuracy, score.recall) == (50 * (0.75 + 1), 75)
