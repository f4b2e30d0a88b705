"""The statistics of each layer on the retain set: what it is applied to, and what it does.

`inputs` is the covariance C = E[x x^T] of the layer's inputs. An input counts where it can
influence the features, so padding behind the end of a text does not count. `derivatives` is
B = E[g g^T] with the derivatives g of the features with respect to the layer's outputs. Layers
that widen have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from slsgu_cli.method.directions import InputCovariance, LayerStatistics
from slsgu_cli.method.directions.whitened import mean_square_output
from slsgu_cli.method.gradient import Pairs

ATTENTION = F.multi_head_attention_forward
ARGUMENTS = tuple(signature(ATTENTION).parameters)


def layer_statistics(
    model: Any, layers: Sequence[str], pairs: Pairs, *, seed: int = 0
) -> dict[str, LayerStatistics]:
    """Return the statistics of layers over pairs of images and texts.

    The features of each pair are projected on a vector drawn by `seed`. Layers that are applied by
    other functions than linear maps, convolutions of patches, layer norms and attention have no
    statistics.
    """
    weights = {name: model.get_parameter(name) for name in layers}
    seen = _Seen({weight.data_ptr(): name for name, weight in weights.items()})
    rows = 0
    for number, (images, texts) in enumerate(pairs):
        with _Capture(seen):
            v = F.normalize(model.encode_image(images), dim=-1)
            t = F.normalize(model.encode_text(texts), dim=-1)
        drawn = projection(v, seed + number)
        projected = (v * drawn).sum() + (t * drawn).sum()
        torch.autograd.grad(projected, list(weights.values()), allow_unused=True)
        rows += len(images)
    statistics = {}
    for name, (squares, count, axis) in seen.inputs.items():
        weight, mean = weights[name].detach(), squares / count
        inputs = InputCovariance(mean, axis, mean_square_output(weight, mean, axis))
        squares = seen.derivatives[name]
        has_factor = weight.ndim == 1 or not widens(len(squares), weight.numel())
        derivatives = squares / rows if has_factor else None
        statistics[name] = LayerStatistics(float(weight.double().norm()), inputs, derivatives)
    return statistics


def projection(features: Tensor, seed: int) -> Tensor:
    """Return standard normal vectors of the shape of features (rows, width), drawn by `seed`.

    The mean of (g . u)^2 over such vectors u is |g|^2.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(features.shape, generator=generator).to(features)


def widens(outputs: int, entries: int, groups: int = 1) -> bool:
    """Return whether a matrix has more outputs than inputs, as the first one of an MLP.

    Its move passes a nonlinearity before it reaches the residual stream, so its first-order gain
    is far too high, and the derivatives at its outputs would cost the most.
    """
    return outputs**2 > entries * groups


@dataclass(slots=True)
class _Seen:
    """The layers by the address of their weights.

    `inputs` has their sums of x x^T, counts and axes of inputs, `derivatives` their sums of g g^T.
    """

    names: dict[int, str]
    inputs: dict[str, tuple[Tensor, Tensor, int]] = field(default_factory=dict)
    derivatives: dict[str, Tensor] = field(default_factory=dict)

    def watch(self, weight: Any, inputs: Tensor, outputs: Tensor, axis: int) -> None:
        """Add a call of a layer once the derivatives at its outputs are known.

        Inputs are (..., inputs), and outputs (..., outputs), or of patches (rows, outputs, ...).
        """
        name = self.names.get(weight.data_ptr()) if isinstance(weight, Tensor) else None
        if name is not None and outputs.requires_grad:
            x = inputs.detach().reshape(-1, inputs.shape[-1]).double()
            vector = weight.ndim == 1
            hook = partial(self._add, name, x, axis=axis, vector=vector)
            outputs.register_hook(hook)  # type: ignore[no-untyped-call]

    def _add(self, name: str, x: Tensor, derivatives: Tensor, *, axis: int, vector: bool) -> None:
        outputs_last = derivatives.flatten(2).mT if derivatives.ndim == 4 else derivatives
        g = outputs_last.reshape(len(x), -1).double()
        counts = (g != 0).double().mean(dim=1, keepdim=True)
        total, count, _ = self.inputs.get(name, (0.0, 0.0, axis))
        squares = (counts * x * x).sum(dim=0) if vector else (counts * x).T @ x
        self.inputs[name] = (total + squares, count + counts.sum(), axis)
        squares = (g * g).sum(dim=0) if vector else g.T @ g
        self.derivatives[name] = self.derivatives.get(name, 0.0) + squares


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
