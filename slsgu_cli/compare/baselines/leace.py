"""LEACE: erase what a projection linearly says about the concept (arXiv 2306.03819)."""

from torch import Tensor

from slsgu_cli.compare.baselines.rome import rome
from slsgu_cli.compare.layer_edits import LayerEdits
from slsgu_cli.compare.registry import (
    TEXT_PROJECTION,
    VISION_PROJECTION,
    ClosedForm,
    Hyperparameter,
    register,
)
from slsgu_cli.method.directions.whitened import RetainMetric
from slsgu_cli.records.comparison import Method

DAMPING = Hyperparameter("damping", 0.01, (0.001, 0.01, 0.1, 1.0))


def change(edits: LayerEdits, layer: str, damping: float) -> Tensor:
    """Return the change that erases the difference of mean keys."""
    apart = edits.keys(layer, "forget").mean(dim=0) - edits.keys(layer, "retain").mean(dim=0)
    return leace(edits.weight(layer), apart, edits.metric(layer, damping))


register(
    Method.LEACE_TEXT,
    ClosedForm(
        label="LEACE text",
        hyperparameter=DAMPING,
        only=TEXT_PROJECTION,
        step=1.0,
        change=change,
    ),
)
register(
    Method.LEACE_VISION,
    ClosedForm(
        label="LEACE image",
        hyperparameter=DAMPING,
        only=VISION_PROJECTION,
        step=1.0,
        change=change,
    ),
)


def leace(weight: Tensor, apart: Tensor, metric: RetainMetric) -> Tensor:
    """Return the change after which no output covaries with a label.

    -W m (P^-1 m)^T / (m^T P^-1 m), where m = `apart` is the difference of the mean inputs with
    either label. Of all linear A with A m = 0, it moves retained inputs least (LEACE of rank
    one, without its shift of the mean).
    """
    return -rome(weight.double() @ apart.double(), apart, metric)
