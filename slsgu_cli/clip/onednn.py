"""Linear layers in fp32 on a CPU by oneDNN, where PyTorch has its operator.

PyTorch leaves fp32 products on a CPU to MKL, which takes more than twice as long as oneDNN on
AMD processors. `tests/bench/bench_grad.py` measures both rates, and a whole pass. The operator is
private to PyTorch: where it is missing, `linear` is F.linear.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

# oneDNN and PyTorch each cache up to 0.4 MB for every number of rows, 1,024 of them by default.
# Texts of many lengths fill that. The variables are read before the first product.
for capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(capacity, "128")

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FastProducts(TorchFunctionMode):
    """While active, `linear` replaces F.linear, in modules of PyTorch too."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, or `linear` for F.linear."""
        return (linear if func is F.linear else func)(*args, **kwargs or {})


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `input` W^T + b (..., outputs), as F.linear does."""
    operands = (input, weight) if bias is None else (input, weight, bias)
    if has_torch_function_variadic(*operands):
        outputs: Tensor = handle_torch_function(linear, operands, input, weight, bias)
    elif not (HAS_ONEDNN and input.ndim > 1 and all(map(_is_supported, operands))):
        outputs = F.linear(input, weight, bias)
    elif torch.is_grad_enabled() and any(each.requires_grad for each in operands):
        outputs = _Linear.apply(input, weight, bias)
    else:
        outputs = product(input, weight, bias)
    return outputs


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b (..., outputs) in fp32 by oneDNN, without a gradient."""
    outputs: Tensor = torch.ops.mkldnn._linear_pointwise(
        _contiguous(x), _contiguous(weight), bias, "none", [], ""
    )
    return outputs


def _contiguous(x: Tensor) -> Tensor:
    """Return a tensor or matrix transpose without gaps: others take oneDNN 100 times as long."""
    if x.is_contiguous() or (x.ndim == 2 and x.T.is_contiguous()):
        return x
    return x.contiguous()


def _is_supported(operand: Tensor) -> bool:
    return (
        type(operand) in (Tensor, nn.Parameter)
        and operand.dtype is torch.float32
        and operand.device.type == "cpu"
        and operand.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(torch.autograd.Function):
    """A linear layer and its gradients by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b."""
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, W and b that are needed."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.flatten(end_dim=-2)
        return (
            product(gradient, weight.T) if needs_x else None,
            product(rows.T, x.flatten(end_dim=-2).T) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )
