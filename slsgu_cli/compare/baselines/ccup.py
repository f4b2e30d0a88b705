"""CCUP: project the text feature of the concept away (arXiv 2512.14137)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.compare.layer_edits import LayerEdits
from slsgu_cli.compare.registry import (
    TEXT_PROJECTION,
    VISION_PROJECTION,
    ClosedForm,
    Hyperparameter,
    register,
)
from slsgu_cli.records.comparison import Method

ALPHA = Hyperparameter("alpha", 1.0, (0.5, 0.9, 1.0))


def change(edits: LayerEdits, layer: str, alpha: float) -> Tensor:
    """Return the change for the mean feature of the forget captions."""
    return ccup(edits.weight(layer), edits.caption_feature(), alpha)


register(
    Method.CCUP_TEXT,
    ClosedForm(
        label="CCUP text", hyperparameter=ALPHA, only=TEXT_PROJECTION, step=1.0, change=change
    ),
)
register(
    Method.CCUP_VISION,
    ClosedForm(
        label="CCUP image",
        hyperparameter=ALPHA,
        only=VISION_PROJECTION,
        step=1.0,
        change=change,
    ),
)


def ccup(weight: Tensor, feature: Tensor, alpha: float) -> Tensor:
    """Return -alpha u u^T W, with u the direction of a text feature."""
    u = F.normalize(feature.double(), dim=0)
    return -alpha * torch.outer(u, u @ weight.double())
