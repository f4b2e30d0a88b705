"""The gradient preconditioned by both Kronecker factors: D = S^-1 G P^-1.

P is the damped covariance of the layer's retained inputs, as in the whitened direction, and S the
damped second moment B of the features' derivatives at its outputs (K-FAC, arXiv 1503.05671). Of all
changes of the layer that disturb the features of retained rows equally, D gains the most forget
loss, to first order and if inputs and derivatives are independent.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from slsgu_cli.errors import InputError
from slsgu_cli.method.directions import Direction, LayerStatistics, Metric
from slsgu_cli.method.directions.whitened import RetainMetric


@dataclass(slots=True)
class FeatureMetric(Metric):
    """The inner product <A, B> = tr(S A P B^T) of a layer's changes, in fp64.

    It measures a change by how far it moves the features of retained rows. `inputs` is the metric
    P, `derivatives` is as in LayerStatistics, and both have the same relative `damping`: the
    trace-balanced damping of K-FAC.
    """

    inputs: RetainMetric
    derivatives: Tensor
    damping: float
    _factor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        damped = self.damped()
        self._factor = damped if damped.ndim == 1 else torch.linalg.cholesky(damped)

    def damped(self) -> Tensor:
        """Return S, its diagonal, or its blocks for the groups of a convolution."""
        damped, groups = self.derivatives.double().clone(), self.inputs.groups
        if damped.ndim == 1:
            return damped + self.damping * damped.mean()
        damped.diagonal().add_(self.damping * damped.diagonal().mean())
        if groups == 1:
            return damped
        size = len(damped) // groups
        return torch.stack(
            [damped[i : i + size, i : i + size] for i in range(0, len(damped), size)]
        )

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return D = S^-1 G P^-1 in the shape of `gradient`."""
        along = self.inputs.steepest(gradient)
        if self._factor.ndim == 1:
            return along / self._factor
        if self.inputs.axis == 0:
            return torch.cholesky_solve(along.T, self._factor).T
        rows = along.reshape(*self._factor.shape[:-1], -1)
        return torch.cholesky_solve(rows, self._factor).reshape(gradient.shape)

    def scaled(self, gradient: Tensor) -> Tensor:
        """Return L_S^-1 G L_P^-T with S = L_S L_S^T and P = L_P L_P^T."""
        scaled = self.inputs.scaled(gradient)
        if self._factor.ndim == 1:
            return scaled / self._factor.sqrt()
        both: Tensor = torch.linalg.solve_triangular(self._factor, scaled.mT, upper=False)
        return both

    def weight_norm(self) -> float:
        """Return 1: a change of the features has the same unit in every layer."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Kfac(Direction):
    """D = S^-1 G P^-1; `damping` is a fraction of the mean eigenvalue of each factor.

    All layers have one scale, the forget loss gained for the same change of the features, so a
    search tries those that gain the most.
    """

    damping: float = 0.01
    needs: ClassVar = ("inputs", "derivatives")
    first: ClassVar = 6

    def metric(self, layer: LayerStatistics) -> FeatureMetric:
        """Return the metric of the features. Raises InputError without the layer's factors."""
        inputs, derivatives = layer.inputs, layer.derivatives
        if inputs is None or derivatives is None:
            raise InputError("the kfac direction needs both factors of the layer")
        metric = RetainMetric(inputs.matrix, inputs.axis, self.damping, fixed=layer.fixed)
        return FeatureMetric(metric, derivatives, self.damping)
