"""Rows of a data block as device tensors, read ahead of the arithmetic."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slsgu_cli.records import InputSpec
from slsgu_cli.towers import SplitTower

Images = npt.NDArray[np.uint8]
Pixels = Callable[[Images | Tensor], Tensor]


def staged(images: Images, device: str) -> Tensor:
    """Return images on the host as `device` takes them without anyone waiting.

    It copies them once for a CUDA device: to be called where they are read ahead.
    """
    raw = torch.from_numpy(images)
    return raw.pin_memory() if device.startswith("cuda") else raw


def pixel_normalizer(spec: InputSpec, device: str) -> Pixels:
    """Return uint8 (N, H, W, 3) to normalised fp32 (N, 3, H, W) on `device`.

    The arithmetic is that of torchvision's ToTensor and Normalize, in the same order.
    """
    mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(spec.std, device=device).view(1, -1, 1, 1)

    def normalize(images: Images | Tensor) -> Tensor:
        raw = images if isinstance(images, Tensor) else staged(images, device)
        raw = raw.to(device, non_blocking=True)
        return raw.permute(0, 3, 1, 2).float().div(255).sub(mean).div(std)

    return normalize


def spans(rows: int, size: int) -> list[tuple[int, int]]:
    """Return (start, stop) of consecutive runs of `size` rows; the last may be shorter."""
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def by_length(tower: SplitTower, tokens: Tensor, size: int) -> list[Tensor]:
    """Return row indices in groups of about `size`, rows of similar length together."""
    if tokens.shape[0] <= size:
        return [torch.arange(tokens.shape[0])]
    order = torch.argsort(tower.lengths(tokens), stable=True)
    return list(torch.split(order, size))


def text_features(tower: SplitTower, tokens: Tensor, size: int, device: str) -> Tensor:
    """Return unit text features of `tokens` (N, L), each group at its own length.

    `tokens` are on the host, where lengths are known without waiting for the device.
    """
    groups = by_length(tower, tokens, size)
    parts = []
    for rows in groups:
        short = tower.trim(tokens[rows]).to(device, non_blocking=True)
        parts.append(tower.features(short, short))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.argsort(torch.cat(groups)).to(device)]


def to_tokens(tokens: npt.NDArray[np.integer], device: str) -> Tensor:
    """Return token ids as an int64 tensor on `device`."""
    return torch.as_tensor(np.asarray(tokens), dtype=torch.long, device=device)
