"""Leases: who makes what at the moment, so that two processes do not make it twice.

A lease is a small JSON file in the folder `leases` of a store, written only where there is
none. Its holder writes it anew three times a term; one that has not been renewed for a term
is a dead process's, by the clock of whoever waits, and is taken away. Nothing rests on a
lease but time: should two processes make the same thing after all, the first one stays.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime

from slsgu_cli import progress
from slsgu_cli.errors import MissingError, SlsguError, UsageError
from slsgu_cli.store.files import machine, process_lives
from slsgu_cli.store.store import Store

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
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=machine(),
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            seconds=_term(),
        )

    @property
    def is_dead(self) -> bool:
        """Whether it is a process of this machine that has ended."""
        return process_lives(self.machine, self.pid) is False


@contextmanager
def held(store: Store, path: str, *, what: str) -> Iterator[None]:
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

    store: Store
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
        present = self._present()
        return present is not None and read_holder(present).token == self.holder.token

    def _present(self) -> bytes | None:
        try:
            return self.store.read_bytes(self.path)
        except MissingError:
            return None


def _written(holder: Holder) -> bytes:
    return f"{json.dumps(asdict(holder), indent=1)}\n".encode()


def read_holder(data: bytes) -> Holder:
    """Return who holds a lease; of one that says nothing, somebody."""
    try:
        said = json.loads(data)
        holder = Holder(**{field.name: said[field.name] for field in fields(Holder)})
        if not (isinstance(holder.pid, int) and 0 < holder.seconds <= 10 * TERM):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        return Holder("?", "an unknown host", 0, "", "an unknown time", TERM)
    return holder


def _term() -> float:
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text or TERM)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 10 * TERM:
        raise UsageError(f"{VARIABLE} is {text}; a lease lasts 0.1 to {10 * TERM:g} seconds")
    return seconds
