"""Checks that features and weights are finite."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli.errors import NotFiniteError
from slsgu_cli.text import listed

Ints = npt.NDArray[np.integer]


def require_finite(
    values: Tensor, what: str, rows: Ints | None = None, chosen: Tensor | None = None
) -> Tensor:
    """Return `values` (N, width) unchanged. Raises NotFiniteError naming rows that are not finite.

    `rows` are the names of all rows; `chosen` the indices among them of those in `values`.
    """
    if bool(torch.isfinite(values).all()):
        return values
    broken = (~torch.isfinite(values)).any(dim=1).nonzero().squeeze(1)
    places = (broken if chosen is None else chosen[broken]).cpu().numpy()
    named = listed([str(row) for row in (places if rows is None else rows[places])])
    raise NotFiniteError(
        f"{len(broken)} of {len(values)} {what} are not finite (rows {named})",
        hint="use weights without NaN and infinite values",
    )


def require_finite_elsewhere(model: nn.Module, tokens: Tensor | None) -> None:
    """Raise NotFiniteError for weights that features need not show: unused tokens, scales."""
    scales = [getattr(model, name, None) for name in ("logit_scale", "logit_bias")]
    for values in (tokens, *scales):
        if values is not None:
            rows = len(values) if values.ndim else 1
            require_finite(values.detach().reshape(rows, -1), "weights")


@contextmanager
def counted_by(what: str, *, hint: str | None = None) -> Iterator[None]:
    """Add the model's name and a hint to NotFiniteError, for the length of a block."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{what}: {error.message}", hint=hint or error.hint) from error


@contextmanager
def naming_layers(model: nn.Module) -> Iterator[None]:
    """Add the names of layers that are not finite to NotFiniteError, for the length of a block."""
    try:
        yield
    except NotFiniteError as error:
        weights = model.named_parameters()
        counts = {name: int((~torch.isfinite(weight)).sum()) for name, weight in weights}
        words = [f"{count} in {name}" for name, count in counts.items() if count]
        where = f"; weights that are not finite: {listed(words)}" if words else ""
        raise NotFiniteError(error.message + where, hint=error.hint) from error
