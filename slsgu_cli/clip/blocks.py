"""open_clip's residual blocks by halves, over packed texts too, and the products of all towers.

PyTorch leaves products in fp32 on a CPU to MKL, which on processors of AMD takes more than twice
as long as oneDNN. So the linear layers of towers are applied by oneDNN where PyTorch has it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

# What is made for a product of every number of rows, up to 0.4 MB each, is kept by oneDNN and by
# PyTorch beside it: of the last 1,024 unless told otherwise before the first one, and gradients of
# many concepts have as many.
for capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(capacity, "128")
HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
# What oneDNN takes.
PLAIN = (Tensor, nn.Parameter)


class FastProducts(TorchFunctionMode):
    """While active, linear layers are applied by `linear`."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make a call, by `linear` where it applies such a layer."""
        return (linear if func is F.linear else func)(*args, **kwargs or {})


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `input` W^T + b (..., outputs), as F.linear does: in fp32 on a CPU by oneDNN."""
    given = (input, weight) if bias is None else (input, weight, bias)
    if has_torch_function_variadic(*given):
        outputs: Tensor = handle_torch_function(linear, given, input, weight, bias)
    elif not (HAS_ONEDNN and input.ndim > 1 and all(map(_fits, given))):
        outputs = F.linear(input, weight, bias)
    elif torch.is_grad_enabled() and any(each.requires_grad for each in given):
        outputs = _Linear.apply(input, weight, bias)
    else:
        outputs = product(input, weight, bias)
    return outputs


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b (..., outputs) in fp32 by oneDNN, without a gradient."""
    laid_out = (_laid_out(x), _laid_out(weight), bias)
    outputs: Tensor = torch.ops.mkldnn._linear_pointwise(*laid_out, "none", [], "")
    return outputs


def _laid_out(x: Tensor) -> Tensor:
    """Return a tensor without gaps: oneDNN takes others a hundred times as long."""
    if x.is_contiguous() or (x.ndim == 2 and x.T.is_contiguous()):
        return x
    return x.contiguous()


def _fits(given: Tensor) -> bool:
    """Return whether oneDNN takes a tensor as it is, and autocast leaves it so."""
    return (
        type(given) in PLAIN
        and given.dtype is torch.float32
        and given.device.type == "cpu"
        and given.numel() > 0
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
        """Return the gradients of x, W and b, where they are wanted."""
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(end_dim=-2)
        return (
            product(gradient, weight.T) if of_x else None,
            product(rows.T, x.flatten(end_dim=-2).T) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def attention_half(
    block: Any,
    x: Tensor,
    *,
    causal: bool = False,
    seen: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Run the attention of an open_clip residual block by one fused projection and kernel.

    With `seen` (rows, positions), what is not seen is hidden from all. With `keep`, the position
    of one token a row, only that token leaves the block, as (rows, width): keys and values of
    all tokens, everything else of one.
    """
    rows, length, width = x.shape
    attention = block.attn
    heads, size = attention.num_heads, width // attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    normed = block.ln_1(x)
    visible = None if seen is None else seen[:, None, None, :]
    if keep is None:
        q, k, v = linear(normed, weight, bias).view(rows, length, 3, heads, size).unbind(2)
        if visible is not None and causal:
            visible = visible & visible.new_ones(length, length).tril()
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            visible,
            is_causal=causal and visible is None,
        )
        mixed = mixed.transpose(1, 2).reshape(rows, length, width)
    else:
        here = (torch.arange(rows, device=x.device), keep.long())
        query = linear(normed[here], weight[:width], None if bias is None else bias[:width])
        packed = linear(normed, weight[width:], None if bias is None else bias[width:])
        k, v = packed.view(rows, length, 2, heads, size).unbind(2)
        if causal:
            before = _up_to(keep, length)
            visible = before if visible is None else before & visible
        mixed = F.scaled_dot_product_attention(
            query.view(rows, heads, 1, size), k.transpose(1, 2), v.transpose(1, 2), visible
        ).reshape(rows, width)
        x = x[here]
    projected = linear(mixed, attention.out_proj.weight, attention.out_proj.bias)
    left: Tensor = x + block.ls_1(projected)
    return left


@dataclass(frozen=True, slots=True)
class Stretch:
    """Positions in a row of packed states: of `rows` prompts `length` each, from `start` on.

    All of these prompts begin with the positions `beginning`, which lie before them; None
    where the stretch is a beginning itself.
    """

    start: int
    rows: int
    length: int
    beginning: range | None

    def of(self, states: Tensor) -> Tensor:
        """Return the states of its positions, (rows, length, ...)."""
        part = states[self.start : self.start + self.rows * self.length]
        return part.view(self.rows, self.length, *states.shape[1:])

    def with_beginning(self, states: Tensor) -> Tensor:
        """Return the states of the prompts from their beginning on."""
        rest = self.of(states)
        if not self.beginning:
            return rest
        before = states[self.beginning.start : self.beginning.stop]
        return torch.cat([before.expand(self.rows, *before.shape), rest], dim=1)


def stretched_attention(
    block: Any, x: Tensor, stretches: Sequence[Stretch], *, ends: bool = False
) -> Tensor:
    """Run the causal attention of an open_clip residual block over packed states.

    With `ends`, only the last position of each prompt leaves it, stretch by stretch; of
    beginnings none does.
    """
    attention, width = block.attn, x.shape[1]
    projected = linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    states = projected.view(len(x), 3, attention.num_heads, width // attention.num_heads)
    mixed, leaving = [], []
    for stretch in stretches:
        if ends and stretch.beginning is None:
            continue
        query = stretch.of(states[:, 0])
        keys, values = stretch.with_beginning(states[:, 1:]).unbind(2)
        if ends:
            query = query[:, -1:]
            leaving.append(stretch.of(x)[:, -1])
        length = query.shape[1]
        before = keys.shape[1] - length
        after = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            _causal_mask(before, length, x.device) if before and length > 1 else None,
            is_causal=not before,
        )
        mixed.append(after.transpose(1, 2).reshape(-1, width))
    projected = linear(torch.cat(mixed), attention.out_proj.weight, attention.out_proj.bias)
    added: Tensor = block.ls_1(projected)
    return (torch.cat(leaving) if ends else x) + added


@lru_cache(maxsize=256)
def _causal_mask(before: int, length: int, device: torch.device) -> Tensor:
    """Return what each of `length` positions may look at, `before` ones lying before them."""
    return torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)


def mlp_half(block: Any, x: Tensor) -> Tensor:
    """Run the MLP of an open_clip residual block."""
    mlp = block.mlp
    hidden = mlp.gelu(linear(block.ln_2(x), mlp.c_fc.weight, mlp.c_fc.bias))
    left: Tensor = x + block.ls_2(linear(hidden, mlp.c_proj.weight, mlp.c_proj.bias))
    return left


def _up_to(keep: Tensor, length: int) -> Tensor:
    """Return which positions the kept token of each row may look at."""
    return (torch.arange(length, device=keep.device) <= keep.unsqueeze(1))[:, None, None, :]
