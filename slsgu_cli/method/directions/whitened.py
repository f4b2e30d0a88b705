"""The gradient whitened by the layer's retained inputs: D = G P^-1.

P = C + damping * tr(C)/d * I, with the input covariance C. Of all changes of the layer that
disturb its outputs on retained inputs equally, D gains the most forget loss, to first order.

With fixed inputs X, it gains the most among the changes with D X = 0. In the whitened space, with
P = L L^T, these are orthogonal to the columns of L^-1 X, which have the basis Q:
D = G L^-T (I - Q Q^T) L^-1.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from slsgu_cli.errors import InputError
from slsgu_cli.method.directions import Direction, LayerStatistics, Metric

# Singular values below this, relative to the largest, are rounding.
RANK_TOLERANCE = 1e-9


@dataclass(slots=True)
class RetainMetric(Metric):
    """The inner product <A, B>_P = tr(A P B^T) of a layer's changes, in fp64.

    It measures a change by how far it moves the layer's outputs on retained inputs. `covariance`
    and `axis` are as in `InputCovariance`, `output` is the layer's mean squared output, and
    `size` its plain norm. No change has an effect on the inputs `fixed` (rows, inputs); a norm or
    scale has no such change.
    """

    covariance: Tensor
    axis: int
    damping: float
    output: float = 0.0
    size: float = 0.0
    fixed: Tensor | None = None
    _factor: Tensor = field(init=False)
    _basis: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        damped = self.damped()
        self._factor = damped if damped.ndim == 1 else torch.linalg.cholesky(damped)
        if self.fixed is not None and damped.ndim == 2:
            inputs = self.fixed.double().to(damped.device).T
            whitened = torch.linalg.solve_triangular(self._factor, inputs, upper=False)
            self._basis = span_of(whitened)

    def damped(self) -> Tensor:
        """Return P, or its diagonal."""
        damped = self.covariance.double().clone()
        _diagonal(damped).add_(self.floor)
        return damped

    @property
    def floor(self) -> float:
        """What the damping adds to the diagonal: damping * tr(C) / d."""
        return self.damping * float(_diagonal(self.covariance).double().mean())

    @property
    def groups(self) -> int:
        """The number of groups of a convolution; 1 for all other layers."""
        return len(self.covariance) if self.covariance.ndim == 3 else 1

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return D = G P^-1 in the shape of `gradient`."""
        flat = gradient.double()
        if self.covariance.ndim == 1:
            return flat / self._factor if self.fixed is None else torch.zeros_like(flat)
        if self._basis is not None:
            scaled = self.scaled(gradient)
            along: Tensor = torch.linalg.solve_triangular(self._factor.T, scaled, upper=True)
            return along if self.axis == 0 else along.T
        if self.axis == 0:
            return torch.cholesky_solve(flat, self._factor)
        rows = _rows_by_group(flat, self.covariance)
        return torch.cholesky_solve(rows.mT, self._factor).mT.reshape(gradient.shape)

    def scaled(self, gradient: Tensor) -> Tensor:
        """Return G L^-T with P = L L^T, inputs first."""
        flat = gradient.double()
        if self.covariance.ndim == 1:
            return flat / self._factor.sqrt()
        by_input = flat if self.axis == 0 else _rows_by_group(flat, self.covariance).mT
        scaled: Tensor = torch.linalg.solve_triangular(self._factor, by_input, upper=False)
        return scaled if self._basis is None else scaled - self._basis @ (self._basis.T @ scaled)

    def weight_norm(self) -> float:
        """Return ||W||_P, from the layer's plain norm and its mean squared output."""
        return float((self.output + self.floor * self.size**2) ** 0.5)


@dataclass(frozen=True, slots=True)
class Whitened(Direction):
    """D = G P^-1; `damping` is a fraction of the mean eigenvalue of the covariance."""

    damping: float = 0.01
    needs: ClassVar = ("inputs",)

    def metric(self, layer: LayerStatistics) -> RetainMetric:
        """Return the metric of the layer's retained inputs. Raises InputError without them."""
        if layer.inputs is None:
            raise InputError("the whitened direction needs the covariance of the layer's inputs")
        inputs = layer.inputs
        return RetainMetric(
            inputs.matrix,
            inputs.axis,
            self.damping,
            inputs.output,
            layer.weight_norm,
            layer.fixed,
        )


def mean_square_output(weight: Tensor, covariance: Tensor, axis: int) -> float:
    """Return tr(W C W^T), the layer's mean squared output over its inputs, without its bias."""
    rows = weight.double()
    if covariance.ndim == 1:
        return float((rows.square() * covariance.double()).sum())
    rows = _rows_by_group(rows, covariance) if axis == 1 else rows.T
    return float(((rows @ covariance.double()) * rows).sum())


def span_of(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of what columns (d, n) span, up to rounding, (d, rank)."""
    left, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = left[:, sizes > RANK_TOLERANCE * sizes.max()]
    return basis


def _diagonal(covariance: Tensor) -> Tensor:
    """Return the diagonal of a covariance, or of each of its blocks, as a view."""
    return covariance if covariance.ndim == 1 else covariance.diagonal(dim1=-2, dim2=-1)


def _rows_by_group(weight: Tensor, covariance: Tensor) -> Tensor:
    """Return a weight's rows, (rows, inputs), or (groups, rows, inputs) where C is of blocks."""
    return weight.reshape(*covariance.shape[:-2], -1, covariance.shape[-1])
