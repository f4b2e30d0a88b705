"""The two halves of open_clip's residual blocks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.clip.onednn import linear


def attention_half(
    block: Any,
    x: Tensor,
    *,
    causal: bool = False,
    seen: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Run the attention of an open_clip residual block by one fused projection and kernel.

    `seen` (rows, positions) masks keys. With `keep`, the position of one token a row, return only
    that token, (rows, width): keys and values are computed for all tokens, the rest for one.
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
            before = torch.arange(length, device=x.device) <= keep.unsqueeze(1)
            before = before[:, None, None, :]
            visible = before if visible is None else before & visible
        mixed = F.scaled_dot_product_attention(
            query.view(rows, heads, 1, size), k.transpose(1, 2), v.transpose(1, 2), visible
        ).reshape(rows, width)
        x = x[here]
    projected = linear(mixed, attention.out_proj.weight, attention.out_proj.bias)
    outputs: Tensor = x + block.ls_1(projected)
    return outputs


def mlp_half(block: Any, x: Tensor) -> Tensor:
    """Run the MLP of an open_clip residual block."""
    mlp = block.mlp
    hidden = mlp.gelu(linear(block.ln_2(x), mlp.c_fc.weight, mlp.c_fc.bias))
    outputs: Tensor = x + block.ls_2(linear(hidden, mlp.c_proj.weight, mlp.c_proj.bias))
    return outputs
