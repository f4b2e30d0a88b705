"""UCE: give the keys of the concept the outputs of a guide (arXiv 2308.14761)."""

import torch
from torch import Tensor

from slsgu_cli.compare.baselines.memit import memit
from slsgu_cli.compare.cross_attention import edit_layers
from slsgu_cli.compare.layer_edits import LayerEdits
from slsgu_cli.compare.pipeline_data import PipelineData
from slsgu_cli.compare.registry import ClosedForm, Hyperparameter, OnPipeline, register
from slsgu_cli.method.directions.whitened import RetainMetric
from slsgu_cli.records.comparison import Method
from slsgu_cli.records.directions import DAMPING


def change(edits: LayerEdits, layer: str, preserve: float) -> Tensor:
    """Return the change that guides forget keys to the mean retain key."""
    keys, guide = edits.keys(layer, "forget"), edits.keys(layer, "retain").mean(dim=0)
    return uce(edits.weight(layer), keys, guide, edits.metric(layer), preserve)


def edit(data: PipelineData, preserve: float) -> None:
    """Guide the concept to the anchor in the key and value layers of the pipeline's UNet."""
    (keys, anchors), retained = map(torch.cat, data.keys()), data.retained_keys()
    metric = RetainMetric(retained.T @ retained / len(retained), 1, DAMPING)

    def edited(weight: Tensor) -> Tensor:
        guided = weight @ (anchors - keys).T @ keys / len(keys)
        return weight + memit(guided, keys.T @ keys / len(keys), metric, preserve)

    edit_layers(data.denoiser.unet, ("to_k", "to_v"), edited)


register(
    Method.UCE,
    ClosedForm(
        label="UCE",
        hyperparameter=Hyperparameter("preserve", 1.0, (0.1, 1.0, 10.0, 100.0)),
        # The change already has the right length.
        first_step=1.0,
        change=change,
        on_pipeline=OnPipeline(
            edit=edit, hyperparameter=Hyperparameter("preserve", 1.0, (0.1, 1.0, 10.0))
        ),
    ),
)


def uce(
    weight: Tensor, keys: Tensor, guide: Tensor, metric: RetainMetric, preserve: float
) -> Tensor:
    """Return the change that gives keys (rows, inputs) the output of `guide` (inputs,).

    E[(W g - W k) k^T] (E[k k^T] + preserve P)^-1, with expectations over the keys.
    """
    k, w = keys.double(), weight.double()
    second = k.T @ k / len(k)
    target = torch.outer(w @ guide.double(), k.mean(dim=0)) - w @ second
    return memit(target, second, metric, preserve)
