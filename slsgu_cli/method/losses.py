"""The losses (Eq. 4 and 5), and SigLIP's, of mini-batches of unit features.

Features are (..., pairs, width): leading axes are mini-batches, and each has a loss of its own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (image features, text features) -> one loss for each mini-batch.
Loss = Callable[[Tensor, Tensor], Tensor]


def cosine_forget(images: Tensor, texts: Tensor) -> Tensor:
    """Return the mean of 1 - cos(v_i, t_i) over the pairs (Eq. 5)."""
    return (1 - (images * texts).sum(dim=-1)).mean(dim=-1)


def toward_anchor(images: Tensor, texts: Tensor, anchors: Tensor) -> Tensor:
    """Return the mean cosine of images and texts with what the texts are to become.

    Unlearning ascends it. `anchors` are the original features of the texts with another name.
    """
    return ((images + texts) * anchors).sum(dim=-1).mean(dim=-1) / 2


def contrastive(scale: Tensor) -> Loss:
    """Return the symmetric contrastive loss (Eq. 4).

    Each image picks its text among those of the mini-batch, and each text its image. `scale`
    multiplies the cosines: exp(logit_scale) = 1 / temperature.
    """

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        logits = scale * (images @ texts.mT)
        by_text, by_image = logits.log_softmax(dim=-1), logits.log_softmax(dim=-2)
        truth = by_text.diagonal(dim1=-2, dim2=-1) + by_image.diagonal(dim1=-2, dim2=-1)
        return -truth.mean(dim=-1) / 2

    return loss


def sigmoid(scale: Tensor, bias: Tensor) -> Loss:
    """Return the pairwise sigmoid loss of SigLIP (Zhai et al. 2023, Eq. 1)."""

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        logits = scale * (images @ texts.mT) + bias
        truth = 2 * torch.eye(images.shape[-2], device=images.device) - 1
        return -F.logsigmoid(truth * logits).sum(dim=(-2, -1)) / images.shape[-2]

    return loss
