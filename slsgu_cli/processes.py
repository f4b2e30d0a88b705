"""Several processes that run one command together, started by `torchrun`.

Every rank runs the same command; only rank 0 prints and writes to the store. Rows or concepts
are split over the ranks. Their results are added up or gathered by the collectives of
torch.distributed, and rank 0 makes each decision, so that all ranks do the same next. Without
a launcher there is one process, and every function here is local.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from slsgu_cli import progress
from slsgu_cli.errors import NotForgottenError, SlsguError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# How long a rank waits for the others, for example while rank 0 builds a set.
TIMEOUT = timedelta(days=7)
# The key in the store of the rendezvous that counts which ranks have reported an error.
REPORTED = "slsgu/reported"


@dataclass(slots=True)
class _Group:
    """The group of this process; `meeting` is the key-value store of its rendezvous."""

    rank: int = 0
    size: int = 1
    meeting: Any = None
    # How many `alone` blocks are open.
    alone: int = 0


_group = _Group()


def launched() -> int:
    """Return how many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def refuse_several(what: str) -> None:
    """Raise UsageError if a launcher started several processes."""
    if launched() > 1:
        raise UsageError(
            f"{what} runs in one process, and {launched()} were started",
            hint="start it without torchrun; grad, rank, search and sweep run in several",
        )


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that a launcher started, for the length of a block."""
    if launched() == 1 or _group.size > 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    # gloo sends objects and tensors of the host, nccl those of GPUs.
    cuda = torch.cuda.is_available() and _local_world_size() <= torch.cuda.device_count()
    if cuda:
        torch.cuda.set_device(_local_rank())
    with _naming_lost_ranks():
        meeting, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=size, timeout=TIMEOUT)
    _group.meeting, _group.rank, _group.size = meeting, rank, size
    try:
        yield
    except NotForgottenError:
        # Every rank raises it; rank 0 reports it after the others have ended their work.
        with _naming_lost_ranks():
            dist.barrier()
        if rank == 0:
            raise
        return
    busiest = max(gathered(time.process_time()))
    progress.detail(f"the busiest of {size} processes worked for {busiest:.1f} s")
    with _naming_lost_ranks():
        dist.barrier()
        dist.destroy_process_group()
    _group.size, _group.rank = 1, 0


def world_size() -> int:
    """Return how many processes share the work; 1 inside `alone`."""
    return 1 if _group.alone else _group.size


def rank() -> int:
    """Return the rank of this process, from 0 on; 0 inside `alone`."""
    return 0 if _group.alone else _group.rank


def is_first() -> bool:
    """Return whether this process writes to the store."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Work as the only process for the length of a block: nothing is split, and it writes."""
    _group.alone += 1
    try:
        yield
    finally:
        _group.alone -= 1


def prints() -> bool:
    """Return whether the user sees what this process prints: rank 0, joined or not."""
    return launched() == 1 or os.environ["RANK"] == "0"


def reports_error() -> bool:
    """Return whether this process reports how all of them ended: the first one that asks."""
    if launched() == 1:
        return True
    if _group.meeting is None:
        return prints()
    try:
        return bool(_group.meeting.add(REPORTED, 1) == 1)
    except RuntimeError:
        return _group.rank == 0


def from_first(make: Callable[[], T]) -> T:
    """Return what `make` returns on rank 0; only rank 0 calls it."""
    if world_size() == 1:
        return make()
    import torch.distributed as dist

    values: list[Any] = [make() if is_first() else None]
    with _naming_lost_ranks():
        dist.broadcast_object_list(values)
    value: T = values[0]
    return value


def agreed(value: T) -> T:
    """Return rank 0's value on every rank."""
    return from_first(lambda: value)


def gathered(value: T) -> list[T]:
    """Return the values of all ranks, in the order of ranks."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    with _naming_lost_ranks():
        dist.all_gather_object(values, value)
    return values


def summed(values: "Tensor") -> "Tensor":
    """Return the sum of a tensor over all ranks: a new tensor if there are several."""
    if world_size() == 1:
        return values
    import torch.distributed as dist

    total = values.clone()
    with _naming_lost_ranks():
        dist.all_reduce(total)
    return total


def split(items: Sequence[T]) -> list[T]:
    """Return every n-th item, beginning with this rank's, of n ranks."""
    return list(items[rank() :: world_size()])


def local_share(size: int) -> int:
    """Return the share of each process of this machine in `size` bytes of its memory."""
    return size // _local_world_size() if _group.size > 1 else size


def local_device(name: str) -> str:
    """Return the GPU of this process for `cuda`; without a group, any GPU by its name.

    Threads start on the first GPU, whatever GPU the process uses, so it needs a number.
    Raises UsageError.
    """
    if _group.size == 1:
        return name
    import torch

    if ":" in name:
        raise UsageError(f"--device {name} is one card for all processes", hint="--device cuda")
    cards = torch.cuda.device_count()
    if _local_world_size() > cards:
        raise UsageError(
            f"{_local_world_size()} processes on this machine, which has {cards} cards",
            hint=f"--nproc-per-node {cards}, or --device cpu",
        )
    return f"{name}:{_local_rank()}"


def _local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def _naming_lost_ranks() -> Iterator[None]:
    """Re-raise errors of communication, which say that another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise SlsguError(
            f"one of the {launched()} processes has ended, and so do the others",
            hint="run the same command again: it resumes from the sums it saved",
        ) from error
