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
        """Return the gradient."""
        return gradient

    def scaled(self, gradient: "Tensor") -> "Tensor":
        """Return the gradient."""
        return gradient

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
