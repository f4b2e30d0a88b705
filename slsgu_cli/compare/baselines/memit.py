"""MEMIT: the forget gradient, whitened by retained and forget inputs (arXiv 2210.07229)."""

from torch import Tensor

from slsgu_cli.compare.layer_edits import LayerEdits
from slsgu_cli.compare.registry import ClosedForm, Hyperparameter, register
from slsgu_cli.method.directions.whitened import RetainMetric
from slsgu_cli.records.comparison import Method


def change(edits: LayerEdits, layer: str, weight: float) -> Tensor:
    """Return the change for the stored forget gradient."""
    forget, metric = edits.forget_covariance(layer), edits.metric(layer)
    return memit(edits.gradient(layer), forget, metric, weight)


register(
    Method.MEMIT,
    ClosedForm(
        label="MEMIT",
        hyperparameter=Hyperparameter("lambda", 10.0, (0.1, 1.0, 10.0, 100.0)),
        gradients=("forget",),
        forget_passes=1,
        change=change,
    ),
)


def memit(gradient: Tensor, forget: Tensor, metric: RetainMetric, weight: float) -> Tensor:
    """Return R K^T (weight P + F)^-1 (Eq. 14), with R K^T = G."""
    return RetainMetric(weight * metric.damped() + forget, 1, 0.0).steepest(gradient)
