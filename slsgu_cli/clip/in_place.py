"""Edits of a model in memory, for the length of a block."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from slsgu_cli.checkpoints.layers import Layer


@contextmanager
def edited(model: nn.Module, name: str, values: Tensor) -> Iterator[None]:
    """Replace a layer's values for the length of a block."""
    layer = Layer.parse(name)
    parameter = model.get_parameter(layer.parameter)
    original = parameter.data
    parameter.data = layer.replaced(original, new=values)
    try:
        yield
    finally:
        parameter.data = original


@contextmanager
def moved(model: nn.Module, moves: Iterable[tuple[str, Tensor, float]]) -> Iterator[None]:
    """Add moves, each a layer's change and its factor, to a model for the length of a block."""
    values: dict[str, Tensor] = {}
    for name, change, factor in moves:
        layer = Layer.parse(name)
        whole = values.get(layer.parameter)
        if whole is None:
            whole = values[layer.parameter] = model.get_parameter(layer.parameter).data.clone()
        layer.rows(whole).add_(change.to(whole.device), alpha=factor)
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(edited(model, name, value))
        yield
