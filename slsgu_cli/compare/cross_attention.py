"""The cross-attention of a UNet: the layers that read the prompt, and edits of its values."""

from collections.abc import Callable

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
def edit_values(unet: nn.Module, edited: Callable[[Tensor], Tensor]) -> None:
    """Replace the weight (outputs, inputs) of each value layer; `edited` gets and gives fp64."""
    for attention in cross_attention(unet):
        weight = attention.get_parameter("to_v.weight")
        weight.copy_(edited(weight.double()))
