"""AlphaEdit: an edit in directions that retained inputs hardly use (arXiv 2410.02355)."""

import torch
from torch import Tensor

from slsgu_cli.compare.layer_edits import LayerEdits
from slsgu_cli.compare.registry import ClosedForm, Hyperparameter, register
from slsgu_cli.records.comparison import Method


def change(edits: LayerEdits, layer: str, below: float) -> Tensor:
    """Return the change for the stored forget gradient."""
    forget, covariance = edits.forget_covariance(layer), edits.metric(layer).covariance
    return alphaedit(edits.gradient(layer), forget, covariance, below)


register(
    Method.ALPHAEDIT,
    ClosedForm(
        label="AlphaEdit",
        hyperparameter=Hyperparameter("below", 0.1, (0.01, 0.1, 1.0)),
        gradients=("forget",),
        forget_passes=1,
        change=change,
    ),
)


def alphaedit(gradient: Tensor, forget: Tensor, covariance: Tensor, below: float) -> Tensor:
    """Return R K^T Q (F Q + l I)^-1, with R K^T = G.

    Q projects on the eigenvectors of C with eigenvalues below `below` times their mean, at
    least on that of the smallest one. l is the mean eigenvalue of F.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    quiet = vectors[:, : max(1, int((values < below * values.mean()).sum()))]
    projector = quiet @ quiet.T
    damped = forget.double() @ projector
    damped.diagonal().add_(forget.double().diagonal().mean())
    solved: Tensor = torch.linalg.solve(damped, gradient.double() @ projector, left=False)
    return solved
