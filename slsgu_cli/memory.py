"""How much memory there is, and sizes as people write them."""

import os
import re

from slsgu_cli.errors import UsageError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Return the bytes meant by `4G`, `512MiB` or `1000000`. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise UsageError(f"{text!r} is not a size", hint="write it like 4G, 512M or 1000000")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def spare(device: str) -> int:
    """Return the bytes that activations may take: most of a GPU, a quarter of free memory."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0] * 0.7)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (ValueError, OSError):
        return 2 << 30
