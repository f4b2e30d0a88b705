"""The direction of a layer, from the gradients and covariances in the store."""

from importlib import import_module
from typing import Any

import numpy as np

from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.errors import NotFiniteError
from slsgu_cli.method.directions import Direction, LayerStatistics
from slsgu_cli.method.scores import Vector
from slsgu_cli.records.directions import DirectionSpec
from slsgu_cli.records.method import GradientPointer
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store


def implementation(spec: DirectionSpec) -> Direction:
    """Return the direction that a record names."""
    module, _, name = spec.entry.implementation.partition(":")
    made: Direction = getattr(import_module(module), name)(**spec.parameters)
    return made


def layer_gradient(store: Store, address: str, name: str) -> Floats:
    """Return the gradient of a layer, fp32, from the gradients at an address of the store.

    Raises NotFiniteError.
    """
    layer = Layer.parse(name)
    path = Artifact.GRADIENT.path(address)
    values: Floats = layer.rows(store.read_tensors(path, [layer.parameter])[layer.parameter])
    if not np.isfinite(values).all():
        raise NotFiniteError(
            f"the stored gradient of {name} holds values that are not finite",
            hint=f"remove {path} from the store and run `slsgu grad` for the set again",
        )
    return values


def operand(values: Floats, direction: Direction, layer: LayerStatistics) -> Any:
    """Return values as a direction takes them: an array, or a tensor on the right device."""
    if direction.takes_arrays:
        return values
    import torch

    tensor = torch.tensor(values)
    return tensor if layer.inputs is None else tensor.to(layer.inputs.matrix.device)


def as_array(values: Any) -> Vector:
    """Return an array, or the array of a tensor."""
    array: Vector = values if isinstance(values, np.ndarray) else values.cpu().numpy()
    return array


def forget_direction(
    store: Store,
    pointer: GradientPointer,
    layer: str,
    direction: DirectionSpec,
    statistics: LayerStatistics,
) -> Floats:
    """Return the direction of a layer, fp32, from its forget gradient and its statistics."""
    chosen = implementation(direction)
    gradient = operand(layer_gradient(store, pointer.forget, layer), chosen, statistics)
    return as_array(chosen.along(gradient, chosen.metric(statistics))).astype(np.float32)
