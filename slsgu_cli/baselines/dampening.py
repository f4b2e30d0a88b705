"""Selective synaptic dampening (SSD): shrink the weights that matter to the forget set alone.

A weight's importance to a set is the mean of its squared mini-batch gradients. Weights
whose importance to the forget set exceeds alpha times that to the retain set are
multiplied by constant * retain importance / forget importance, where that is below 1.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Importance = Callable[[str], tuple[Tensor, Tensor]]
ALPHA = 10.0
FIRST, LAST = 0.1, 5.0


def constants(epochs: int) -> list[float]:
    """Return the dampening constant of each epoch."""
    return [float(value) for value in np.linspace(FIRST, LAST, epochs)]


def dampening(forget: Tensor, retain: Tensor, *, alpha: float, constant: float) -> Tensor:
    """Return what each weight is multiplied by, given its importance to either set."""
    selected = forget > alpha * retain
    ratio = constant * retain / torch.where(selected, forget, torch.ones_like(forget))
    return torch.where(selected, ratio.clamp(max=1), torch.ones_like(forget))


def dampen(model: nn.Module, importance: Importance, *, alpha: float, epochs: int) -> Iterator[int]:
    """Dampen `model` in place once for each constant; yield the epoch that has just ended.

    `importance` returns a parameter's importance to the forget and the retain set. The
    selection is of the original model; the factors pile up from epoch to epoch.
    """
    for epoch, constant in enumerate(constants(epochs), start=1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                forget, retain = importance(name)
                parameter.mul_(dampening(forget, retain, alpha=alpha, constant=constant))
        yield epoch


def importance_of(
    forget: Mapping[str, npt.NDArray[np.floating]],
    retain: Mapping[str, npt.NDArray[np.floating]],
    device: str,
) -> Importance:
    """Return the importances held in two files of squared gradients, a parameter at a time."""

    def importance(name: str) -> tuple[Tensor, Tensor]:
        return (
            torch.from_numpy(forget[name]).to(device),
            torch.from_numpy(retain[name]).to(device),
        )

    return importance
