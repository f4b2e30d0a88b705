"""What image features tell and find: against plain loops, and where all or nothing is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slsgu_cli.verification.image_probes import (
    linear_probe,
    moved,
    neighbour_scores,
    ranking_figures,
    threshold,
    tried,
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


def test_the_linear_probe_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not here")
    own, others, tests = points(0, 12, shift=1), points(1, 50), points(2, 9)
    train = torch.cat([own, others])
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
    model = linear_model.LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=10_000)
    model.fit((train - mean) / deviation, [1] * 12 + [0] * 50)
    expected = model.decision_function((tests - mean) / deviation)
    np.testing.assert_allclose(linear_probe(own, others, tests), expected, atol=1e-4)


def test_a_dimension_that_never_changes_tells_nothing():
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


def test_one_in_a_hundred_of_the_others_may_be_above():
    scores = torch.randperm(250, generator=torch.Generator().manual_seed(0)).double()
    assert int((scores > threshold(scores)).sum()) == 2
    assert int((scores[:99] > threshold(scores[:99])).sum()) == 0
    assert int((torch.ones(300) > threshold(torch.ones(300))).sum()) == 0


@pytest.mark.parametrize("classifier", [linear_probe, neighbour_scores])
def test_what_is_apart_is_told_and_what_is_alike_by_chance(classifier):
    def told(shift):
        sides = [
            F.normalize(points(seed, rows, shift=shift if seed % 2 == 0 else 0), dim=1)
            for seed, rows in enumerate((30, 200, 400, 400))
        ]
        own, others, own_tried, others_tried = sides
        return tried(classifier, own, others, own_tried, others_tried, ("a", "b"))

    apart, alike = told(40), told(0)
    assert apart.accuracy > 98
    assert apart.recall == 100
    assert alike.accuracy == pytest.approx(50, abs=5)
    assert alike.recall < 5
    assert (apart.images, apart.rows, apart.others) == (30, 400, 400)


def test_accuracy_weighs_both_sides_alike():
    own, others = points(0, 8, shift=9), points(1, 8, shift=-9)
    # A quarter of what shows the concept lies on the other side, of very many that do not none.
    told = tried(linear_probe, own, others, torch.cat([own, own, own, others]), others, ("a", "b"))
    assert (told.accuracy, told.recall) == (50 * (0.75 + 1), 75)


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
    found = moved("images", before, after)
    assert (found.rows, found.identical, found.far) == (5, 3, 1)
    assert found.largest == pytest.approx(2)
    assert found.mean == pytest.approx(0.4, abs=1e-6)
    same = moved("images", before, before.clone())
    assert (same.identical, same.far, same.mean, same.largest) == (5, 0, 0, 0)
