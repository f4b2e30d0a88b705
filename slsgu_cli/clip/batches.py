"""Batches of images and texts on the device of a model."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slsgu_cli.clip.towers import SplitTower
from slsgu_cli.records.sets import InputSpec

Images = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.integer]
Pixels = Callable[[Images | Tensor], Tensor]
# Images and texts in one forward. With more images on a CPU, the system allocates the large
# intermediate tensors again for every product, page by page.
IMAGES_PER_FORWARD = {"cpu": 16, "cuda": 1024, "mps": 256}
TEXTS_PER_FORWARD = {"cpu": 32, "cuda": 512, "mps": 128}


def staged(images: Images, device: str) -> Tensor:
    """Return images in host memory from which copies to `device` do not block.

    For a CUDA device this is a copy: call it in the thread that reads ahead.
    """
    raw = torch.from_numpy(images)
    if not device.startswith("cuda"):
        return raw
    # Threads start on the first GPU, where every process would allocate memory.
    with torch.cuda.device(device):
        return raw.pin_memory()


def pixel_normalizer(spec: InputSpec, device: str) -> Pixels:
    """Return uint8 (N, H, W, 3) to normalised fp32 (N, 3, H, W) on `device`.

    The arithmetic is that of torchvision's ToTensor and Normalize, in the same order. On a CPU
    the memory format is channels first: with channels last, PyTorch 2.14 crashes in the backward
    of convolutions such as FastViT's.
    """
    layout = torch.contiguous_format if device == "cpu" else torch.preserve_format
    mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(spec.std, device=device).view(1, -1, 1, 1)

    def normalize(images: Images | Tensor) -> Tensor:
        raw = images if isinstance(images, Tensor) else staged(images, device)
        raw = raw.to(device, non_blocking=True)
        pixels = raw.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
        return pixels.div(255).sub(mean).div(std)

    return normalize


def spans(rows: int, size: int) -> list[tuple[int, int]]:
    """Return (start, stop) of consecutive runs of `size` rows; the last may be shorter."""
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def even_spans(rows: int, size: int) -> list[tuple[int, int]]:
    """Return (start, stop) of the fewest equal consecutive runs of at most `size` rows."""
    parts = -(-rows // size)
    return list(pairwise(rows * part // parts for part in range(parts + 1))) if parts else []


def by_length(tower: SplitTower, tokens: Tensor, size: int) -> list[Tensor]:
    """Return row indices in groups of `size`, rows of similar length together."""
    if tokens.shape[0] <= size:
        return [torch.arange(tokens.shape[0])]
    order = torch.argsort(tower.lengths(tokens), stable=True)
    return list(torch.split(order, size))


def text_features(tower: SplitTower, tokens: Tensor, device: str) -> Tensor:
    """Return unit text features of `tokens` (N, L), each group at its own length.

    `tokens` are on the host, so that reading their lengths does not wait for the device.
    """
    groups = by_length(tower, tokens, TEXTS_PER_FORWARD[torch.device(device).type])
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
