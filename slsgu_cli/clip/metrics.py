"""Metrics of zero-shot classification, from logits and features."""

import torch
from torch import Tensor

from slsgu_cli.clip.finite import require_finite

TOP = 5


def ranks_of_truth(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of the true class for each row: the number of classes that score higher.

    A tie counts as higher if its index is smaller, as `topk` on sorted columns lists them.
    `logits` is (rows, classes); rank 0 is a top-1 hit, a rank below 5 a top-5 hit. Raises
    NotFiniteError if a logit is not finite, since a rank would mean nothing.
    """
    require_finite(logits, "cosines")
    truth = logits.gather(1, labels.unsqueeze(1))
    columns = torch.arange(logits.shape[1], device=logits.device)
    above = (logits > truth) | ((logits == truth) & (columns < labels.unsqueeze(1)))
    return above.sum(dim=1)


# Below every cosine.
LOWEST = -2.0


def as_one_class(cosines: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Return cosines (rows, names) in which several classes count as one.

    The highest cosine of `classes` is at each row's label, and the others are below all cosines.
    """
    highest = cosines[:, classes].amax(dim=1, keepdim=True)
    others = cosines.index_fill(1, classes, LOWEST)
    return others.scatter(1, labels.unsqueeze(1), highest)


def gaps(logits: Tensor, labels: Tensor, top: int = TOP) -> Tensor:
    """Return the fifth (or `top`) highest logit of the other classes minus that of the true class.

    It is positive if and only if the true class is not in the row's top 5, ties aside. With fewer
    than five other classes, the lowest counts.
    """
    truth = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), float("-inf"))
    fifth = others.topk(min(top, logits.shape[1] - 1), dim=1).values[:, -1]
    return fifth - truth


def accuracies(ranks: Tensor) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy in percent; NaN without rows."""
    if ranks.numel() == 0:
        return float("nan"), float("nan")
    hits = [(ranks < k).double().mean().item() * 100 for k in (1, TOP)]
    return hits[0], hits[1]


def class_accuracies(hits: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return each class's top-1 accuracy in percent, NaN without rows, and its number of rows.

    `hits` (rows,) says whether, or how likely, each row is a top-1 hit. Both results are
    (classes,), the accuracies in fp64.
    """
    rows = torch.bincount(labels, minlength=classes)
    return 100 * torch.bincount(labels, weights=hits.double(), minlength=classes) / rows, rows


def class_means(features: Tensor, owners: Tensor, classes: int) -> Tensor:
    """Return the normalised mean of each class's prompt features, shape (classes, width).

    `features` are unit vectors (prompts, width) and `owners` the class of each.
    """
    sums = torch.zeros(classes, features.shape[1], dtype=features.dtype, device=features.device)
    return torch.nn.functional.normalize(sums.index_add_(0, owners, features), dim=-1)


def cosine_matrix(images: Tensor, labels: Tensor, texts: Tensor) -> Tensor:
    """Return the mean cosine of each class's images with each class's name (Figure 3)."""
    means = torch.zeros(texts.shape[0], images.shape[1], device=images.device)
    counts = torch.zeros(texts.shape[0], device=images.device)
    means.index_add_(0, labels, images)
    counts.index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
    return (means / counts.clamp(min=1).unsqueeze(1)) @ texts.T


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Fréchet distance of normal distributions fitted to features.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), as FID has it; both are (rows, width), of at
    least two rows. The trace of the root is the sum of the singular values of A1 A2ᵀ, where
    A are the centred features divided by the square root of rows - 1.
    """
    parts = [rows.double() for rows in (first, second)]
    means = [rows.mean(dim=0) for rows in parts]
    spread = [
        (rows - mean) / (len(rows) - 1) ** 0.5 for rows, mean in zip(parts, means, strict=True)
    ]
    shared = torch.linalg.svdvals(spread[0] @ spread[1].T).sum()
    apart = (means[0] - means[1]).square().sum()
    within = sum(rows.square().sum() for rows in spread)
    return float((apart + within - 2 * shared).clamp(min=0))


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logit of the true class minus the highest of the others."""
    truth = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), float("-inf"))
    return truth - others.amax(dim=1)
