"""The mean gradient of a loss over mini-batches: the only pass over the data (Sec. 3.2)."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.errors import InputError, NotFiniteError
from slsgu_cli.method.losses import Loss

Pairs = Iterable[tuple[Tensor, Tensor]]


def mean_gradient(model: Any, loss: Loss, pairs: Pairs) -> dict[str, Tensor]:
    """Return the mean over mini-batches of a loss's gradient, for every parameter.

    `pairs` yields (images, texts) as `encode_image` and `encode_text` of the model take them.
    A parameter that the loss does not reach has a gradient of zeros. Raises InputError where
    there are no pairs, and NotFiniteError.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    batches = 0
    for images, texts in pairs:
        value = loss(*features(model, images, texts))
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
        batches += 1
    if not batches:
        raise InputError("there are no pairs to take a gradient of")
    for name, gradient in total.items():
        if not torch.isfinite(gradient.div_(batches)).all():
            raise NotFiniteError(f"the gradient of {name} is not finite")
    return total


def features(model: Any, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit features of images and texts, (pairs, width) each."""
    return (
        F.normalize(model.encode_image(images), dim=-1),
        F.normalize(model.encode_text(texts), dim=-1),
    )
