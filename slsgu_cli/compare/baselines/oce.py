"""OCE: rotate the values of a UNet's cross-attention away from the concept (arXiv 2605.28902)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.compare.cross_attention import edit_layers
from slsgu_cli.compare.pipeline_data import PipelineData
from slsgu_cli.compare.registry import Baseline, Hyperparameter, OnPipeline, register
from slsgu_cli.records.comparison import Method

# The weights of the inputs over retain captions and of the identity.
PRESERVE, IDENTITY = 0.5, 1.5


def edit(data: PipelineData, erase: float) -> None:
    """Rotate the value layers of the pipeline's UNet."""
    (keys, anchors), retained = map(few, data.keys()), data.retained_keys()
    covariance = retained.T @ retained / len(retained)
    edit_layers(
        data.denoiser.unet,
        ("to_v",),
        lambda weight: rotation(weight, keys, anchors, covariance, erase) @ weight,
    )


register(
    Method.OCE,
    Baseline(
        label="OCE",
        on_pipeline=OnPipeline(
            edit=edit, hyperparameter=Hyperparameter("erase", 1.0, (1.0, 3.0, 10.0))
        ),
    ),
)


def rotation(
    weight: Tensor, keys: Tensor, anchors: Tensor, covariance: Tensor, erase: float
) -> Tensor:
    """Return the rotation (outputs, outputs) of a layer's outputs.

    It maximises tr(P^T M) over rotations P (Procrustes), with M = -erase R (I - R*) + W (PRESERVE
    C + IDENTITY I) W^T. R and R* project on the outputs for `keys` and `anchors`, both
    (rows, inputs); C is the `covariance` of inputs to preserve.
    """
    kept = PRESERVE * covariance + IDENTITY * torch.eye(len(covariance)).to(covariance)
    of_keys, of_anchors = (projector(weight @ each.T) for each in (keys, anchors))
    return nearest_rotation(weight @ kept @ weight.T - erase * (of_keys - of_keys @ of_anchors))


def few(keys: Sequence[Tensor]) -> Tensor:
    """Return two keys for each prompt: that of its name, and the mean of those after it."""
    return torch.cat([torch.stack([rows[0], rows[1:].mean(dim=0)]) for rows in keys])


def projector(columns: Tensor) -> Tensor:
    """Return the orthogonal projector on the span of columns."""
    unit = F.normalize(columns, dim=0)
    basis, sizes, _ = torch.linalg.svd(unit, full_matrices=False)
    span: Tensor = basis[:, sizes > 1e-6 * sizes[0]]
    return span @ span.T


def nearest_rotation(matrix: Tensor) -> Tensor:
    """Return the rotation P with the largest tr(P^T M)."""
    left, _, right = torch.linalg.svd(matrix)
    left[:, -1] *= torch.linalg.det(left @ right).sign()
    rotation: Tensor = left @ right
    return rotation
