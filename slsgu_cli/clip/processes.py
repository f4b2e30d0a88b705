"""Several processes that run one command as one: what is dealt, summed and sent among them.

PyTorch's launcher (`torchrun`) starts them and tells each its rank. All of them run the
command; the first alone writes and tells. Work is dealt by rank, what each made of it goes
to all of them, and so do the choices of the first: every process takes the same way.
Without a launcher there is one process, and nothing is sent.
"""

import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from slsgu_cli import progress
from slsgu_cli.errors import NotForgottenError, SlsguError, UsageError
from slsgu_cli.store.store import Arrays, Store

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

# How long the others wait for the first one, which may build a set meanwhile.
PATIENCE = timedelta(days=7)
LOOK_SECONDS = 0.2
TOLD = "slsgu/told"
MAIL = "slsgu/mail"

# The method of a sharded model in which it runs.
RUN = "run_gathered"
# Of a sharded model, the names of parameters that stay gathered between runs.
OF_NO_BLOCK = "of_no_block"


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


def require_several(command: str) -> None:
    """Raise UsageError where one process is to hold a sharded model for a command."""
    if launched() == 1:
        raise UsageError(
            "--shard deals a model out to several processes, and one was started",
            hint=f"torchrun --nproc-per-node N -m slsgu_cli {command} NAME --shard",
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

    # Objects and figures on the host go by gloo; nccl sends what is on cards.
    cuda = torch.cuda.is_available() and _local_world_size() <= torch.cuda.device_count()
    if cuda:
        torch.cuda.set_device(_local_rank())
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
    used = gathered((_group.sent / 1e6, time.process_time()))
    sent, busy = (max(figures) for figures in zip(*used, strict=True))
    progress.detail(
        f"each of {size} processes sent at most {sent:.2f} MB to others, and was at most "
        f"{busy:.1f} s at work"
    )
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


def add_up_at(values: "Tensor", holder: int) -> None:
    """Let one process have the sum of what all have, in place; the others lose what they had."""
    if count() > 1:
        import torch.distributed as dist

        with _sending(values.nbytes if rank() != holder else 0):
            dist.reduce(values, holder)


def on_first(tensors: "Mapping[str, Tensor]") -> Arrays:
    """Return to the first process, on the host, tensors that go by names of one process each."""
    if count() == 1:
        return {name: values.cpu().numpy() for name, values in tensors.items()}
    import torch
    import torch.distributed as dist

    abouts = gathered({name: (tuple(v.shape), v.dtype) for name, v in tensors.items()})
    holders = {name: holder for holder, about in enumerate(abouts) for name in about}
    arrays = {}
    for name, holder in sorted(holders.items()):
        # By way of the host, where it goes to.
        values = tensors[name].cpu().contiguous() if holder == rank() else None
        if holder and values is not None:
            with _sending(values.nbytes):
                dist.send(values, 0)
        elif holder and is_first():
            shape, dtype = abouts[holder][name]
            values = torch.empty(shape, dtype=dtype)
            with _sending():
                dist.recv(values, holder)
        if is_first() and values is not None:
            arrays[name] = values.numpy()
    return arrays


def dealt(items: Sequence[T]) -> list[T]:
    """Return which of the items are this process's: every so many-th."""
    return list(items[rank() :: count()])


def local_share(size: int) -> int:
    """Return what each process of this machine may take of `size` bytes of its memory."""
    return size // _local_world_size() if _group.size > 1 else size


def card(name: str) -> str:
    """Return the card of this process where `name` is cuda; the only process takes any.

    Threads begin on the first card, whatever the process is on: it has to be named.
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
    """Return how many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


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


def shard(model: "nn.Module", blocks: "Sequence[nn.Module]", device: str) -> None:
    """Deal the weights of a model to the processes, of which each keeps its part (FSDP2).

    Those of a block are gathered when it runs and dropped after it; all others are gathered
    for as long as the model runs. What a model on `meta` lacks is loaded later. Gradients
    are added in fp64. A parameter of one entry stays whole in every process.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    whole = {parameter for parameter in model.parameters() if parameter.numel() == 1}
    for parameter in whole:
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.partition(":")[0], (count(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float64)
    in_blocks = {parameter for block in blocks for parameter in block.parameters()} | whole
    others = [name for name, parameter in model.named_parameters() if parameter not in in_blocks]
    for module in (*blocks, model):
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole)
        # A sum, not a mean over the processes.
        sharded.set_gradient_divide_factor(1.0)
    setattr(model, OF_NO_BLOCK, others)


def gathering(module: Any, name: str, method: Callable[..., Any]) -> None:
    """Let `module.name` call a method while the sharded weights are gathered."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    setattr(module, name, method)
    register_fsdp_forward_method(module, name)


def run(
    model: Any, forward: "Callable[[], Tensor]", blocks: "Sequence[nn.Module] | None" = None
) -> "Tensor":
    """Return what `forward` makes with a sharded model; every process must run it.

    `blocks` are those whose weights are gathered, unless the caller counts what is sent.
    """
    if not hasattr(model, RUN):
        gathering(model, RUN, lambda made: made())
    size = 0
    if blocks is not None:
        size = sum(parameter.nbytes for block in blocks for parameter in block.parameters())
        others = map(model.get_parameter, getattr(model, OF_NO_BLOCK))
        size += sum(parameter.nbytes for parameter in others if is_sharded(parameter))
    with _sending(size * (1 - 1 / count())):
        values: Tensor = getattr(model, RUN)(forward)
    return values


def is_sharded(parameter: "Tensor") -> bool:
    """Return whether this process has a part of a parameter alone, now."""
    return hasattr(parameter, "full_tensor")


def has_shards(model: "nn.Module") -> bool:
    """Return whether the weights of a model are dealt to the processes."""
    return hasattr(model, "reshard")


def shard_of(values: "Tensor", like: "Tensor", device: str) -> "Tensor":
    """Return of a whole parameter what this process keeps of it, on a device."""
    values = values.to(device)
    if not is_sharded(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(values, sharded.device_mesh, sharded.placements, src_data_rank=None)


def unsharded(part: "Tensor") -> "Tensor":
    """Return a parameter whose parts the processes have, whole; each of them must ask."""
    if not is_sharded(part):
        return part
    sharded: Any = part
    with _sending(part.nbytes * (1 - 1 / count())):
        values: Tensor = sharded.full_tensor()
    return values


def whole(model: Any, name: str) -> "Tensor":
    """Return a parameter's values, whole; of a sharded model each process must ask."""
    _let_go(model)
    return unsharded(model.get_parameter(name).data)


def exchange(model: Any, name: str, change: "Callable[[Tensor], Tensor]") -> "Tensor":
    """Give a parameter the values that `change` makes of its own; return those for `put_back`.

    Of a sharded model each process must ask, and puts in its part.
    """
    _let_go(model)
    parameter = model.get_parameter(name)
    if not is_sharded(parameter):
        before: Tensor = parameter.data
        parameter.data = change(before)
        return before
    part = _local_shard(parameter)
    values = change(unsharded(parameter.data))
    before = part.clone()
    part.copy_(_local_shard(shard_of(values, parameter, str(part.device))))
    return before


def put_back(model: Any, name: str, before: "Tensor") -> None:
    """Give a parameter the values back that it had before an exchange."""
    _let_go(model)
    parameter = model.get_parameter(name)
    if is_sharded(parameter):
        _local_shard(parameter).copy_(before)
    else:
        parameter.data = before


def _let_go(model: Any) -> None:
    """Leave of the weights that are gathered between two runs only what this process keeps.

    What they are gathered from may change then.
    """
    if has_shards(model):
        model.reshard()


def in_step(own: Sequence[tuple[int, T]]) -> list[tuple[int, T, bool]]:
    """Return what all processes run in step: of each key as many turns as the busiest has.

    `own` are the keys of this process's runs, the greatest first, each with something about it
    that any process may be told. Whether a turn is its own comes with it.
    """
    have: Counter[int] = Counter(key for key, _ in own)
    most: Counter[int] = Counter()
    about: dict[int, T] = {}
    for keys, facts in gathered((have, dict(own))):
        most |= keys
        about |= facts
    return [
        (key, about[key], turn < have[key])
        for key in sorted(most, reverse=True)
        for turn in range(most[key])
    ]


class ShardedSums:
    """Gradients of a sharded model, added up over mini-batches in fp64.

    Each process has its part of every parameter's. `losses` has the loss of each mini-batch
    that this one ran, and the first `added` of them are in the sums.
    """

    def __init__(self, model: "nn.Module", batches: int) -> None:
        import torch

        self.model: Any = model
        self.parameters = dict(model.named_parameters())
        self.losses = torch.zeros(batches, device=next(model.parameters()).device)
        self.added = 0
        self._totals = {
            name: _local_shard(p).double().zero_() for name, p in self.parameters.items()
        }
        size = sum(p.nbytes for p in self.parameters.values())
        # Weights forward and backward, and gradients of twice their width.
        self._sent = (2 * size + 2 * size) * (1 - 1 / count())

    @property
    def done(self) -> int:
        """How many mini-batches are behind: those that are in the sums."""
        return self.added

    def step(self, losses: "Callable[[], Tensor]", end: int, *, counts: bool) -> "Tensor":
        """Add the gradients of what every process's `losses` returns, up to mini-batch `end`.

        All run something, for each has a part of the weights: what does not count is zeros.
        """
        import torch

        with _sending(self._sent):
            values = run(self.model, losses)
            torch.autograd.backward(values.sum() if counts else 0.0 * values.sum())
        ones = []
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and parameter.numel() == 1:
                ones.append((self._totals[name], parameter.grad.double()))
            elif parameter.grad is not None:
                self._totals[name].add_(_local_shard(parameter.grad))
            parameter.grad = None
        if ones:
            summed = torch.stack([gradient.reshape(()) for _, gradient in ones])
            add_up(summed)
            for (total, _), value in zip(ones, summed, strict=True):
                total.add_(value)
        self.added = end
        return values.detach()

    def finite(self) -> bool:
        """Return whether the parts of this process are."""
        import torch

        return bool(torch.stack([part.isfinite().all() for part in self._totals.values()]).all())

    def means(self) -> Arrays:
        """Return the mean gradient of each parameter, fp32, to the first process alone."""
        batches = len(self.losses)
        return self._to_first(lambda total: (total / batches).float())

    def kept(self) -> Arrays:
        """Return to the first process what a later run goes on with."""
        return self._to_first(lambda total: total) | {"losses": self.all_losses().cpu().numpy()}

    def go_on(self, kept: Arrays, added: int, done: int) -> None:
        """Go on with what an earlier run kept, in whose sums `added` mini-batches are."""
        import torch

        for name, parameter in self.parameters.items():
            part = shard_of(torch.from_numpy(kept[name]), parameter, str(self.losses.device))
            self._totals[name].copy_(_local_shard(part))
        if is_first():
            self.losses.copy_(torch.from_numpy(kept["losses"]))
        self.added = added

    def all_losses(self) -> "Tensor":
        """Return the loss of each mini-batch, whichever process ran it; 0 of those to come."""
        losses = self.losses.clone()
        add_up(losses)
        return losses

    def _to_first(self, figure: "Callable[[Tensor], Tensor]") -> Arrays:
        arrays = {}
        for name, parameter in self.parameters.items():
            values = unsharded(_sharded_like(parameter, figure(self._totals[name])))
            if is_first():
                arrays[name] = values.cpu().numpy()
        return arrays


def _local_shard(part: "Tensor") -> "Tensor":
    """Return what this process has of a parameter or gradient."""
    sharded: Any = part
    local: Tensor = sharded.to_local() if is_sharded(part) else part
    return local.detach()


def _sharded_like(parameter: "Tensor", values: "Tensor") -> "Tensor":
    """Return values of this process as its part of what the processes have of a parameter."""
    if not is_sharded(parameter):
        return values
    from torch.distributed.tensor import DTensor

    sharded: Any = parameter
    return DTensor.from_local(
        values,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


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
    """A store that the first of several processes alone writes to, and locks."""

    @property
    def has_locks(self) -> bool:
        """Whether this process waits for others: only the first of a group does."""
        return super().has_locks and is_first()

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
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise LostError(
            f"one of the {launched()} processes has ended, and so do the others",
            hint="run the same command again: it goes on with what was kept",
        ) from error
