"""Rows as device tensors: prefetched, staged, within the memory there is."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slsgu_cli.clip.towers import SplitTower
from slsgu_cli.records.sets import InputSpec


def spare(device: str) -> int:
    """Return the bytes that activations may take: most of a GPU, a quarter of free memory."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0] * 0.7)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (ValueError, OSError):
        return 2 << 30


S = TypeVar("S")
T = TypeVar("T")
AHEAD = 3


def prefetch(
    read: Callable[[S], T], items: Iterable[S], *, threads: int = 1, ahead: int = AHEAD
) -> Iterator[T]:
    """Yield `read(item)` in order, `ahead` items a thread before the consumer wants them.

    When the consumer stops or is interrupted, what has not begun is dropped.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > ahead * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
