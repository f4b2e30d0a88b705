"""The inputs of layers for concepts that earlier edits forget, in the metric of the next edit.

Its input covariance is that of the retain set plus that of each earlier concept. So it moves the
outputs on what is forgotten already as little as on the retain set (compare the preserved keys of
AlphaEdit, arXiv 2410.02355).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from slsgu_cli import processes
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.engine.covariance import MOST_ROWS, layer_sums
from slsgu_cli.method.directions import LayerStatistics
from slsgu_cli.records.directions import Statistic
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store


def earlier_keys(
    store: Store, model: nn.Module, sets: Sequence[SetManifest], layers: Sequence[str]
) -> dict[str, Tensor]:
    """Return the sum over `sets` of the input covariances of layers on their forget rows, fp64.

    `model` has the earlier edits. All sets together have at most MOST_ROWS rows, or one each.
    Parameters whose inputs cannot be captured are left out.
    """
    device = str(next(model.parameters()).device)
    parameters = sorted({Layer.parse(layer).parameter for layer in layers})
    keys: dict[str, Tensor] = {}
    for each in sets:
        sums = layer_sums(
            Statistic.INPUTS,
            model,
            parameters,
            DataBlock.open(store, each.forget),
            spec=each.input,
            device=device,
            most=max(1, MOST_ROWS // len(sets)),
        )
        for name, covariance in sums.items():
            keys[name] = keys.get(name, 0.0) + covariance.mean()
    return processes.agreed(keys)


def with_keys(
    layer: str, statistics: LayerStatistics, keys: Mapping[str, Tensor]
) -> LayerStatistics:
    """Return the statistics of a layer, whose inputs are those of earlier concepts too."""
    inputs, added = statistics.inputs, keys.get(Layer.parse(layer).parameter)
    if inputs is None or added is None:
        return statistics
    total = inputs.matrix.double() + added.to(inputs.matrix.device)
    return replace(statistics, inputs=replace(inputs, matrix=total))
