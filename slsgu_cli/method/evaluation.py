"""Zero-shot evaluation (Sec. 4.1): an image is recognised where its own class comes first.

A class is the mean of the unit features of its prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images as the model takes them, the index of each one's class, and the prompts of classes.

    `prompts` are tokens (classes, templates, length).
    """

    images: Tensor
    labels: Tensor
    prompts: Tensor

    @torch.no_grad()
    def cosines(self, model: Any, rows: int = 256) -> Tensor:
        """Return the cosines of images with classes, (images, classes)."""
        classes = class_embeddings(model, self.prompts, rows)
        features = [
            F.normalize(model.encode_image(x), dim=-1) for x in torch.split(self.images, rows)
        ]
        return torch.cat(features) @ classes.T

    def ranks(self, cosines: Tensor) -> Tensor:
        """Return how many classes come before each image's own."""
        own = cosines.gather(1, self.labels[:, None])
        return (cosines > own).sum(dim=1)


@torch.no_grad()
def class_embeddings(model: Any, prompts: Tensor, rows: int = 256) -> Tensor:
    """Return the unit mean of the features of each class's prompts, (classes, width)."""
    tokens = prompts.flatten(0, 1)
    features = torch.cat(
        [F.normalize(model.encode_text(t), dim=-1) for t in torch.split(tokens, rows)]
    )
    return F.normalize(torch.unflatten(features, 0, prompts.shape[:2]).mean(dim=1), dim=-1)


def accuracy(ranks: Tensor, k: int = 1) -> float:
    """Return top-k accuracy in percent."""
    return 100 * float((ranks < k).double().mean())


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """An evaluation for `unlearn`: forget accuracy (FA@k), and the mean TA@1 over test sets."""

    forget: LabelledImages
    others: Sequence[LabelledImages]
    k: int = 1

    def __call__(self, model: Any) -> tuple[float, float]:
        """Return forget accuracy and utility of a model, in percent."""
        utility = [accuracy(each.ranks(each.cosines(model))) for each in self.others]
        forget = accuracy(self.forget.ranks(self.forget.cosines(model)), self.k)
        return forget, sum(utility) / len(utility)
