"""How far an edit changes the structure of text embeddings (SAGE, arXiv 2607.00402).

Both figures are of prompts that do not concern the edit. They show damage to compositions that
accuracy on class names, FID and CLIP score do not.
"""

import torch
from torch import Tensor

# How many nearest prompts the paper compares.
NEAREST = 15


def spread_ratio(before: Tensor, after: Tensor) -> float:
    """Return the spread of embeddings after an edit over that before it, in percent.

    The spread is the mean squared distance of the unit embeddings (prompts, width) to their mean,
    in fp64. NaN or infinite if all embeddings before the edit are the same.
    """
    was, now = (_spread(embeddings.double()) for embeddings in (before, after))
    return 100 * float(now / was)


def _spread(embeddings: Tensor) -> Tensor:
    return (embeddings - embeddings.mean(dim=0)).square().sum(dim=1).mean()


def neighbour_overlap(
    before: Tensor, after: Tensor, *, nearest: int = NEAREST, rows: int = 1024
) -> float:
    """Return the Jaccard overlap of each prompt's nearest prompts before and after, in percent.

    It is the mean of |A & B| / |A | B| over prompts, where A and B are the `nearest` other prompts
    by the cosine of unit embeddings (prompts, width) before and after an edit. The cosines of
    `rows` prompts with all others are in memory together. NaN for a single prompt.
    """
    count, shares = min(nearest, len(before) - 1), []
    for chunk in torch.split(torch.arange(len(before), device=before.device), rows):
        first, second = (_nearest(each, chunk, count) for each in (before, after))
        common = (first[:, :, None] == second[:, None, :]).sum(dim=(1, 2)).double()
        shares.append(common / (2 * count - common))
    return 100 * float(torch.cat(shares).mean())


def _nearest(embeddings: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the indices (rows, count) of the other embeddings nearest to some."""
    cosines = embeddings[rows] @ embeddings.T
    return cosines.scatter(1, rows[:, None], -torch.inf).topk(count, dim=1).indices
