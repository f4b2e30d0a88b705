"""Several processes that run one command as one: what is dealt, summed and sent among them.

PyTorch's launcher (`torchrun`) starts them and tells each its rank. All of them run the
command; the first alone writes and tells. Work is dealt by rank, what each made of it goes
to all of them, and so do the choices of the first: every process takes the same way.
Without a launcher there is one process, and nothing is sent.
"""

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from slsgu_cli import progress
from slsgu_cli.errors import NotForgottenError, SlsguError, UsageError
from slsgu_cli.store.store import Arrays, Store

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# How long the others wait for the first one, which may build a set meanwhile.
PATIENCE = timedelta(days=7)
LOOK_SECONDS = 0.2
TOLD = "slsgu/told"
MAIL = "slsgu/mail"


class LostError(SlsguError):
    """Another process of the command has ended, and so must this one."""


@dataclass(slots=True)
class _Group:
    """The processes that this one belongs to; `mail` is what they leave messages in.

    `apart` is how many blocks are open in which this one is on its own.
    """

    rank: int = 0
    size: int = 1
    mail: Any = None
    apart: int = 0
    sent: float = 0.0


_group = _Group()


def launched() -> int:
    """Return how many processes a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def refuse(what: str) -> None:
    """Raise UsageError where several processes are to run what one does."""
    if launched() > 1:
        raise UsageError(
            f"{what} runs in one process, and {launched()} were started",
            hint="start it without torchrun; grad, rank, search and sweep run in several",
        )


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that a launcher has started, for the length of a block."""
    if launched() == 1 or _group.size > 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _sending():
        mail, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=mail, rank=rank, world_size=size, timeout=PATIENCE)
    _group.mail, _group.rank, _group.size = mail, rank, size
    try:
        yield
    except NotForgottenError:
        # All of them come to it; the first one says so, when it has printed what it has.
        with _sending():
            dist.barrier()
        if rank == 0:
            raise
        return
    progress.detail(f"each of {size} processes sent {_group.sent / 1e6:.2f} MB to others")
    with _sending():
        dist.barrier()
        dist.destroy_process_group()
    _group.size, _group.rank = 1, 0


def count() -> int:
    """Return how many processes share the work."""
    return 1 if _group.apart else _group.size


def rank() -> int:
    """Return which of them this one is, from 0 on."""
    return 0 if _group.apart else _group.rank


def is_first() -> bool:
    """Return whether this process writes and tells for all."""
    return rank() == 0


@contextmanager
def apart() -> Iterator[None]:
    """Be the only process for the length of a block: nothing is dealt, and it writes itself."""
    _group.apart += 1
    try:
        yield
    finally:
        _group.apart -= 1


def is_to_be_heard() -> bool:
    """Return whether what this process tells and prints is for the user, joined or not yet."""
    return launched() == 1 or os.environ["RANK"] == "0"


def may_tell() -> bool:
    """Return whether this process is to tell how all of them end: who asks first."""
    if launched() == 1:
        return True
    if _group.mail is None:
        return is_to_be_heard()
    try:
        return bool(_group.mail.add(TOLD, 1) == 1)
    except RuntimeError:
        return _group.rank == 0


def from_first(make: Callable[[], T]) -> T:
    """Return what the first process makes; the others wait for it."""
    if count() == 1:
        return make()
    import torch.distributed as dist

    values = [make() if is_first() else None]
    with _sending(len(pickle.dumps(values))):
        dist.broadcast_object_list(values)
    value: Any = values[0]
    return value  # type: ignore[no-any-return]


def agreed(value: T) -> T:
    """Return what the first process found where all looked: what follows is the same for all."""
    return from_first(lambda: value)


def gathered(value: T) -> list[T]:
    """Return what every process has, in the order of their ranks."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    with _sending(len(pickle.dumps(value)) * (count() - 1)):
        dist.all_gather_object(values, value)
    return values


def rows_of_all(parts: "Sequence[Tensor]", device: str) -> "Tensor":
    """Return the rows (any number, ...) of all processes, in the order of their ranks.

    A process may have none; `device` is where they are.
    """
    import torch

    if count() == 1:
        return torch.cat(list(parts))
    import torch.distributed as dist

    about = gathered([(len(part), tuple(part.shape[1:]), part.dtype) for part in parts])
    counts = [sum(length for length, *_ in each) for each in about]
    shape, dtype = next((shape, dtype) for each in about for _, shape, dtype in each)
    # Of one length, as any backend can send them.
    padded = torch.zeros(max(counts), *shape, dtype=dtype, device=device)
    if parts:
        torch.cat(list(parts), out=padded[: counts[rank()]])
    parts = [torch.empty_like(padded) for _ in counts]
    with _sending(padded.nbytes * (count() - 1)):
        dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, counts, strict=True)])


def add_up(values: "Tensor") -> None:
    """Let every process have the sum of what all have, in place."""
    if count() > 1:
        import torch.distributed as dist

        with _sending(2 * values.nbytes * (1 - 1 / count())):
            dist.all_reduce(values)


def dealt(items: Sequence[T]) -> list[T]:
    """Return which of the items are this process's: every so many-th."""
    return list(items[rank() :: count()])


def local_share(size: int) -> int:
    """Return what each process of this machine may take of `size` bytes of its memory."""
    return size // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _group.size > 1 else size


class OrderedSum:
    """A sum of vectors, one of each process, always in the order of their ranks.

    It has the bytes that one process would make of them. Each process keeps one part of it.
    """

    def __init__(self, like: "Tensor") -> None:
        self.part = like.new_zeros(len(like) // count())

    def add(self, vector: "Tensor", parts: int) -> None:
        """Add a vector (a multiple of the processes,) of each of the first `parts` processes."""
        if count() == 1:
            self.part.add_(vector)
            return
        import torch.distributed as dist

        received = vector.new_empty(vector.shape)
        with _sending(vector.nbytes * (1 - 1 / count())):
            dist.all_to_all_single(received, vector)
        for part in received.view(count(), -1)[:parts]:
            self.part.add_(part)

    def begin(self, whole: "Tensor") -> None:
        """Go on from a sum."""
        self.part.copy_(whole.view(count(), -1)[rank()])

    def whole(self) -> "Tensor":
        """Return the sum to every process."""
        return self.part if count() == 1 else rows_of_all([self.part], str(self.part.device))


def post(name: str, value: Any) -> None:
    """Leave a value under a name for the first process, which reads it when it will."""
    with _sending():
        _group.mail.set(f"{MAIL}/{name}", pickle.dumps(value))


def posted(name: str, *, wait: bool) -> Any:
    """Return what was left under a name; None where nothing is, unless it is to `wait`."""
    with _sending():
        key = f"{MAIL}/{name}"
        while not _group.mail.check([key]):
            if not wait:
                return None
            # Not in one call, which no signal would end.
            time.sleep(LOOK_SECONDS)
        return pickle.loads(_group.mail.get(key))


class SharedStore(Store):
    """A store that the first of several processes alone writes to, and holds leases of."""

    def create_bytes(self, path: str, data: bytes) -> bool | None:
        """Write `data` where there is nothing at `path`, if this is the first process."""
        return super().create_bytes(path, data) if is_first() else None

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write `data` at `path`, if this is the first process."""
        if is_first():
            super().write_bytes(path, data)

    def write_tensors(
        self, path: str, arrays: Arrays, header: Any, *, keep_first: bool = False
    ) -> None:
        """Write a safetensors file, if this is the first process."""
        if is_first():
            super().write_tensors(path, arrays, header, keep_first=keep_first)

    def remove(self, path: str) -> None:
        """Remove the artifact at `path`, if this is the first process."""
        if is_first():
            super().remove(path)

    def require_writable(self, path: str) -> None:
        """Raise InputError unless the first process may write at `path`."""
        if is_first():
            super().require_writable(path)


@contextmanager
def _sending(size: float = 0.0) -> Iterator[None]:
    """Say in our words that a process which something is sent to, or comes from, is gone.

    `size` is the bytes that this process sends.
    """
    _group.sent += size
    try:
        yield
    except RuntimeError as error:
        raise LostError(
            f"one of the {launched()} processes has ended, and so do the others",
            hint="run the same command again: it goes on with what was kept",
        ) from error
