"""Stores that several machines share: how one elsewhere is reached, and who makes what in it.

Whatever fsspec opens can be a store. S3, and what speaks its protocol, is reached through a
session of our own, which says what it waits for and gives up after a bounded time.

A lease is a small JSON file in the folder `leases` of a store, written only where there is
none. Its holder writes it anew three times a term; one that has not been renewed for a term
is a dead process's, by the clock of whoever waits, and is taken away. Nothing rests on a
lease but time: should two processes make the same thing after all, the first one stays.
"""

import json
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import fsspec

from slsgu_cli import progress
from slsgu_cli.errors import InputError, MissingError, SlsguError, UsageError, first_lines
from slsgu_cli.store.files import cached, machine, partial_name, process_lives

# Object stores: a file appears whole or not at all, and a folder is no more than a name.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}

# Seconds until a server that does not answer is given up, once; tries; seconds to the second.
CONNECT, READ = 5, 8
TRIES, PAUSE = 5, 0.5

# Answers that may be others the next time.
PASSING = {429, 500, 502, 503, 504}
PASSING_CODES = {"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling"}


@dataclass(slots=True)
class Remote:
    """A file system, the path on it, and with what options it can be opened once more."""

    fs: Any
    root: str
    options: dict[str, Any]

    @classmethod
    def open(cls, url: str) -> "Remote":
        """Open a URL or folder. Raises InputError, and MissingError where there is no bucket."""
        try:
            protocol = fsspec.core.split_protocol(url)[0]
            options = _Answers(url).options() if protocol in ("s3", "s3a") else {}
            fs, root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            hint = "pip install 'slsgu[s3]'" if "s3fs" in str(error) else None
            raise InputError(f"cannot open the store {url}: {error}", hint=hint) from error
        if options:
            _look_into(url, fs, str(root))
        return cls(fs, str(root).rstrip("/"), options)

    @property
    def protocols(self) -> tuple[str, ...]:
        """What the file system is called in URLs."""
        protocol = self.fs.protocol
        return protocol if isinstance(protocol, tuple) else (protocol,)

    def asynchronous(self) -> Any:
        """Return the same file system for a loop of somebody else, as zarr has one."""
        if not self.fs.async_impl:
            from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

            return AsyncFileSystemWrapper(self.fs, asynchronous=True)
        return fsspec.filesystem(self.protocols[0], asynchronous=True, **self.options)

    def put(self, built: Path, target: str) -> None:
        """Upload a file, or the files of a folder: those at its top last, for they tell of all.

        What else lies below `target` is removed.
        """
        if built.is_file():
            self._put_file(built, target)
            return
        below = [path for path in sorted(built.rglob("*")) if path.is_file()]
        names = {path: path.relative_to(built).as_posix() for path in below}
        top = [path for path in below if path.parent == built]
        rest = [path for path in below if path.parent != built]
        there = set(self.fs.find(target)) if self.fs.exists(target) else set()
        root = self.fs._strip_protocol(target)
        for old in sorted(there & {f"{root}/{names[path]}" for path in top}):
            self.fs.rm_file(old)
        if rest:
            self.fs.put([str(path) for path in rest], [f"{target}/{names[path]}" for path in rest])
        for stale in sorted(there - {f"{root}/{name}" for name in names.values()}):
            self.fs.rm_file(stale)
        for path in top:
            self._put_file(path, f"{target}/{names[path]}")

    def _put_file(self, built: Path, target: str) -> None:
        if not OBJECT_STORES.isdisjoint(self.protocols):
            self.fs.put_file(str(built), target)
            return
        folder, _, name = target.rpartition("/")
        self.fs.makedirs(folder, exist_ok=True)
        partial = f"{folder}/{partial_name(name)}"
        try:
            self.fs.put_file(str(built), partial)
            if self.fs.exists(target):
                self.fs.rm_file(target)
            self.fs.mv(partial, target)
        finally:
            if self.fs.exists(partial):
                self.fs.rm_file(partial)

    @contextmanager
    def copied(self, path: str, *, fresh: bool = False) -> Iterator[Path]:
        """Yield a copy of a file on this machine, unless `fresh` from the cache."""
        if fresh:
            with tempfile.TemporaryDirectory(prefix="slsgu-") as folder:
                self.fs.get_file(path, str(Path(folder, "copy")))
                yield Path(folder, "copy")
            return
        identity = f"{self.fs.unstrip_protocol(path)}\n{self.fs.ukey(path)}"
        with cached(identity, lambda copy: self.fs.get_file(path, str(copy))) as copy:
            yield copy


@dataclass(slots=True)
class _Answers:
    """What a server of objects answers, and whether it ever did.

    A server that has neither answered nor hung up is given up at once: its address may be wrong.
    """

    url: str
    some: bool = False

    def options(self) -> dict[str, Any]:
        """Return the options of s3fs: no listing that other processes have made old, our retries.

        What is set in fsspec's own configuration stands. Raises ImportError.
        """
        try:
            from aiobotocore.session import AioSession
        except ImportError as error:
            raise ImportError("S3 needs the package s3fs") from error
        set_by_user = fsspec.config.conf.get("s3", {})
        session = AioSession(profile=set_by_user.get("profile"))
        session.register("needs-retry.s3", self.pause)
        session.register("before-call.s3", _send_at_once)
        # botocore tries nothing again by itself: it would say nothing of it.
        retries = {"mode": "standard", "total_max_attempts": 1}
        ours = {"connect_timeout": CONNECT, "read_timeout": READ, "retries": retries}
        config = {**ours, **set_by_user.get("config_kwargs", {})}
        return {"session": session, "use_listings_cache": False, "config_kwargs": config}

    def pause(
        self, response: Any, attempts: int, caught_exception: Exception | None, **_: Any
    ) -> float | None:
        """Return seconds after which a request is tried again, None if its answer stands.

        Raises InputError after the last try.
        """
        from botocore.exceptions import ConnectionClosedError

        reason = self._passing(response, caught_exception)
        if reason is None:
            self.some = True
            return None
        answered = self.some or isinstance(caught_exception, ConnectionClosedError)
        if attempts >= TRIES or (caught_exception is not None and not answered):
            raise InputError(
                f"{self.url} does not answer: {reason}",
                hint="see whether the network and AWS_ENDPOINT_URL are right, and run this again",
            )
        seconds: float = PAUSE * 2 ** (attempts - 1)
        again = f"trying again in {seconds:g} s ({attempts} of {TRIES - 1})"
        progress.note(f"{self.url}: {reason}; {again}")
        return seconds

    def _passing(self, response: Any, error: Exception | None) -> str | None:
        """Return what went wrong, if it need not the next time."""
        from botocore.exceptions import ConnectionError as NoConnection
        from botocore.exceptions import HTTPClientError

        if error is not None:
            # What was asked for says nothing of what is wrong.
            reason = re.sub(r"\?[^\s\"]*", "", first_lines(error))
            return reason if isinstance(error, NoConnection | HTTPClientError) else None
        answer, content = response
        about = content.get("Error", {})
        if answer.status_code in PASSING or about.get("Code") in PASSING_CODES:
            return f"{answer.status_code} {about.get('Message') or about.get('Code') or ''}".strip()
        return None


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """Let a request not ask first whether its content may come.

    aiohttp forgets the time limit of an answer where such a question was answered just before.
    """
    params["headers"].pop("Expect", None)


def _look_into(url: str, fs: Any, root: str) -> None:
    """See that a bucket is there and may be read. Raises InputError and MissingError."""
    from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError

    bucket, key, _ = fs.split_path(root)
    try:
        fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "", MaxKeys=1)
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise InputError(
            f"there are no credentials for the store {url}",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        ) from error
    except FileNotFoundError as error:
        raise MissingError(
            f"there is no bucket {bucket}: {error}",
            hint="check the name in --store; slsgu makes no buckets",
        ) from error
    except PermissionError as error:
        raise InputError(
            f"the store {url} may not be read: {error}",
            hint="see what AWS_PROFILE or AWS_ACCESS_KEY_ID is, and what it is allowed",
        ) from error
    except (OSError, BotoCoreError) as error:
        raise InputError(f"cannot open the store {url}: {error}") from error


FOLDER = "leases"

# The variable that says how many seconds a lease lasts, and how many it lasts without.
VARIABLE, TERM = "SLSGU_LEASE", 60.0

# Seconds between two looks at a lease that another process holds, and their share of its term.
LOOK, LOOKS = 1.0, 8


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease: a process, since when, and for how many seconds from each `beat` on.

    Two processes of one `machine` can see whether the other one lives.
    """

    token: str
    host: str
    pid: int
    machine: str
    since: str
    seconds: float
    beat: int = 0

    @classmethod
    def here(cls) -> "Holder":
        """Return this process as a holder from now on. Raises UsageError for a term of no sense."""
        text = os.environ.get(VARIABLE, "")
        try:
            seconds = float(text or TERM)
        except ValueError:
            seconds = 0.0
        if not 0.1 <= seconds <= 10 * TERM:
            raise UsageError(f"{VARIABLE} is {text}; a lease lasts 0.1 to {10 * TERM:g} seconds")
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=machine(),
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            seconds=seconds,
        )

    @property
    def is_dead(self) -> bool:
        """Whether it is a process of this machine that has ended."""
        return process_lives(self.machine, self.pid) is False


class _LeasingStore(Protocol):
    """What leases take of a `Store`; `waits` says whether others are waited for."""

    url: str
    waits: bool
    is_lasting: bool

    def create_bytes(self, path: str, data: bytes) -> bool | None: ...
    def read_bytes(self, path: str) -> bytes: ...
    def write_bytes(self, path: str, data: bytes) -> None: ...
    def remove(self, path: str) -> None: ...


@contextmanager
def held(store: _LeasingStore, path: str, *, what: str) -> Iterator[None]:
    """Hold the lease of `what` will stand at `path` for the length of a block.

    While another process holds it, this one waits, and says for whom. What is to be made may
    be there by then, so look again inside the block. A store that does not wait, or one whose
    file system cannot create a file only where there is none, has no leases. Raises
    InputError where the store cannot be written.
    """
    if not (store.waits and store.is_lasting):
        yield
        return
    lease = _Lease(store, f"{FOLDER}/{path.replace('/', '-')}.json", Holder.here())
    if not lease.take(what):
        progress.detail(f"{store.url} knows no leases: another process may compute the same")
        yield
        return
    ended = threading.Event()
    renewal = threading.Thread(target=lease.renew, args=[ended], name="lease", daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        lease.release()


@dataclass(slots=True)
class _Lease:
    """The lease at a path of a store, and this process as its holder."""

    store: _LeasingStore
    path: str
    holder: Holder

    def take(self, what: str) -> bool:
        """Take the lease, after others; return False where the store can have none."""
        seen, since, announced = b"", 0.0, ""
        while True:
            created = self.store.create_bytes(self.path, _written(self.holder))
            if created is not False:
                return bool(created)
            present = self._present()
            if present is None:
                continue
            if present != seen:
                seen, since = present, time.monotonic()
            other = read_holder(present)
            if other.token == self.holder.token:
                # It was written, though the answer said otherwise.
                return True
            if other.token != announced:
                announced = other.token
                progress.note(
                    f"{what}: process {other.pid} on {other.host} has been at it since "
                    f"{other.since}; waiting for it (--no-wait computes it anyway)"
                )
            silent = time.monotonic() - since > other.seconds
            if not (silent or other.is_dead):
                time.sleep(min(LOOK, other.seconds / LOOKS))
            elif self._present() == present:
                ended = "ended" if other.is_dead else f"been silent for {other.seconds:g} s"
                progress.note(f"{what}: process {other.pid} on {other.host} has {ended}")
                self.store.remove(self.path)

    def renew(self, ended: threading.Event) -> None:
        """Write the lease anew until the work has ended, or another process has taken it."""
        while not ended.wait(self.holder.seconds / 3):
            # What cannot be written this time can be the next.
            with suppress(SlsguError, OSError):
                if not self._is_own():
                    return
                self.holder = replace(self.holder, beat=self.holder.beat + 1)
                self.store.write_bytes(self.path, _written(self.holder))

    def release(self) -> None:
        """Remove the lease, if it is this process's still."""
        with suppress(SlsguError, OSError):
            if self._is_own():
                self.store.remove(self.path)

    def _is_own(self) -> bool:
        return read_holder(self._present() or b"").token == self.holder.token

    def _present(self) -> bytes | None:
        with suppress(MissingError):
            return self.store.read_bytes(self.path)
        return None


def _written(holder: Holder) -> bytes:
    return f"{json.dumps(asdict(holder), indent=1)}\n".encode()


def read_holder(data: bytes) -> Holder:
    """Return who holds a lease; of one that says nothing, somebody."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        content = json.loads(data)
        holder = Holder(**{field.name: content[field.name] for field in fields(Holder)})
        if isinstance(holder.pid, int) and 0 < holder.seconds <= 10 * TERM:
            return holder
    return Holder("?", "an unknown host", 0, "", "an unknown time", TERM)
