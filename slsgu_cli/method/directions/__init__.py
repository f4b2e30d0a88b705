"""Where a layer moves, and the metric in which the move is measured."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class InputCovariance:
    """The uncentred covariance C = E[x x^T] of what a layer is applied to on the retain set.

    `matrix` is C (inputs, inputs), its diagonal (inputs,) for a norm or scale, or blocks
    (groups, inputs, inputs) for a convolution in groups. `axis` is the weight's axis of inputs,
    and `output` the layer's mean squared output, tr(W C W^T).
    """

    matrix: "Tensor"
    axis: int
    output: float


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """What a direction may know of a layer: its norm, and the statistics that it `needs`.

    `derivatives` is B = E[g g^T] (outputs, outputs), or its diagonal for a norm or scale: g is the
    derivative of a unit feature, projected on a random vector, with respect to the layer's outputs,
    and the mean is over retained rows, of sums over positions. `fixed` are inputs (rows, inputs)
    for which the layer's outputs must stay as they are.
    """

    weight_norm: float
    inputs: InputCovariance | None = None
    derivatives: "Tensor | None" = None
    fixed: "Tensor | None" = None


class Metric(ABC):
    """An inner product <A, B> of changes of one layer, and so a norm of them."""

    @abstractmethod
    def steepest(self, gradient: "Tensor") -> "Tensor":
        """Return the direction D of steepest ascent: <D, A> is the plain product of G and A."""

    @abstractmethod
    def scaled(self, gradient: "Tensor") -> "Tensor":
        """Return S(G), whose plain products S(G) . S(H) are <D_G, D_H>: for Eq. 7 and 8."""

    @abstractmethod
    def weight_norm(self) -> float:
        """Return the norm of the layer itself."""


class Direction(ABC):
    """A direction: steepest ascent of the forget loss in a metric of its own.

    `needs` names the fields of LayerStatistics that its metric is made of. With `first`, a search
    tries that many layers of each tower, by importance alone, without it the Pareto front. One that
    `takes_arrays` works on numpy arrays as well, without PyTorch.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    first: ClassVar[int | None] = None
    takes_arrays = False

    @abstractmethod
    def metric(self, layer: LayerStatistics) -> Metric:
        """Return the metric of a layer's changes."""

    def along(self, gradient: "Tensor", metric: Metric) -> "Tensor":
        """Return D in the shape of the forget gradient: W + step * D ascends the forget loss."""
        return metric.steepest(gradient)
