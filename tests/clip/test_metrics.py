import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from slsgu_cli.clip.metrics import (
    accuracies,
    class_accuracies,
    class_means,
    cosine_matrix,
    gaps,
    margins,
    ranks_of_truth,
)
from slsgu_cli.errors import NotFiniteError


def scores(rows, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    return logits, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("classes", [1, 3, 5, 6, 40])
def test_hits_are_those_of_topk(classes):
    logits, labels = scores(200, classes)
    ranks = ranks_of_truth(logits, labels)
    for k in (1, min(5, classes)):
        top = logits.topk(k, dim=1).indices
        assert torch.equal(ranks < k, (top == labels.unsqueeze(1)).any(dim=1))
    assert int(ranks.max()) < classes


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=6))
def test_ties_go_to_the_smaller_index(rows):
    logits = torch.tensor(rows, dtype=torch.float32)
    for label in range(4):
        labels = torch.full((len(rows),), label)
        order = [sorted(range(4), key=lambda c, row=row: (-row[c], c)) for row in rows]
        expected = [listed.index(label) for listed in order]
        assert ranks_of_truth(logits, labels).tolist() == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_never_counted(value):
    logits = scores(7, 7)[0]
    logits[2, 3] = value
    with pytest.raises(NotFiniteError, match=r"1 of 7 cosines are not finite \(rows 2\)"):
        ranks_of_truth(logits, torch.arange(7))


def test_accuracies_are_percentages():
    top1, top5 = accuracies(torch.tensor([0, 0, 1, 4, 5, 9, 0, 2]))
    assert (top1, top5) == (37.5, 75.0)
    assert all(map(math.isnan, accuracies(torch.tensor([], dtype=torch.long))))


def test_class_accuracies_are_those_of_each_class_alone():
    logits, labels = scores(60, 7)
    labels[labels == 3] = 4
    ranks = ranks_of_truth(logits, labels)
    found, rows = class_accuracies(ranks == 0, labels, 9)
    for index in range(9):
        alone = accuracies(ranks[labels == index])[0]
        assert float(found[index]) == pytest.approx(alone, nan_ok=True)
        assert int(rows[index]) == int((labels == index).sum())
    assert found.isnan().tolist() == [i in (3, 7, 8) for i in range(9)]


def test_class_means_are_the_plain_loops():
    features = F.normalize(scores(30, 8)[0], dim=-1)
    owners = torch.arange(30) % 4
    owners[owners == 2] = 3
    means = class_means(features, owners, 5)
    for index in (0, 1, 3):
        mean = torch.stack([f for f, o in zip(features, owners, strict=True) if o == index]).mean(0)
        torch.testing.assert_close(means[index], mean / mean.norm())
    assert not means[[2, 4]].any()


def test_class_means_weigh_classes_of_any_size_alike():
    features = F.normalize(torch.tensor([[1.0, 0], [0, 1.0], [0, 1.0], [0, 1.0]]), dim=-1)
    means = class_means(features, torch.tensor([0, 0, 0, 0]), 1)
    torch.testing.assert_close(means[0], F.normalize(torch.tensor([1.0, 3.0]), dim=0))


def test_cosine_matrix_is_the_mean_over_pairs():
    images, texts = F.normalize(scores(20, 6)[0], dim=-1), F.normalize(scores(4, 6, 1)[0], dim=-1)
    labels = torch.arange(20) % 3
    matrix = cosine_matrix(images, labels, texts)
    assert matrix.shape == (4, 4)
    for a in range(3):
        for b in range(4):
            cosines = [float(v @ texts[b]) for v, o in zip(images, labels, strict=True) if o == a]
            assert matrix[a, b].item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert not matrix[3].any()


def test_margins_lead_over_the_best_other_class():
    logits, labels = scores(50, 6)
    found = margins(logits, labels)
    for row, label, margin in zip(logits.tolist(), labels.tolist(), found.tolist(), strict=True):
        others = [value for index, value in enumerate(row) if index != label]
        assert margin == pytest.approx(row[label] - max(others), abs=1e-6)
    assert torch.equal(found > 0, ranks_of_truth(logits, labels) == 0)


@pytest.mark.parametrize("classes", [4, 9])
def test_the_margin_is_to_the_fifth_best_name_at_the_closest_row(classes):
    logits, labels = scores(50, classes)
    wanted = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        others = sorted((v for index, v in enumerate(row) if index != label), reverse=True)
        wanted.append(others[min(5, classes - 1) - 1] - row[label])
    assert float(gaps(logits, labels).min()) == pytest.approx(min(wanted), abs=1e-6)
    if classes > 5:
        for row in range(50):
            one = float(gaps(logits[row : row + 1], labels[row : row + 1]))
            assert (one > 0) == (ranks_of_truth(logits, labels)[row] >= 5)
