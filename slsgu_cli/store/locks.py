"""Locks: two processes on one store do not compute the same artifact twice.

A lock is a file that its holder has locked with `flock`, so the system releases it when the
holder ends, however it ends. Only stores in local folders have locks. Nothing depends on them but
time: if two processes make the same artifact after all, the first one stays.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from slsgu_cli import progress
from slsgu_cli.errors import InputError
from slsgu_cli.store.atomic import remedy
from slsgu_cli.store.store import Store

FOLDER = "locks"

# What a file system without locks answers.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def held(store: Store, path: str, *, what: str) -> Iterator[None]:
    """Hold the lock of the artifact at `path` for the length of a block.

    If another process holds it, wait, and log who that is. The artifact may be there by then, so
    look again inside the block. Raises InputError where the store cannot be written.
    """
    if not store.has_locks or os.name == "nt":
        yield
        return
    file = Path(store.where(FOLDER), f"{path.replace('/', '-')}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquired(file, what)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise InputError(
                f"cannot write {file}: {error.strerror or error}",
                hint=remedy(error, "choose another store with --store"),
            ) from error
        progress.detail(f"{file.parent} has no locks: another process may compute the same")
        yield
        return
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _acquired(file: Path, what: str) -> int:
    """Return the descriptor of a lock file that this process has locked."""
    import fcntl

    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(descriptor):
                progress.note(
                    f"{what}: {_text(descriptor)} is computing it; "
                    "waiting for it (--no-wait computes it anyway)"
                )
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_open(descriptor, file):
                now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} (since {now})".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The holder before removed the file that this process waited for.
        os.close(descriptor)


def holder(file: Path) -> str | None:
    """Return which process holds a lock, for messages; None where none does."""
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _lock(descriptor) else _text(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; return whether it was free."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_open(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _text(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
