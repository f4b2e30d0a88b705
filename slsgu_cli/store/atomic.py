"""Files and folders that appear whole or not at all."""

import ctypes
import errno
import functools
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slsgu_cli.errors import InputError, SlsguError

PARTIAL = ".partial-"
UNKNOWN = "unknown"

# safetensors writes under a temporary name, which a killed process leaves behind.
UNFINISHED = (PARTIAL, ".tmp")

# Hints for a write that failed, by error number; `{}` is another way out.
REMEDIES = {
    errno.ENOSPC: "free some space, or {}",
    errno.EDQUOT: "free some space, or {}",
    errno.EFBIG: "free some space, or {}",
    errno.EACCES: "check its permissions, or {}",
    errno.EROFS: "it is read-only: {}",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def remedy(error: OSError, otherwise: str) -> str:
    """Return a hint for a write that failed, with what to do `otherwise`."""
    number = errno.EACCES if isinstance(error, PermissionError) else error.errno
    return REMEDIES.get(number or 0, "{}").format(otherwise)


def partial_name(name: str) -> str:
    """Return a new temporary name under which this process writes the file `name`."""
    return f"{PARTIAL}{_machine()}.{os.getpid()}-{secrets.token_hex(4)}-{name}"


def writer_lives(partial: str) -> bool | None:
    """Return whether the process that writes under a partial name runs; None if unknown."""
    machine, _, process = partial.removeprefix(PARTIAL).partition("-")[0].partition(".")
    if machine in ("", UNKNOWN) or machine != _machine() or not process.isdecimal():
        return None
    try:
        os.kill(int(process), 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


@functools.cache
def _machine() -> str:
    """Return a digest of this machine's last boot and of the space of its process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        name = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return UNKNOWN
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def move(source: Path, target: Path) -> None:
    """Rename `source` to `target`, replacing it in one step where the system can.

    Where two folders cannot be exchanged, the old one is renamed first, again if another process
    has put its own there in between. Raises OSError, or InputError where `target` is not a file
    or folder; `target` is unchanged then.
    """
    require_regular(target)
    while True:
        try:
            source.replace(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _exchange(source, target):
            remove(source)
            return
        # Not a partial name: should the process die here, the old content must stay.
        aside = target.with_name(f"{target.name}.replaced-{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            target.rename(aside)
        try:
            source.rename(target)
        except OSError:
            if not target.exists():
                aside.rename(target)
                raise
        remove(aside)
        if not source.exists():
            return


def require_regular(target: Path) -> None:
    """Refuse to replace anything but a file or a folder, such as a device or a pipe.

    Links are followed. Raises InputError.
    """
    with suppress(OSError):
        mode = target.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(
                f"{target} is neither a file nor a folder and is not replaced",
                hint="choose another path",
            )


def move_if_absent(source: Path, target: Path) -> bool:
    """Rename `source` to `target` in one step if nothing is there; return whether it did.

    Raises OSError.
    """
    if source.is_dir():
        try:
            source.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                return False
            raise
        return True
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links: of two writers at the same moment, the last one wins.
        if target.exists():
            return False
        source.replace(target)
        return True
    source.unlink()
    return True


def remove(path: Path) -> None:
    """Remove a file or folder if it exists; it has a partial name while it is being removed.

    Raises InputError for anything else.
    """
    require_regular(path)
    aside = path.with_name(partial_name(path.name))
    with suppress(FileNotFoundError):
        path.replace(aside)
        discard(aside)


def discard(partial: Path) -> None:
    """Remove a partial file or folder if it exists."""
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path at which to build a file or folder, and move it to `target` on success.

    On any exception, Ctrl-C included, the new files are removed and `target` is unchanged.
    OSErrors (a full disk) become InputErrors.
    """
    target = target.resolve()
    partial = target.parent / partial_name(target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{PARTIAL}*-{target.name}"):
            if writer_lives(old.name) is False:
                shutil.rmtree(old, ignore_errors=True)
        partial.mkdir()
        yield partial / target.name
        _put(partial / target.name, target)
    except OSError as error:
        if isinstance(error, SlsguError):
            raise
        raise InputError(
            f"cannot write {target}: {error.strerror or error}",
            hint=remedy(error, "choose another --out"),
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(built: Path, target: Path) -> None:
    """Move new files into place; if they replace others, flush them to the disk first."""
    replaced = target.exists()
    for path in [built, *built.rglob("*")] if replaced else ():
        _flush(path)
    move(built, target)
    if replaced:
        _flush(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; return False where the system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return bool(swap(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
