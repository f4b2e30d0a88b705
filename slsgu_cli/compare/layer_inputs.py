"""Keys, input covariance and output gradients of a layer.

A layer is a linear map y = W x. A key is its input at the position whose state becomes the
features: the end of a text, or the pooled state of an image.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.clip.batches import (
    IMAGES_PER_FORWARD,
    TEXTS_PER_FORWARD,
    by_length,
    pixel_normalizer,
    spans,
    to_tokens,
)
from slsgu_cli.clip.towers import OpenClipText, text_tower, vision_tower
from slsgu_cli.engine.applied_layers import AppliedLayers, Use
from slsgu_cli.engine.covariance import chosen_rows, exact_device, input_covariances
from slsgu_cli.errors import InputError
from slsgu_cli.records.method import Tower
from slsgu_cli.records.sets import InputSpec
from slsgu_cli.store.blocks import DataBlock


class LastCall(AppliedLayers):
    """While active, records the inputs and outputs of the last call of one layer."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__(model, [layer])
        self.inputs, self.outputs = torch.empty(0), torch.empty(0)

    def applied(self, use: Use, inputs: Iterable[Tensor], outputs: Tensor) -> None:
        """Record a call."""
        (self.inputs,), self.outputs = inputs, outputs


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """The inputs of a layer while the model runs over a block, without gradients.

    At most as many rows run as covariances take.
    """

    model: nn.Module
    layer: str
    block: DataBlock
    spec: InputSpec
    device: str

    def keys(self) -> Tensor:
        """Return the layer's keys (rows, inputs) over the block, of texts in any order.

        A layer of the vision tower must be the projection of image features.
        """
        if Layer.parse(self.layer).tower is Tower.TEXT:
            return torch.cat([_at(call.inputs, ends) for call, _, ends, _ in self._texts()])
        return torch.cat([call.inputs for call, _ in self._images()])

    def value_gradient(self) -> Tensor:
        """Return the mean gradient of 1 - cos(v, t) at a text layer's outputs for its keys."""
        images = torch.cat([features for _, features in self._images()])
        total = torch.zeros((), dtype=torch.float64, device=exact_device(self.device))
        with torch.enable_grad():
            for call, texts, ends, rows in self._texts():
                losses = 1 - (images[rows.to(images.device)] * texts).sum(dim=-1)
                (gradient,) = torch.autograd.grad(losses.sum(), [call.outputs])
                total = total + _at(gradient, ends).to(total.device).double().sum(dim=0)
        return total / len(images)

    def covariance(self) -> Tensor:
        """Return the covariance of all inputs of the layer, fp64 (inputs, inputs)."""
        spec, device = self.spec, self.device
        covariances = input_covariances(
            self.model, [self.layer], self.block, spec=spec, device=device
        )
        return covariances[self.layer].mean()

    def _texts(self) -> Iterator[tuple[LastCall, Tensor, Tensor, Tensor]]:
        """Yield the call, features, the ends of the texts, and the numbers of their rows."""
        tower, call = text_tower(self.model), LastCall(self.model, self.layer)
        if not isinstance(tower, OpenClipText):
            raise InputError("the text tower of this model does not show where its texts end")
        tokens = to_tokens(self.block.tokens[chosen_rows(self.block.rows)], "cpu")
        for rows in by_length(tower, tokens, TEXTS_PER_FORWARD[torch.device(self.device).type]):
            short = tower.trim(tokens[rows]).to(self.device)
            with call:
                features = tower.features(short, short)
            yield call, features, tower.pooled_at(short), rows

    def _images(self) -> Iterator[tuple[LastCall, Tensor]]:
        tower, call = vision_tower(self.model), LastCall(self.model, self.layer)
        normalize, rows = pixel_normalizer(self.spec, self.device), chosen_rows(self.block.rows)
        with progress.bar("images of keys", len(rows)) as ticker:
            size = IMAGES_PER_FORWARD[torch.device(self.device).type]
            for start, stop in spans(len(rows), size):
                pixels = normalize(self.block.take(rows[start:stop]))
                with call:
                    features = tower.features(pixels, pixels)
                yield call, features
                ticker.advance(stop - start)


def _at(states: Tensor, ends: Tensor) -> Tensor:
    """Return the states at the ends of texts; `states` may have only those."""
    return states if states.ndim == 2 else states[torch.arange(len(states)), ends]
