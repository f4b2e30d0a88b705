"""The cores and the memory that this process may use."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Files of a cgroup, version 2 and version 1: its limit, its use, and the name of the page cache
# that the kernel can reclaim.
CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process can still allocate, by the machine and by its cgroup.

    Page cache counts as free. None if the system reports neither; only Linux does.
    `root` is the folder of `proc` and `sys`.
    """
    available = _figure(root / "proc/meminfo", "MemAvailable:")
    free = [] if available is None else [available << 10]
    for version, folder in _cgroups(root):
        limit_file, usage_file, cache = CGROUP_FILES[version]
        limit, usage = _figure(folder / limit_file), _figure(folder / usage_file)
        if limit is not None and usage is not None:
            free.append(max(0, limit - usage + (_figure(folder / "memory.stat", cache) or 0)))
    return min(free, default=None)


def _cgroups(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the memory cgroups of this process, outwards; a container sees only its own."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, version, path = line.split(":", 2)
            if version in CGROUP_FILES:
                mounted = root / "sys/fs/cgroup" / version
                inner = mounted / path.lstrip("/")
                for folder in (inner, *inner.parents):
                    if folder.is_relative_to(mounted):
                        yield version, folder


def _figure(path: Path, name: str = "") -> int | None:
    """Return the number after `name` in a file, or the first word; None if it is not a number."""
    with suppress(OSError, ValueError, IndexError):
        words = path.read_text().split()
        return int(words[words.index(name) + 1 if name else 0])
    return None
