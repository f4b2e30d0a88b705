"""The memory of a device and of this process."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from slsgu_cli import processes
from slsgu_cli.machine import free_memory

# Free bytes to assume if the system does not report them.
ASSUMED_FREE = 8 << 30


def spare(device: str) -> int:
    """Return the bytes for activations: 70% of a GPU's free memory, or a quarter of the host's."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0] * 0.7)
    free = free_memory()
    return processes.local_share((ASSUMED_FREE if free is None else free) // 4)


def return_memory() -> None:
    """Return freed memory that glibc and pyarrow still hold to the system."""
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak(device: str) -> None:
    """Reset what `peak_memory` measures."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # If the system does not let it be reset, `peak_memory` returns None.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int | None:
    """Return the most bytes in use since `reset_peak`, on the GPU or by this process.

    None if the system does not report it: only Linux does for a process.
    """
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = status.partition("VmHWM:")[2].split()
    return int(peak[0]) << 10 if peak and os.access("/proc/self/clear_refs", os.W_OK) else None
