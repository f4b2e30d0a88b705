"""ROME: move the output of one key, disturbing retained inputs least (arXiv 2202.05262)."""

import torch
from torch import Tensor

from slsgu_cli.compare.layer_edits import LayerEdits
from slsgu_cli.compare.registry import ClosedForm, Hyperparameter, register
from slsgu_cli.method.directions.whitened import RetainMetric
from slsgu_cli.records.comparison import Method


def change(edits: LayerEdits, layer: str, damping: float) -> Tensor:
    """Return the change for the mean forget key, along the gradient at its output."""
    key = edits.keys(layer, "forget").mean(dim=0)
    return rome(edits.value_gradient(layer), key, edits.metric(layer, damping))


register(
    Method.ROME,
    ClosedForm(
        label="ROME",
        hyperparameter=Hyperparameter("damping", 0.01, (0.001, 0.01, 0.1, 1.0)),
        forget_passes=1,
        change=change,
    ),
)


def rome(value: Tensor, key: Tensor, metric: RetainMetric) -> Tensor:
    """Return the change (outputs, inputs) that moves the output of one key by `value`.

    value (P^-1 k)^T / (k^T P^-1 k) has the least mean square over retained inputs of all such
    changes (Eq. 2).
    """
    along = metric.steepest(key[None])[0]
    return torch.outer(value.double(), along) / (key.double() @ along)
