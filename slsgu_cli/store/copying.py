"""Copies of files as fast as `cp` makes them, and bytes overwritten in a copy."""

import os
import shutil
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from slsgu_cli.errors import InputError

BLOCK = 1 << 30
BUFFER = 1 << 23


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes and permissions to a new file, inside the kernel where it can."""
    with source.open("rb", buffering=0) as old:
        status = os.fstat(old.fileno())
        mode = stat.S_IMODE(status.st_mode) | stat.S_IRUSR | stat.S_IWUSR
        new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            copied = _copy_in_kernel(old.fileno(), new, status.st_size)
            old.seek(copied)
            with os.fdopen(os.dup(new), "wb") as rest:
                rest.seek(copied)
                shutil.copyfileobj(old, rest, BUFFER)
            if os.fstat(new).st_size != status.st_size:
                raise InputError(f"{source} changed while it was copied")
        finally:
            os.close(new)


def link_file(source: Path, target: Path) -> bool:
    """Make `target` a hard link to `source`; return False where the system cannot."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False
    return True


def write_at(path: Path, pieces: Iterable[tuple[int, bytes | memoryview]]) -> None:
    """Overwrite bytes of a file at the given offsets."""
    with path.open("r+b", buffering=0) as file:
        for offset, data in pieces:
            file.seek(offset)
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]


def same_place(one: Path, other: Path) -> bool:
    """Return whether two paths are the same file or folder, which need not exist."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _copy_in_kernel(old: int, new: int, size: int) -> int:
    """Copy as many bytes as the kernel can; return their number."""
    copied = 0
    if sys.platform != "linux":
        return copied
    while copied < size:
        try:
            count = os.copy_file_range(old, new, min(BLOCK, size - copied))
        except OSError:
            # Not between these file systems, or the disk is full: plain writes will raise.
            break
        if count == 0:
            break
        copied += count
    return copied
