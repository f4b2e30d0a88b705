"""The cross-attention of a UNet: the layers that read the prompt, and edits of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from slsgu_cli.errors import InputError


def cross_attention(unet: nn.Module) -> list[nn.Module]:
    """Return the modules that read the prompt, in order. Raises InputError without any."""
    found = [each for each in unet.modules() if getattr(each, "is_cross_attention", False)]
    if not found:
        raise InputError("the pipeline's UNet has no cross-attention")
    return found


@torch.no_grad()
def edit_layers(unet: nn.Module, names: Sequence[str], edited: Callable[[Tensor], Tensor]) -> None:
    """Replace the weights (outputs, inputs) of layers: `to_k` has the keys, `to_v` the values.

    `edited` gets and returns fp64.
    """
    for attention in cross_attention(unet):
        for name in names:
            weight = attention.get_parameter(f"{name}.weight")
            weight.copy_(edited(weight.double()))
