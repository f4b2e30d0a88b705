"""The two losses whose gradients the method needs, for many mini-batches at once.

Every function takes the features of several mini-batches stacked along the first axis
and returns one loss per mini-batch. Mini-batches never see each other, so the sum of the
returned losses has the same gradient as running them one after another.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (image features, text features, mini-batch size) -> one loss per mini-batch.
# Features are unit vectors of shape (pairs, width); a last, smaller mini-batch is allowed.
GroupedLoss = Callable[[Tensor, Tensor, int], Tensor]


def cosine_forget(images: Tensor, texts: Tensor, batch_size: int) -> Tensor:
    """Return the mean of 1 - cos(v_i, t_i) in each mini-batch (Eq. 5)."""
    return _per_batch(1 - (images * texts).sum(dim=-1), batch_size)


def contrastive(scale: Tensor) -> GroupedLoss:
    """Return the symmetric contrastive loss inside each mini-batch (Eq. 4).

    `scale` is the multiplier of the cosines, exp(logit_scale) = 1 / temperature.
    """

    def loss(images: Tensor, texts: Tensor, batch_size: int) -> Tensor:
        def whole(v: Tensor, t: Tensor) -> Tensor:
            logits = scale * torch.bmm(v, t.transpose(1, 2))
            truth = torch.arange(v.shape[1], device=v.device).expand(v.shape[:2])
            rows = F.cross_entropy(logits.transpose(1, 2), truth, reduction="none")
            columns = F.cross_entropy(logits, truth, reduction="none")
            return (rows.mean(dim=1) + columns.mean(dim=1)) / 2

        return _blocks(whole, images, texts, batch_size)

    return loss


def sigmoid(scale: Tensor, bias: Tensor) -> GroupedLoss:
    """Return the pairwise sigmoid loss of SigLIP inside each mini-batch."""

    def loss(images: Tensor, texts: Tensor, batch_size: int) -> Tensor:
        def whole(v: Tensor, t: Tensor) -> Tensor:
            logits = scale * torch.bmm(v, t.transpose(1, 2)) + bias
            truth = 2 * torch.eye(v.shape[1], device=v.device) - 1
            return -F.logsigmoid(truth * logits).sum(dim=(1, 2)) / v.shape[1]

        return _blocks(whole, images, texts, batch_size)

    return loss


def _blocks(
    whole: Callable[[Tensor, Tensor], Tensor], images: Tensor, texts: Tensor, batch_size: int
) -> Tensor:
    """Apply `whole` to the full mini-batches as one stack and to the smaller last one."""
    pairs = images.shape[0]
    full = pairs - pairs % batch_size
    losses = []
    if full:
        losses.append(
            whole(
                images[:full].reshape(-1, batch_size, images.shape[1]),
                texts[:full].reshape(-1, batch_size, texts.shape[1]),
            )
        )
    if full < pairs:
        losses.append(whole(images[full:].unsqueeze(0), texts[full:].unsqueeze(0)))
    return torch.cat(losses)


def _per_batch(values: Tensor, batch_size: int) -> Tensor:
    full = values.shape[0] - values.shape[0] % batch_size
    means = [values[:full].reshape(-1, batch_size).mean(dim=1)] if full else []
    if full < values.shape[0]:
        means.append(values[full:].mean().unsqueeze(0))
    return torch.cat(means)
