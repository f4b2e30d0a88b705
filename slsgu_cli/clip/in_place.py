"""Edits of a model in memory, for the length of a block."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from slsgu_cli.checkpoints.layers import Layer

# A layer, what is added to it, and a factor on that.
Change = tuple[str, Tensor, float]


@contextmanager
def edited(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the values of layers for the length of a block."""
    originals: dict[str, Tensor] = {}
    try:
        for name, new in values.items():
            layer = Layer.parse(name)
            parameter = model.get_parameter(layer.parameter)
            originals.setdefault(layer.parameter, parameter.data)
            parameter.data = layer.replaced(parameter.data, new=new)
        yield
    finally:
        for name, original in originals.items():
            model.get_parameter(name).data = original


def changed_values(model: nn.Module, changes: Iterable[Change]) -> dict[str, Tensor]:
    """Return the values of parameters after changes; changes of one parameter are summed."""
    values: dict[str, Tensor] = {}
    for name, change, factor in changes:
        layer = Layer.parse(name)
        if layer.parameter not in values:
            values[layer.parameter] = model.get_parameter(layer.parameter).data.clone()
        whole = values[layer.parameter]
        layer.rows(whole).add_(change.to(whole.device), alpha=factor)
    return values
