"""The forget gradient itself, as in the paper: steepest ascent in the Euclidean metric."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slsgu_cli.method.directions import Direction, LayerStatistics, Metric

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Euclidean(Metric):
    """The plain inner product of a layer's changes."""

    layer: LayerStatistics

    def steepest(self, gradient: "Tensor") -> "Tensor":
        """Return the gradient, without its effect on fixed inputs."""
        return self.scaled(gradient)

    def scaled(self, gradient: "Tensor") -> "Tensor":
        """Return the gradient, without its effect on fixed inputs."""
        fixed = self.layer.fixed
        if fixed is None:
            return gradient
        from slsgu_cli.method.directions.whitened import span_of

        if gradient.ndim == 1:
            return gradient * 0
        basis = span_of(fixed.double().T).to(gradient)
        inputs_last = self.layer.inputs is None or self.layer.inputs.axis == 1
        rows = gradient if inputs_last else gradient.T
        rows = rows - (rows @ basis) @ basis.T
        return rows if inputs_last else rows.T

    def weight_norm(self) -> float:
        """Return ||W||."""
        return self.layer.weight_norm


@dataclass(frozen=True, slots=True)
class Gradient(Direction):
    """D = G (Eq. 9)."""

    takes_arrays = True

    def metric(self, layer: LayerStatistics) -> Metric:
        """Return the Euclidean metric."""
        return Euclidean(layer)
