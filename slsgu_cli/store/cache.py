"""Local copies of remote tensors, bounded in size."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slsgu_cli.store.atomic import partial_name

# The environment variables for the folder of the copies and their total size.
CACHE, CACHE_SIZE = "SLSGU_CACHE", "SLSGU_CACHE_SIZE"
DEFAULT_SIZE = "20G"

# Copies read within this many seconds are not removed: a process may be about to open one.
RECENT = 60.0


@contextmanager
def cached(identity: str, fetch: Callable[[Path], object]) -> Iterator[Path]:
    """Yield a local copy of a remote file, fetched unless the cache has it.

    Its name is a digest of its `identity`: its URL and its state. If the cache cannot be written,
    the copy is removed after the block.
    """
    folder = cache_folder()
    copy = folder / hashlib.sha256(identity.encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if copy.exists():
            # Update only the time of access, which decides the copies to remove first.
            os.utime(copy, (time.time(), copy.stat().st_mtime))
        else:
            partial = folder / partial_name(copy.name)
            try:
                fetch(partial)
                partial.replace(copy)
            finally:
                partial.unlink(missing_ok=True)
            _make_room(folder)
    except PermissionError:
        with tempfile.TemporaryDirectory(prefix="slsgu-") as temporary:
            fetch(Path(temporary, copy.name))
            yield Path(temporary, copy.name)
        return
    yield copy


def cache_folder() -> Path:
    """Return the folder of copies of remote tensors."""
    if named := os.environ.get(CACHE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "slsgu", "tensors")


def _make_room(folder: Path) -> None:
    """Remove the least recently read copies until the others are within bounds."""
    from slsgu_cli.records.option_fields import bytes_of

    most = bytes_of(CACHE_SIZE, os.environ.get(CACHE_SIZE, DEFAULT_SIZE))
    copies = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            copies.append((path.stat().st_atime, path.stat().st_size, path))
    total = sum(size for _, size, _ in copies)
    for read, size, path in sorted(copies):
        if total <= most or read > time.time() - RECENT:
            return
        with suppress(FileNotFoundError):
            path.unlink()
        total -= size
