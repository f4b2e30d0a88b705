"""SSD: dampen the weights that matter much more to the forget than to the retain set."""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli.compare.registry import Hyperparameter, Trained, register
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.records.comparison import Method

# The dampening constants of the first and of the last epoch.
FIRST, LAST = 0.1, 5.0
Squares = Mapping[str, npt.NDArray[np.floating]]


def ssd(runner: BaselineRunner, alpha: float) -> Iterator[int]:
    """Dampen with the selection threshold `alpha`."""
    forget, retain = (runner.gradient(role, squares=True) for role in ("forget", "retain"))
    return dampen(runner.model, forget, retain, alpha=alpha, epochs=runner.plan.epochs)


register(
    Method.SSD,
    Trained(
        label="SSD",
        hyperparameter=Hyperparameter("alpha", 10.0, (1.0, 10.0, 100.0, 1000.0)),
        gradients=("forget", "retain"),
        squares=True,
        epochs=ssd,
    ),
)


def constants(epochs: int) -> list[float]:
    """Return the dampening constant of each epoch."""
    return [float(value) for value in np.linspace(FIRST, LAST, epochs)]


def dampening(forget: Tensor, retain: Tensor, *, alpha: float, constant: float) -> Tensor:
    """Return the factor of each weight, from its importance to either set."""
    selected = forget > alpha * retain
    ratio = constant * retain / torch.where(selected, forget, torch.ones_like(forget))
    return torch.where(selected, ratio.clamp(max=1), torch.ones_like(forget))


@torch.no_grad()
def dampen(
    model: nn.Module, forget: Squares, retain: Squares, *, alpha: float, epochs: int
) -> Iterator[int]:
    """Dampen `model` in place once per constant; yield the number of each epoch.

    Squared gradients are a parameter's importance to the forget and the retain set. They are
    those of the original model; the factors accumulate over epochs.
    """
    for epoch, constant in enumerate(constants(epochs), start=1):
        for name, parameter in model.named_parameters():
            squares = (torch.from_numpy(of[name]).to(parameter.device) for of in (forget, retain))
            parameter.mul_(dampening(*squares, alpha=alpha, constant=constant))
        yield epoch
