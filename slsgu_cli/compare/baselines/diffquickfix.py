"""Diff-QuickFix: edit the first self-attention of the text encoder (arXiv 2310.13730)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slsgu_cli.compare.anchor import anchor_of
from slsgu_cli.compare.layer_edits import LastCall, LayerEdits
from slsgu_cli.compare.pipeline_data import PipelineData, aligned
from slsgu_cli.compare.registry import (
    FIRST_ATTENTION,
    ClosedForm,
    Hyperparameter,
    OnPipeline,
    register,
)
from slsgu_cli.records.comparison import Method
from slsgu_cli.targets.models import LiveEncoder, Pipeline
from slsgu_cli.targets.states import TextStates

LAYER = "transformer.resblocks.0.attn.out_proj.weight"
LAMBDA = Hyperparameter("lambda", 0.01, (0.01, 0.1, 1.0, 10.0))


def change(edits: LayerEdits, layer: str, weight: float) -> Tensor:
    """Return the change that gives the name the anchor's outputs."""
    keys, anchors = edits.named_keys(layer, anchor_of(edits.baselines.pointer.anchor))
    return diffquickfix(edits.weight(layer), keys, anchors, weight)


@torch.no_grad()
def edit(data: PipelineData, weight: float) -> None:
    """Edit each text encoder of the pipeline.

    Keys are those of the name's last token and of all positions after it, padding included.
    """
    for live in data.pipe.encoders:
        keys, anchors = (
            _inputs(data.pipe, live, *each) for each in (data.of_concept(), data.of_anchor())
        )
        value = live.value(LAYER)
        goals = torch.cat(aligned(keys, anchors))
        moved = diffquickfix(value.double(), torch.cat(keys), goals, weight)
        live.put({LAYER: value + moved.to(value.dtype)})


def _inputs(
    pipe: Pipeline, live: LiveEncoder, prompts: Sequence[str], starts: Sequence[int]
) -> list[Tensor]:
    """Return the layer's inputs from a position of each prompt on, (positions, inputs) in fp64."""
    states, call = TextStates(pipe, live), LastCall(live.module, live.places(LAYER)[0].key)
    with call:
        states.read(states.ids(prompts))
    return [rows[start:].double() for rows, start in zip(call.inputs, starts, strict=True)]


register(
    Method.DIFFQUICKFIX,
    ClosedForm(
        label="Diff-QuickFix",
        hyperparameter=LAMBDA,
        only=FIRST_ATTENTION,
        step=1.0,
        change=change,
        on_pipeline=OnPipeline(edit=edit, hyperparameter=LAMBDA, text=True),
    ),
)


def diffquickfix(weight: Tensor, keys: Tensor, anchors: Tensor, ridge: float) -> Tensor:
    """Return the change D (outputs, inputs) that gives `keys` the outputs of `anchors`.

    It minimises the sum of |(W + D) k - W a|^2 over pairs (rows, inputs), plus `ridge` |D|^2.
    """
    k, w = keys.double(), weight.double()
    second = k.T @ k
    second.diagonal().add_(ridge)
    wanted = w @ (anchors.double() - k).T @ k
    solved: Tensor = torch.linalg.solve(second, wanted, left=False)
    return solved
