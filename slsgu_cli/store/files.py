"""Files that appear whole or not at all, copies as fast as `cp`, kept copies, reading ahead.

And the cores and the memory that a process may use.
"""

import ctypes
import errno
import functools
import hashlib
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from slsgu_cli.errors import InputError, SlsguError
from slsgu_cli.records.codec import parse_json

S = TypeVar("S")
T = TypeVar("T")

# Items a thread that are read ahead.
AHEAD = 3

# Files of a cgroup of version 2 and of version 1: its limit, what it has taken, and by what name
# that which is of files, and given back when it is wanted.
CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}

PARTIAL = ".partial-"

# safetensors writes under a temporary name of its own; a killed process leaves that one.
UNFINISHED = (PARTIAL, ".tmp")

# What mends a write that failed, by the error; `{}` is what else can be done.
REMEDIES = {
    errno.ENOSPC: "free some space, or {}",
    errno.EDQUOT: "free some space, or {}",
    errno.EFBIG: "free some space, or {}",
    errno.EACCES: "see who may write there, or {}",
    errno.EROFS: "it can only be read: {}",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def remedy(error: OSError, otherwise: str) -> str:
    """Return what mends a write that failed, or else what can be done `otherwise`."""
    number = errno.EACCES if isinstance(error, PermissionError) else error.errno
    return REMEDIES.get(number or 0, "{}").format(otherwise)


def partial_name(name: str) -> str:
    """Return a fresh name under which this process writes what will be called `name`."""
    return f"{PARTIAL}{_machine_digest()}.{os.getpid()}-{secrets.token_hex(4)}-{name}"


def writer_lives(partial: str) -> bool | None:
    """Return whether the process that writes under a partial name lives; None if none can tell."""
    there, _, process = partial.removeprefix(PARTIAL).partition("-")[0].partition(".")
    return process_lives(
        machine() if there == _machine_digest() else "", int(process) if process.isdecimal() else 0
    )


def _machine_digest() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:8] if machine() else "unknown"


@functools.cache
def machine() -> str:
    """Return what tells the processes of one machine from those of others; "" if nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def process_lives(where: str, process: int) -> bool | None:
    """Return whether a process lives; None of one that is on another machine, or on none known."""
    if not where or where != machine() or process <= 0 or sys.platform == "win32":
        return None
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def move(source: Path, target: Path) -> None:
    """Rename `source` to `target` and let it take its place, in one step where that can be.

    Where two folders cannot swap, the old one steps aside first, again if another process
    has put its own there in between. Raises OSError, or InputError where it is no file or
    folder; what was at `target` stays then.
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
    """Refuse to take the place of what is neither a file nor a folder: a device, a pipe.

    Links are followed. Raises InputError.
    """
    with suppress(OSError):
        mode = target.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(
                f"{target} is neither a file nor a folder, and is left alone",
                hint="choose another place",
            )


def settle(source: Path, target: Path) -> bool:
    """Rename `source` to `target` if nothing is there, in one step; return whether it was so.

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
        # A file system without hard links: the last of two writers at one covariance stays.
        if target.exists():
            return False
        source.replace(target)
        return True
    source.unlink()
    return True


def remove(path: Path) -> None:
    """Remove a file or folder if it is there, under a partial name while it goes.

    Raises InputError for anything else that stands there.
    """
    require_regular(path)
    aside = path.with_name(partial_name(path.name))
    with suppress(FileNotFoundError):
        path.replace(aside)
        discard(aside)


def discard(partial: Path) -> None:
    """Remove what has a partial name, if it is there."""
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


# A safetensors file begins with the length of its header.
LENGTH = 8
HEADER_LIMIT = 100_000_000


def safetensors_header(read: Callable[[int, int], bytes], size: int) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file of `size` bytes, and where its tensors begin.

    `read` returns the bytes from one offset to another. Raises ValueError with the reason.
    """
    length = int.from_bytes(read(0, LENGTH), "little")
    if size < LENGTH or length > min(HEADER_LIMIT, size - LENGTH):
        raise ValueError("the file ends before its header does")
    try:
        header = parse_json(read(LENGTH, LENGTH + length))
    except ValueError as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return header, LENGTH + length


# Bytes that have a checksum of their own.
CHECKED = 4 << 20

# How a digest begins that is not one of SHA-256 over all bytes, as earlier versions made.
CRC32C = "crc32c:"


def content_digest(header: str, data: memoryview) -> str:
    """Return the SHA-256 of `header` and of the CRC-32C of each 4 MiB, which tell of accidents.

    One core makes checksums of 11 GB a second, and SHA-256 itself of 1.7.
    """
    import google_crc32c

    whole = hashlib.sha256(header.encode())
    for start in range(0, len(data), CHECKED):
        part = bytes(data[start : start + CHECKED])
        whole.update(google_crc32c.value(part).to_bytes(4, "little"))
    return f"{CRC32C}{whole.hexdigest()}"


def is_content(digest: str, header: str, data: memoryview) -> bool:
    """Return whether a digest is of `header` and bytes, made by this version or an earlier one."""
    if digest.startswith(CRC32C):
        return content_digest(header, data) == digest
    whole = hashlib.sha256(header.encode())
    for start in range(0, len(data), CHECKED):
        whole.update(hashlib.sha256(data[start : start + CHECKED]).digest())
    return whole.hexdigest() == digest


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as `sha256sum` tells it. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The variables that say where copies of tensors lie, and how many bytes of them.
CACHE, CACHE_SIZE = "SLSGU_CACHE", "SLSGU_CACHE_SIZE"
DEFAULT_SIZE = "20G"

# Copies that were read so many seconds ago are not removed: somebody may be about to open one.
RECENT = 60.0


@contextmanager
def cached(identity: str, fetch: Callable[[Path], object]) -> Iterator[Path]:
    """Yield a copy of what is elsewhere, fetched unless it was before.

    It is called by a digest of its `identity`: its address and state. Where the cache
    cannot be written, the copy is gone after the block.
    """
    folder = cache_folder()
    copy = folder / hashlib.sha256(identity.encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if copy.exists():
            # Read now, changed then: the former says which copies go first.
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
    """Return where copies of remote tensors lie."""
    if named := os.environ.get(CACHE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "slsgu", "tensors")


def _make_room(folder: Path) -> None:
    """Remove the copies that were not read for longest, until the others are within bounds."""
    from slsgu_cli.records.words import bytes_of

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


BLOCK = 1 << 30
BUFFER = 1 << 23
ABANDONED_SECONDS = 60.0
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path to build a file or folder at; put it in `target`'s place on success.

    On any exception, Ctrl-C included, what was built is removed and `target` is as it
    was. OSErrors (a full disk) become InputErrors.
    """
    target = target.resolve()
    partial = target.parent / partial_name(target.name)
    lock = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(target)
        partial.mkdir()
        lock = os.open(partial, os.O_RDONLY)
        _locked(lock)
        yield partial / target.name
        _put(partial / target.name, target)
    except OSError as error:
        if isinstance(error, SlsguError):
            raise
        raise InputError(
            f"cannot write {target}: {error.strerror or error}",
            hint=remedy(error, "choose another place with --out"),
        ) from error
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


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
    """Make `target` another name of the file `source`; return False where that cannot be."""
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
    """Return whether two paths lead to the same file or folder, there or yet to be."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _copy_in_kernel(old: int, new: int, size: int) -> int:
    """Copy as much as the file systems do by themselves; return the bytes copied."""
    copied = 0
    if sys.platform != "linux":
        return copied
    while copied < size:
        try:
            count = os.copy_file_range(old, new, min(BLOCK, size - copied))
        except OSError:
            # Not between these file systems, or the disk is full: plain writes will tell.
            break
        if count == 0:
            break
        copied += count
    return copied


def _put(built: Path, target: Path) -> None:
    """Move what was built; where it takes the place of something, not before it is on the disk."""
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


def _clear_abandoned(target: Path) -> None:
    for path in target.parent.glob(f"{PARTIAL}*-{target.name}"):
        # A young one may stand between its creation and its lock.
        if path.is_dir() and time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if _locked(descriptor):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Take the lock that lasts as long as this process; return whether it was free."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take, of the machine and of its cgroup.

    What both hold of files counts as free. None where the system tells neither: only Linux does.
    `root` is where `proc` and `sys` lie.
    """
    available = _figure(root / "proc/meminfo", "MemAvailable:")
    free = [] if available is None else [available << 10]
    for version, folder in _cgroups(root):
        limit, used, files = CGROUP_FILES[version]
        most, taken = _figure(folder / limit), _figure(folder / used)
        if most is not None and taken is not None:
            free.append(max(0, most - taken + (_figure(folder / "memory.stat", files) or 0)))
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
    """Return the number behind `name` in a file, or the first word; None where that is none."""
    with suppress(OSError, ValueError, IndexError):
        words = path.read_text().split()
        return int(words[words.index(name) + 1 if name else 0])
    return None
