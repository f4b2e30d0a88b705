"""The direction of a layer, from what the store has."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.engine.stored_covariances import Covariances
from slsgu_cli.errors import InputError, NotFiniteError
from slsgu_cli.method.directions import Direction, LayerStatistics
from slsgu_cli.method.scores import Vector
from slsgu_cli.records.directions import FALLBACK, DirectionSpec
from slsgu_cli.records.method import GradientPointer
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from torch import Tensor


def implementation(spec: DirectionSpec) -> Direction:
    """Return the direction that a record names."""
    module, _, name = spec.entry.implementation.partition(":")
    made: Direction = getattr(import_module(module), name)(**spec.parameters)
    return made


def layer_gradient(store: Store, address: str, name: str) -> Floats:
    """Return fp32 the gradient of a layer from the gradients at an address of the store.

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


def forget_direction(
    store: Store,
    pointer: GradientPointer,
    layer: str,
    *,
    direction: DirectionSpec,
    covariances: Covariances | None,
) -> Floats:
    """Return fp32 where a layer moves. Raises InputError where it lacks what that needs."""
    inputs = None
    if direction.needs_inputs:
        if covariances is None or not covariances.has(layer):
            raise InputError(
                f"{layer} cannot move along {direction}: the inputs of the layer are not known, "
                "since its tower does not show them",
                hint=f"--direction {FALLBACK.kind}, or another layer",
            )
        inputs = covariances.inputs(layer)
    chosen = implementation(direction)
    statistics = LayerStatistics(weight_norm=1.0, inputs=inputs)
    gradient = operand(layer_gradient(store, pointer.forget, layer), chosen, statistics)
    return as_array(chosen.along(gradient, chosen.metric(statistics)))


def operand(values: Floats, direction: Direction, layer: LayerStatistics) -> Any:
    """Return values as a direction takes them: a tensor, where the layer's inputs are."""
    if direction.takes_arrays:
        return values
    import torch

    tensor: Tensor = torch.tensor(values)
    return tensor if layer.inputs is None else tensor.to(layer.inputs.matrix.device)


def as_array(values: Any) -> Floats:
    """Return the fp32 array of an array or a tensor."""
    array: Floats = values if isinstance(values, np.ndarray) else values.float().cpu().numpy()
    return array


def as_vector(values: Any) -> Vector:
    """Return the entries of an array or a tensor in the order in which they lie in memory."""
    array: Vector = values if isinstance(values, np.ndarray) else values.cpu().numpy()
    return array.ravel(order="K")
