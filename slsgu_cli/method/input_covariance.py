"""The covariance of what each layer is applied to on the retain set, C = E[x x^T].

An input counts where it can influence the features: where the gradient of the features with
respect to the layer's output is not zero. So padding behind the end of a text does not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from slsgu_cli.method.directions import InputCovariance
from slsgu_cli.method.directions.whitened import mean_square_output
from slsgu_cli.method.gradient import Pairs

ATTENTION = F.multi_head_attention_forward
ARGUMENTS = tuple(signature(ATTENTION).parameters)


def input_covariances(
    model: Any, layers: Sequence[str], pairs: Pairs
) -> dict[str, InputCovariance]:
    """Return the input covariances of layers over pairs of images and texts.

    Layers that are applied by other functions than linear maps, convolutions of patches, layer
    norms and attention have none.
    """
    weights = {name: model.get_parameter(name) for name in layers}
    seen = _Seen({weight.data_ptr(): name for name, weight in weights.items()}, {})
    for images, texts in pairs:
        with _Capture(seen):
            output = model.encode_image(images).sum() + model.encode_text(texts).sum()
        torch.autograd.grad(output, list(weights.values()), allow_unused=True)
    covariances = {}
    for name, (total, count, axis) in seen.sums.items():
        mean = total / count
        output = mean_square_output(weights[name].detach(), mean, axis)
        covariances[name] = InputCovariance(mean, axis, output)
    return covariances


@dataclass(slots=True)
class _Seen:
    """The layers by the address of their weights; their sums of x x^T, counts and axes."""

    names: dict[int, str]
    sums: dict[str, tuple[Tensor, Tensor, int]]

    def watch(self, weight: Any, inputs: Tensor, outputs: Tensor, axis: int) -> None:
        """Add the inputs of a call once the gradient of its outputs is known.

        Inputs are (..., inputs), and outputs (..., outputs), or of patches (rows, outputs, ...).
        """
        name = self.names.get(weight.data_ptr()) if isinstance(weight, Tensor) else None
        if name is not None and outputs.requires_grad:
            x = inputs.detach().reshape(-1, inputs.shape[-1]).double()
            vector = weight.ndim == 1
            hook = partial(self._add, name, x, axis=axis, vector=vector)
            outputs.register_hook(hook)  # type: ignore[no-untyped-call]

    def _add(self, name: str, x: Tensor, gradient: Tensor, *, axis: int, vector: bool) -> None:
        by_input = gradient.flatten(2).mT if gradient.ndim == 4 else gradient
        counts = (by_input.reshape(len(x), -1) != 0).double().mean(dim=1)
        squares = (counts[:, None] * x * x).sum(dim=0) if vector else (counts[:, None] * x).T @ x
        total, count, _ = self.sums.get(name, (0.0, 0.0, axis))
        self.sums[name] = (total + squares, count + counts.sum(), axis)


class _Capture(TorchFunctionMode):
    """While active, watches the calls that apply a layer."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make a call, and watch its inputs and outputs where it applies a layer."""
        kwargs = kwargs or {}
        if func is ATTENTION:
            return self._attend(dict(zip(ARGUMENTS, args, strict=False)) | kwargs)
        outputs = func(*args, **kwargs)
        if func is F.linear:
            self.seen.watch(args[1], args[0], outputs, axis=1)
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            self.seen.watch(args[1], args[0], outputs, axis=0)
        elif func is F.layer_norm:
            named = dict(zip(("input", "normalized_shape", "weight"), args, strict=False)) | kwargs
            normed = F.layer_norm(named["input"], named["normalized_shape"], eps=named["eps"])
            self.seen.watch(named["weight"], normed, outputs, axis=0)
        elif func is F.conv2d and tuple(args[3]) == tuple(args[1].shape[2:]):
            patches = F.unfold(args[0], args[1].shape[2:], stride=args[3]).mT
            self.seen.watch(args[1], patches, outputs, axis=1)
        return outputs

    def _attend(self, named: dict[str, Any]) -> Any:
        """Run self-attention in three calls: the projection of q, k and v, mixing, projection."""
        x, fused = named["query"], named["in_proj_weight"]
        if fused is None or not x is named["key"] is named["value"]:
            return ATTENTION(**named)
        identity = torch.eye(x.shape[-1]).to(x)
        projected = F.linear(x, fused, named["in_proj_bias"])
        self.seen.watch(fused, x, projected, axis=1)
        parts = zip(("query", "key", "value"), projected.chunk(3, dim=-1), strict=True)
        mixing: dict[str, Any] = {
            **dict(parts),
            **dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), identity),
            **dict.fromkeys(("in_proj_weight", "in_proj_bias", "out_proj_bias")),
            "out_proj_weight": identity,
            "use_separate_proj_weight": True,
        }
        mixed, weights = ATTENTION(**named | mixing)
        outputs = F.linear(mixed, named["out_proj_weight"], named["out_proj_bias"])
        self.seen.watch(named["out_proj_weight"], mixed, outputs, axis=1)
        return outputs, weights
