"""The edit: one layer, W' = W + step * D, applied to a model and undone (Eq. 9)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slsgu_cli.errors import StaleError


@dataclass(frozen=True, slots=True, eq=False)
class LayerEdit:
    """A change of one layer: `step` times `direction` is added to `before`.

    `forget` and `utility` are the figures of the edited model, in percent. `original_forget`
    and `original_utility` are those of the model without the edit.
    """

    layer: str
    step: float
    direction: Tensor
    before: Tensor
    forget: float = float("nan")
    utility: float = float("nan")
    original_forget: float = float("nan")
    original_utility: float = float("nan")

    @property
    def delta(self) -> Tensor:
        """The change of the layer, step * D."""
        return self.step * self.direction

    @property
    def after(self) -> Tensor:
        """The layer's values with the edit."""
        return torch.add(self.before, self.direction, alpha=self.step)

    def apply(self, model: Any) -> None:
        """Edit a model. Raises StaleError where the layer has other values than expected."""
        self._replace(model, self.before, self.after)

    def undo(self, model: Any) -> None:
        """Give the layer its original values, to the bit. Raises StaleError."""
        self._replace(model, self.after, self.before)

    @contextmanager
    def in_place(self, model: Any) -> Iterator[None]:
        """Edit a model for the length of a block."""
        self.apply(model)
        try:
            yield
        finally:
            self.undo(model)

    @torch.no_grad()
    def _replace(self, model: Any, expected: Tensor, values: Tensor) -> None:
        parameter = model.get_parameter(self.layer)
        if not torch.equal(parameter, expected.to(parameter)):
            raise StaleError(
                f"{self.layer} does not have the values that the edit expects",
                hint="apply an edit once, to the model it was made for, and undo it there",
            )
        parameter.copy_(values)
