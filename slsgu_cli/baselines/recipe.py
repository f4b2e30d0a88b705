"""How the trained baselines train: the paper's optimizer and schedule."""

import math
import re

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.98)
EPSILON = 1e-6
WEIGHT_DECAY = 0.1
# The multiplier of the cosines stays between 1 and 100.
LARGEST_LOGIT_SCALE = math.log(100)
_UNDECAYED = re.compile(r"bn|ln|bias|logit_scale")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay acts on a parameter: matrices, and no norms or biases."""
    return parameter.ndim >= 2 and not _UNDECAYED.search(name)


def adamw(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """Return the optimizer of every parameter of `model`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if is_decayed(name, p) is decayed], "weight_decay": by}
        for decayed, by in ((False, 0.0), (True, WEIGHT_DECAY))
    ]
    fused = all(p.device.type in ("cpu", "cuda") for _, p in named)
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, eps=EPSILON, fused=fused)


def cosine_rate(rate: float, step: int, steps: int) -> float:
    """Return the learning rate of `step` (from 0) of `steps`: from `rate` towards 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps)) * rate


def clamp_logit_scale(model: nn.Module) -> None:
    """Keep logit_scale between 0 and ln 100."""
    with torch.no_grad():
        model.get_parameter("logit_scale").clamp_(0, LARGEST_LOGIT_SCALE)
