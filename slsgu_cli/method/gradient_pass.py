"""The losses, and the mean gradient of one over a data block, for every parameter.

Mini-batches are what the loss is defined on. A CPU runs one after another, and nothing but
their order tells in which order fp32 adds up: a gradient has the same bytes whatever memory
there was. Elsewhere they are stacked until the memory budget or the device's best size is
reached, their losses are summed, and one backward gives their gradients' sum: the same
numbers but for the last digit.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.clip import processes
from slsgu_cli.clip.inputs import pixel_normalizer, spans, spare, staged, text_features, to_tokens
from slsgu_cli.clip.towers import SplitTower, text_tower, vision_tower
from slsgu_cli.errors import InputError, StaleError
from slsgu_cli.prefetch import prefetch
from slsgu_cli.records.method import Precision
from slsgu_cli.records.options import PassOptions
from slsgu_cli.records.sets import InputSpec
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Arrays

# (image features, text features, mini-batch size) -> one loss per mini-batch.
# Features are unit vectors of shape (pairs, width); a last, smaller mini-batch is allowed.
GroupedLoss = Callable[[Tensor, Tensor, int], Tensor]


def cosine_forget(images: Tensor, texts: Tensor, batch_size: int) -> Tensor:
    """Return the mean of 1 - cos(v_i, t_i) in each mini-batch (Eq. 5)."""
    return _per_batch(1 - (images * texts).sum(dim=-1), batch_size)


def contrastive(scale: Tensor) -> GroupedLoss:
    """Return the symmetric contrastive loss inside each mini-batch (Eq. 4).

    `scale` is the multiplier of the cosines, exp(logit_scale) = 1 / temperature.
    """

    def loss(images: Tensor, texts: Tensor, batch_size: int) -> Tensor:
        def whole(v: Tensor, t: Tensor) -> Tensor:
            logits = scale * torch.bmm(v, t.transpose(1, 2))
            truth = torch.arange(v.shape[1], device=v.device).expand(v.shape[:2])
            rows = F.cross_entropy(logits.transpose(1, 2), truth, reduction="none")
            columns = F.cross_entropy(logits, truth, reduction="none")
            return (rows.mean(dim=1) + columns.mean(dim=1)) / 2

        return _blocks(whole, images, texts, batch_size)

    return loss


def sigmoid(scale: Tensor, bias: Tensor) -> GroupedLoss:
    """Return the pairwise sigmoid loss of SigLIP inside each mini-batch."""

    def loss(images: Tensor, texts: Tensor, batch_size: int) -> Tensor:
        def whole(v: Tensor, t: Tensor) -> Tensor:
            logits = scale * torch.bmm(v, t.transpose(1, 2)) + bias
            truth = 2 * torch.eye(v.shape[1], device=v.device) - 1
            return -F.logsigmoid(truth * logits).sum(dim=(1, 2)) / v.shape[1]

        return _blocks(whole, images, texts, batch_size)

    return loss


def _blocks(
    whole: Callable[[Tensor, Tensor], Tensor], images: Tensor, texts: Tensor, batch_size: int
) -> Tensor:
    """Apply `whole` to the full mini-batches as one stack and to the smaller last one."""
    pairs = images.shape[0]
    full = pairs - pairs % batch_size
    losses = []
    if full:
        losses.append(
            whole(
                images[:full].reshape(-1, batch_size, images.shape[1]),
                texts[:full].reshape(-1, batch_size, texts.shape[1]),
            )
        )
    if full < pairs:
        losses.append(whole(images[full:].unsqueeze(0), texts[full:].unsqueeze(0)))
    return torch.cat(losses)


def _per_batch(values: Tensor, batch_size: int) -> Tensor:
    full = values.shape[0] - values.shape[0] % batch_size
    means = [values[:full].reshape(-1, batch_size).mean(dim=1)] if full else []
    if full < values.shape[0]:
        means.append(values[full:].mean().unsqueeze(0))
    return torch.cat(means)


# Pairs per forward beyond which a device gains nothing more, measured: at least a mini-batch.
BEST_PAIRS = {"cpu": 1, "cuda": 1024, "mps": 256}

NOT_FINITE = (
    "look at these images and captions, and whether the weights hold NaN; "
    "with --precision bf16, try fp32"
)

# Mini-batches that are summed by themselves before they are added to the others.
TURN = 8


@dataclass(slots=True)
class Sums:
    """Gradients of mini-batches added up in their order, fp32, and the loss of each.

    `total` is over the mini-batches of whole turns, of which `added` are in it, and `turn`
    over those of a turn of this process, up to `done`. The first `size` entries of both are
    (kinds, entries of all parameters): the gradients, and where they are wanted their squares.
    """

    kinds: int
    size: int
    total: processes.OrderedSum
    turn: Tensor
    losses: Tensor
    added: int = 0
    done: int = 0

    @classmethod
    def none(cls, parameters: Iterable[Tensor], batches: int, kinds: int) -> Self:
        """Return the sums over no mini-batch yet."""
        listed = list(parameters)
        size, device = kinds * sum(p.numel() for p in listed), listed[0].device
        padded = -(-size // processes.count()) * processes.count()
        turn = torch.zeros(padded, device=device)
        losses = torch.zeros(batches, device=device)
        return cls(kinds, size, processes.OrderedSum(turn), turn, losses)

    def split_up(self, values: Tensor, parameters: Iterable[Tensor]) -> list[list[Tensor]]:
        """Return what `turn` or a whole total holds of each parameter, kind by kind."""
        listed = list(parameters)
        sizes = [parameter.numel() for parameter in listed]
        parts = torch.split(values[: self.size], sizes * self.kinds)
        shaped = [part.view(p.shape) for part, p in zip(parts, self.kinds * listed, strict=True)]
        return [shaped[start : start + len(listed)] for start, _ in spans(len(shaped), len(listed))]

    def end_turns(self, turns: "Turns") -> Tensor:
        """Add this turn of every process; return whether this one's was finite."""
        finite = self.finite(turns.first)
        self.total.add(self.turn, turns.have)
        self.turn.zero_()
        self.added = self.done = turns.end
        return finite

    def drop_turn(self) -> None:
        """Forget the turn under way: it is begun again."""
        self.turn.zero_()
        self.done = self.added

    def finite(self, first: int) -> Tensor:
        """Return whether all of the turn under way, from `first` on, is finite, on its device."""
        losses = self.losses[first : self.done]
        return torch.isfinite(torch.stack([*self.turn.aminmax(), losses.sum()])).all()

    def kept(self) -> Arrays:
        """Return what a later run goes on with, to all processes."""
        sums = {"total": self.total.whole(), "turn": self.turn}
        arrays = {name: value[: self.size].cpu().numpy() for name, value in sums.items()}
        return arrays | {"losses": self.all_losses().cpu().numpy()}

    def go_on(self, kept: Arrays, added: int, done: int) -> None:
        """Go on with what an earlier run kept, of which `added` and `done` mini-batches are.

        Several processes begin their turns again.
        """
        if len(kept["total"]) < self.size:
            raise StaleError("they have no squares")
        on_host = {name: torch.from_numpy(values) for name, values in kept.items()}
        alone = processes.count() == 1
        whole = torch.zeros_like(self.turn)
        whole[: self.size] = on_host["total"][: self.size]
        self.total.begin(whole)
        if alone:
            self.turn.copy_(on_host["turn"][: self.size])
        if processes.is_first():
            self.losses.copy_(on_host["losses"])
            self.losses[done if alone else added :] = 0
        self.added, self.done = added, done if alone else added

    def all_losses(self) -> Tensor:
        """Return the loss of each mini-batch, whichever process ran it; 0 of those to come."""
        losses = self.losses.clone()
        processes.add_up(losses)
        return losses


# Of a model that each process has whole, and of one that is sharded over them.
AnySums = Sums | processes.ShardedSums


class Keeper(Protocol):
    """Keeps sums where a later run finds them."""

    def restore(self, sums: AnySums) -> None:
        """Put what was kept into sums over nothing, if there is anything."""

    @property
    def due(self) -> bool:
        """Whether it is time to keep them."""

    def keep(self, sums: AnySums) -> None:
        """Keep sums that are finite."""


@dataclass(slots=True)
class GradientPass:
    """A model ready to give gradients of one loss."""

    model: nn.Module
    vision: SplitTower
    text: SplitTower
    loss: GroupedLoss
    spec: InputSpec
    options: PassOptions

    @classmethod
    def prepare(
        cls, model: nn.Module, loss: str, *, spec: InputSpec, options: PassOptions
    ) -> "GradientPass":
        """Return a pass over `model` for the loss called cosine, contrastive or sigmoid.

        It runs on the device that the model is on, whatever `options` say.
        """
        scale: Any = model.logit_scale
        bias: Any = getattr(model, "logit_bias", None)
        losses: dict[str, Any] = {
            "cosine": lambda: cosine_forget,
            "contrastive": lambda: contrastive(scale.reshape(()).exp()),
            "sigmoid": lambda: sigmoid(scale.reshape(()).exp(), bias.reshape(())),
        }

        def grouped(images: Tensor, texts: Tensor, batch_size: int) -> Tensor:
            values: Tensor = losses[loss]()(images, texts, batch_size)
            return values

        vision, text = vision_tower(model), text_tower(model)
        options = replace(options, device=str(next(model.parameters()).device))
        return cls(model, vision, text, grouped, spec, options)

    def run(
        self, block: DataBlock, label: str, keeper: Keeper | None = None
    ) -> tuple[Arrays, float]:
        """Return the mean gradient of every parameter and the mean loss, over mini-batches.

        With a `keeper`, it goes on with the sums that an earlier run kept, and keeps its own.
        Raises InputError naming mini-batch and keys where a loss or gradient is not finite.
        """
        (gradient,), loss = self._means(block, label, keeper, kinds=1)
        return gradient, loss

    def run_squared(
        self, block: DataBlock, label: str, keeper: Keeper | None = None
    ) -> tuple[Arrays, Arrays, float]:
        """Return the mean gradient, the mean of its squares over mini-batches, the mean loss.

        The gradient of a sum of losses does not tell their squares apart, so each
        mini-batch has a forward and a backward of its own on any device.
        """
        (gradient, squares), loss = self._means(block, label, keeper, kinds=2)
        return gradient, squares, loss

    def _means(
        self, block: DataBlock, label: str, keeper: Keeper | None, kinds: int
    ) -> tuple[list[Arrays], float]:
        """Run the pass over the mini-batches that are not in the sums that were kept."""
        if self.options.shard:
            return self._sharded_means(block, label, keeper)
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        batches = -(-block.rows // self.options.batch_size)
        sums = Sums.none(parameters.values(), batches, kinds)
        if keeper:
            keeper.restore(sums)
        left = len(range(sums.done, batches, processes.count())) * self.options.batch_size
        with (
            arithmetic(self.options.precision),
            progress.bar(label, left) as ticker,
            adding_to(sums, parameters.values()),
        ):
            pairs = self.options.batch_size if kinds > 1 else self._pairs_per_forward(block)
            largest = pairs // self.options.batch_size
            turn = processes.from_first(lambda: max(TURN, min(largest, _a_share(batches))))
            while sums.added < batches:
                try:
                    for rows in self._added(block, sums, turn=turn, pairs=pairs, keeper=keeper):
                        ticker.advance(rows)
                except torch.cuda.OutOfMemoryError:
                    sums.drop_turn()
                    pairs = self._shrink(pairs)
        whole = sums.total.whole().div_(batches)
        means = [
            {n: v.cpu().numpy() for n, v in zip(parameters, values, strict=True)}
            for values in sums.split_up(whole, parameters.values())
        ]
        return means, float(sums.all_losses().cpu().double().sum()) / batches

    def _sharded_means(
        self, block: DataBlock, label: str, keeper: Keeper | None
    ) -> tuple[list[Arrays], float]:
        """Run the pass with a sharded model: every process runs in every step."""
        size = self.options.batch_size
        batches = -(-block.rows // size)
        sums = processes.ShardedSums(self.model, batches)
        if keeper:
            keeper.restore(sums)
        normalize = pixel_normalizer(self.spec, self.options.device)
        with arithmetic(self.options.precision):
            pairs = self._pairs_per_forward(block)
            rounds = dealt_turns(sums.added, batches, min(pairs // size, _a_share(batches)))
            # Who has none left runs the first mini-batch, which does not count.
            ranges = [(r.first, r.last) if r.last > r.first else (0, 1) for r in rounds]
            with progress.bar(label, sum((b - a) * size for a, b in ranges)) as ticker:
                stream = self._stream(block, ranges, pairs)
                for each, (first, stop, images) in zip(rounds, stream, strict=True):
                    pixels, ids = normalize(images), to_tokens(block.tokens[first:stop], "cpu")
                    counts = each.last > each.first
                    losses = partial(self.losses, pixels, ids)
                    values = sums.step(losses, each.end, counts=counts)
                    if counts:
                        sums.losses[each.first : each.last] = values
                    self._check_sharded(block, sums, each)
                    if keeper and each is not rounds[-1] and processes.agreed(keeper.due):
                        keeper.keep(sums)
                    ticker.advance(stop - first)
        return [sums.means()], float(sums.all_losses().cpu().double().sum()) / batches

    def _check_sharded(self, block: DataBlock, sums: processes.ShardedSums, turn: "Turns") -> None:
        """Raise InputError in every process where the losses or sums of one are not finite."""
        lost = not sums.losses[turn.first : turn.last].isfinite().all()
        found = processes.gathered((lost, sums.finite(), turn.first, turn.last))
        if all(finite and not lost for lost, finite, *_ in found):
            return
        # A loss tells whose mini-batches it was; of a gradient's sum nobody knows.
        spans_of = [(a, b) for lost, _, a, b in found if lost] or [(found[0][2], turn.end)]
        size = self.options.batch_size
        start, stop = spans_of[0][0] * size, min(spans_of[0][1] * size, block.rows)
        raise InputError(
            f"the gradient is not finite in rows {start} to {stop - 1}: "
            f"{', '.join(block.keys[start:stop])}",
            hint=NOT_FINITE,
        )

    def _added(
        self, block: DataBlock, sums: Sums, *, turn: int, pairs: int, keeper: Keeper | None
    ) -> Iterator[int]:
        """Add the rest of the mini-batches, `turn` at a time; yield rows as they are done."""
        normalize = pixel_normalizer(self.spec, self.options.device)
        size, tokens, unchecked = self.options.batch_size, block.tokens, None
        rounds = dealt_turns(sums.added, len(sums.losses), turn)
        stream = self._stream(block, [(max(r.first, sums.done), r.last) for r in rounds], pairs)
        for each in rounds:
            sums.done = max(sums.done, each.first)
            while sums.done < each.last:
                first, stop, images = next(stream)
                values = self._group(normalize(images), to_tokens(tokens[first:stop], "cpu"))
                sums.done = -(-stop // size)
                sums.losses[first // size : sums.done] = values
                # Looked at when the next group is under way: a GPU never waits for it.
                if unchecked:
                    self._check(block, *unchecked)
                    unchecked = None
                under_way = processes.count() == 1 and sums.done < each.last
                if keeper is not None and under_way and keeper.due:
                    self._check(block, each.first, each.last, sums.finite(each.first))
                    keeper.keep(sums)
                yield stop - first
            if unchecked:
                self._check(block, *unchecked)
            unchecked = each.first, each.last, sums.end_turns(each)
            if keeper is not None and processes.from_first(lambda: keeper.due):
                self._check(block, *unchecked)
                keeper.keep(sums)
        if unchecked:
            self._check(block, *unchecked)

    def losses(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of each of some mini-batches."""
        half = self.options.precision is Precision.BF16
        # What it keeps of weights in 16 bits would be all of a sharded model.
        cache = not self.options.shard
        with torch.autocast(self._kind, torch.bfloat16, enabled=half, cache_enabled=cache):
            v = self.vision.features(images, images)
            t = text_features(self.text, ids, self.options.device)
        return self.loss(v, t, self.options.batch_size)

    def _group(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return the losses of some mini-batches; their gradients go to what `.grad` is."""
        values = self.losses(images, ids)
        values.sum().backward()  # type: ignore[no-untyped-call]
        return values.detach()

    def _stream(
        self, block: DataBlock, turns: Iterable[tuple[int, int]], pairs: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield rows of turns, each from one mini-batch up to another, in groups of `pairs`."""
        size = self.options.batch_size
        ranges = [
            (first * size + a, first * size + b)
            for first, last in turns
            for a, b in spans(min(last * size, block.rows) - first * size, pairs)
        ]
        device = self.options.device
        images = prefetch(lambda span: staged(block.images(*span), device), ranges, threads=2)
        for (first, stop), chunk in zip(ranges, images, strict=True):
            yield first, stop, chunk

    def _pairs_per_forward(self, block: DataBlock) -> int:
        """Return how many pairs to run at once: whole mini-batches within the budget."""
        size = self.options.batch_size
        if self.options.shard and self.options.precision is Precision.BF16:
            # Nor does a backward keep them when it runs each block again.
            self.vision.checkpointing = self.text.checkpointing = True
        needed = self._pair_bytes(block)
        budget = self.options.memory_budget or spare(self.options.device)
        if self.options.shard:
            budget = min(processes.gathered(budget))
        if needed * size > budget and not self.vision.checkpointing:
            self.vision.checkpointing = self.text.checkpointing = True
            needed = self._pair_bytes(block)
            progress.note("memory is short: activations are recomputed block by block")
        fits = max(1, int(budget / needed / size))
        pairs = size * max(1, min(fits, BEST_PAIRS[self._kind] // size))
        progress.detail(f"{needed / 2**20:.1f} MiB of activations a pair, {pairs} pairs a forward")
        return pairs

    def _pair_bytes(self, block: DataBlock) -> float:
        """Return what a backward keeps of one pair, from a forward of one mini-batch."""
        rows = min(self.options.batch_size, block.rows)
        try:
            return self._activation_bytes(block, rows) / rows
        except torch.cuda.OutOfMemoryError:
            if self.options.shard:
                raise
            self._shrink(rows)
        return self._pair_bytes(block)

    def _activation_bytes(self, block: DataBlock, rows: int) -> int:
        """Return what a backward keeps of a forward over the first `rows` pairs."""
        kept: dict[int, int] = {}
        of_parameters = self._parameter_places()

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            # Where weights are gathered changes from block to block.
            weights = self._parameter_places() if self.options.shard else of_parameters
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            # A tensor that its own graph holds would never be freed.
            return tensor.detach()

        images = pixel_normalizer(self.spec, self.options.device)(block.images(0, rows))
        ids = to_tokens(block.tokens[:rows], "cpu")
        losses = partial(self.losses, images, ids)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses() if not self.options.shard else processes.run(self.model, losses)
        return max(1, sum(kept.values()))

    def _parameter_places(self) -> set[int]:
        """Return where the parameters are that this process has whole now."""
        return {p.data_ptr() for p in self.model.parameters() if not processes.is_sharded(p)}

    def _shrink(self, pairs: int) -> int:
        """Return half of `pairs` after running out of memory, or turn checkpointing on."""
        torch.cuda.empty_cache()
        size = self.options.batch_size
        if pairs > size:
            pairs = max(size, pairs // 2 // size * size)
            progress.note(f"out of memory: going on with {pairs} pairs a forward")
        elif not self.vision.checkpointing:
            self.vision.checkpointing = self.text.checkpointing = True
            progress.note("out of memory: activations are recomputed block by block")
        else:
            raise InputError(
                f"one mini-batch of {size} pairs does not fit in {self.options.device}'s memory",
                hint="use a smaller --batch-size (it changes the contrastive loss) or --device cpu",
            )
        return pairs

    def _check(self, block: DataBlock, first: int, last: int, finite: Tensor) -> None:
        size = self.options.batch_size
        if not finite:
            self._name_culprit(block, first * size, min(last * size, block.rows))

    def _name_culprit(self, block: DataBlock, start: int, stop: int) -> None:
        """Raise InputError naming the first mini-batch whose loss or gradient is not finite."""
        normalize = pixel_normalizer(self.spec, self.options.device)
        parameters = list(self.model.parameters())
        size = self.options.batch_size
        for a, b in ((start + x, start + y) for x, y in spans(stop - start, size)):
            ids = to_tokens(block.tokens[a:b], "cpu")
            values = self.losses(normalize(block.images(a, b)), ids)
            gradients = torch.autograd.grad(values.sum(), parameters, allow_unused=True)
            figures = [values, *(gradient for gradient in gradients if gradient is not None)]
            if not all(each.isfinite().all() for each in figures):
                keys = ", ".join(block.keys[a:b])
                raise InputError(
                    f"the gradient is not finite in mini-batch {a // size} "
                    f"(rows {a} to {b - 1}): {keys}",
                    hint=NOT_FINITE,
                )
        raise InputError(
            f"the gradient of rows {start} to {stop - 1} is not finite, though each of their "
            "mini-batches alone is",
            hint="try --precision fp32",
        )

    @property
    def _kind(self) -> str:
        return self.options.device.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Turns:
    """A turn of every process: mini-batches `first` to `last` are this one's, maybe none.

    So many processes `have` one; the next turns begin at mini-batch `end`.
    """

    first: int
    last: int
    have: int
    end: int


def dealt_turns(start: int, batches: int, turn: int) -> list[Turns]:
    """Return the turns in which mini-batches from `start` on are dealt, `turn` to each."""
    rank, each = processes.rank(), turn * processes.count()
    rounds = []
    for begin, end in ((start + a, start + b) for a, b in spans(batches - start, each)):
        first = min(begin + rank * turn, end)
        rounds.append(Turns(first, min(first + turn, end), -(-(end - begin) // turn), end))
    return rounds


def _a_share(batches: int) -> int:
    return -(-batches // processes.count())


@contextlib.contextmanager
def adding_to(sums: Sums, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let every backward add its gradients to the turn of `sums`, and their squares.

    Each gradient is added while it is in the processor's cache, and then dropped.
    """
    listed = list(parameters)
    before = [parameter.grad for parameter in listed]
    gradients, *squares = sums.split_up(sums.turn, listed)
    hooks: list[Any] = []
    try:
        for index, parameter in enumerate(listed):
            parameter.grad = gradients[index]
            for kind in squares:
                add_square: Any = partial(_add_square, kind[index])
                hooks.append(parameter.register_hook(add_square))  # type: ignore[no-untyped-call]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(listed, before, strict=True):
            parameter.grad = gradient


def _add_square(total: Tensor, gradient: Tensor) -> None:
    total.addcmul_(gradient, gradient)


@contextlib.contextmanager
def arithmetic(precision: Precision) -> Iterator[None]:
    """Set the matrix products of a CUDA device to full fp32 or to TF32, and back."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision is Precision.TF32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
