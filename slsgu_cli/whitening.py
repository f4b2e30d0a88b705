"""The retain-whitened direction of a layer, and what importance and alignment mean for it.

A change A of a linear layer moves its outputs by A x. Over the retained inputs, of second
moment C, the mean square of that is tr(A C A^T). With a ridge for what few rows say of C,

    P = C + ridge * tr(C) / d * I,    <A, B>_P = tr(A P B^T)

is an inner product of changes that counts what they do to retained inputs, as the plain
one counts entries. In it, the gradient G of a loss is D = G P^-1: <G, A> = <D, A>_P for
every A. So of all changes that disturb the retained outputs equally, D gains most, and
Eq. 7 and 8 hold with D for G and P for the identity. With P = L L^T they are those of
G L^-T and the identity, which takes half the work. A norm's P is a diagonal.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class RetainMetric:
    """The inner product <., .>_P of one layer's changes; `axis` is that of its inputs.

    `moment` is C (inputs, inputs), or its diagonal (inputs,). All arithmetic is fp64.
    """

    moment: Tensor
    axis: int
    ridge: float
    _factor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        damped = self.moment.double()
        if damped.ndim == 1:
            self._factor = damped + self.floor
        else:
            damped = damped.clone()
            damped.diagonal().add_(self.floor)
            self._factor = torch.linalg.cholesky(damped)

    @property
    def floor(self) -> float:
        """Return what the ridge adds to the diagonal: ridge * tr(C) / d."""
        diagonal = self.moment if self.moment.ndim == 1 else self.moment.diagonal()
        return self.ridge * float(diagonal.double().mean())

    def whiten(self, gradient: Tensor) -> Tensor:
        """Return D = G P^-1 in the shape of `gradient`; fp64."""
        flat = gradient.double()
        if self.moment.ndim == 1:
            return flat / self._factor
        if self.axis == 0:
            return torch.cholesky_solve(flat, self._factor)
        rows = flat.reshape(flat.shape[0], -1)
        return torch.cholesky_solve(rows.T, self._factor).T.reshape(gradient.shape)

    def half_whiten(self, gradient: Tensor) -> Tensor:
        """Return G L^-T, inputs first: its plain products are those of D in <., .>_P; fp64."""
        flat = gradient.double()
        if self.moment.ndim == 1:
            return flat / self._factor.sqrt()
        inputs_first = flat if self.axis == 0 else flat.reshape(flat.shape[0], -1).T
        half: Tensor = torch.linalg.solve_triangular(self._factor, inputs_first, upper=False)
        return half

    def weight_norm(self, weight_norm: float, output: float) -> float:
        """Return ||W||_P from the layer's own norm and its mean squared output tr(W C W^T)."""
        return float((output + self.floor * weight_norm**2) ** 0.5)


def exact_device(device: str) -> str:
    """Return where fp64 is to be had for tensors on `device`: Apple's GPUs have none."""
    return "cpu" if device == "mps" else device


def whitened_importance(forget: Tensor, direction: Tensor, weight_norm: float) -> float:
    """Return ||D||_P / ||W||_P, for the forget gradient, its D, and ||W||_P.

    It is the forget loss gained by a step along D over the disturbance of the retained
    outputs that it makes, both to first order, and over the size of these outputs.
    """
    gain = float((forget.double() * direction.double()).sum())
    return gain**0.5 / weight_norm if weight_norm else 0.0


def mean_square_output(weight: Tensor, moment: Tensor, axis: int) -> float:
    """Return tr(W C W^T), the layer's mean squared output over its inputs, bias aside."""
    rows = weight.double()
    if moment.ndim == 1:
        return float((rows.square() * moment.double()).sum())
    rows = rows.reshape(rows.shape[0], -1) if axis == 1 else rows.T
    return float(((rows @ moment.double()) * rows).sum())
