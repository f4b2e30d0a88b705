"""The mean gradient of a loss over a data block, for every parameter.

The loss is defined on mini-batches. A CPU runs them one after another, so the order of fp32
additions, and every byte of the gradient, is independent of the available memory. Other devices
stack mini-batches up to the memory budget or the device's best size, sum their losses, and run
one backward for all of them, which changes the last digit only.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from slsgu_cli import processes, progress
from slsgu_cli.clip.batches import pixel_normalizer, spans, staged, text_features, to_tokens
from slsgu_cli.clip.memory import spare
from slsgu_cli.clip.towers import SplitTower, text_tower, vision_tower
from slsgu_cli.engine.resumable import SavedSums
from slsgu_cli.errors import InputError, StaleError
from slsgu_cli.method.losses import Loss, contrastive, cosine_forget, sigmoid
from slsgu_cli.prefetch import prefetch
from slsgu_cli.records.method import Precision, SumsHeader
from slsgu_cli.records.options import PassOptions
from slsgu_cli.records.sets import InputSpec
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Arrays


def per_batch(loss: Loss, images: Tensor, texts: Tensor, batch_size: int) -> Tensor:
    """Return the loss of each mini-batch of unit features (pairs, width).

    Full mini-batches run as one stack, and a smaller last one by itself.
    """
    full = len(images) - len(images) % batch_size
    losses = []
    if full:
        stacks = (torch.unflatten(each[:full], 0, (-1, batch_size)) for each in (images, texts))
        losses.append(loss(*stacks))
    if full < len(images):
        losses.append(loss(images[full:], texts[full:])[None])
    return torch.cat(losses)


# Pairs per forward beyond which a device gains nothing more, measured: at least a mini-batch.
BEST_PAIRS = {"cpu": 1, "cuda": 1024, "mps": 256}

NOT_FINITE = (
    "look at these images and captions, and whether the weights hold NaN; "
    "with --precision bf16, try fp32"
)

# Mini-batches that are summed before they are added to the total: a chunk that fails, because
# memory runs out or a value is not finite, leaves the total unchanged.
CHUNK = 8


@dataclass(slots=True)
class Sums:
    """Gradients of mini-batches added up in their order, fp32, and the loss of each.

    `total` sums the chunks that this rank has finished, among the first `added` mini-batches;
    `chunk` is the partial sum of its chunk under way, up to mini-batch `done`. Both have the
    shape (kinds, entries of all parameters): the gradients and, with two kinds, their squares.
    """

    kinds: int
    total: Tensor
    chunk: Tensor
    losses: Tensor
    added: int = 0
    done: int = 0

    @classmethod
    def none(cls, parameters: Iterable[Tensor], batches: int, kinds: int) -> Self:
        """Return the sums over no mini-batch yet."""
        listed = list(parameters)
        size, device = kinds * sum(p.numel() for p in listed), listed[0].device
        total, chunk = torch.zeros(size, device=device), torch.zeros(size, device=device)
        return cls(kinds, total, chunk, torch.zeros(batches, device=device))

    def split_up(self, values: Tensor, parameters: Iterable[Tensor]) -> list[list[Tensor]]:
        """Return views of `chunk` or `total` in the shapes of the parameters, kind by kind."""
        listed = list(parameters)
        sizes = [parameter.numel() for parameter in listed]
        parts = torch.split(values, sizes * self.kinds)
        shaped = [part.view(p.shape) for part, p in zip(parts, self.kinds * listed, strict=True)]
        return [shaped[start : start + len(listed)] for start, _ in spans(len(shaped), len(listed))]

    def end_chunk(self, chunk: "Chunk") -> Tensor:
        """Add the chunk under way to the total; return whether it is finite, on its device."""
        finite = self.finite(chunk.first)
        self.total.add_(self.chunk)
        self.chunk.zero_()
        self.added = self.done = chunk.end
        return finite

    def drop_chunk(self) -> None:
        """Discard the chunk under way, which is run again."""
        self.chunk.zero_()
        self.done = self.added

    def finite(self, first: int) -> Tensor:
        """Return whether all of the chunk under way, from `first` on, is finite, on its device."""
        losses = self.losses[first : self.done]
        return torch.isfinite(torch.stack([*self.chunk.aminmax(), losses.sum()])).all()

    def state(self) -> Arrays:
        """Return the sums over all ranks, from which a later run resumes."""
        sums = {
            "total": processes.summed(self.total),
            "chunk": self.chunk,
            "losses": processes.summed(self.losses),
        }
        return {name: values.cpu().numpy() for name, values in sums.items()}

    def write(self, saved: SavedSums) -> None:
        """Write the sums, which are finite, so that a later run can resume from them."""
        saved.write(self.state, len(self.losses), added=self.added, done=self.done)

    def resume(self, header: SumsHeader, state: Arrays) -> None:
        """Resume from the state of an earlier run.

        Several ranks run their unfinished chunks again. Raises StaleError if squares are missing.
        """
        size = len(self.total)
        if len(state["total"]) < size:
            raise StaleError("they have no squares")
        alone = processes.world_size() == 1
        self.added, self.done = header.added, header.done if alone else header.added
        if processes.is_first():
            self.total.copy_(torch.from_numpy(state["total"][:size]))
            self.losses.copy_(torch.from_numpy(state["losses"]))
            self.losses[self.done :] = 0
        if alone:
            self.chunk.copy_(torch.from_numpy(state["chunk"][:size]))


@dataclass(slots=True)
class GradientPass:
    """A model ready to give gradients of one loss."""

    model: nn.Module
    vision: SplitTower
    text: SplitTower
    loss: Loss
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
        losses: dict[str, Callable[[], Loss]] = {
            "cosine": lambda: cosine_forget,
            "contrastive": lambda: contrastive(scale.reshape(()).exp()),
            "sigmoid": lambda: sigmoid(scale.reshape(()).exp(), bias.reshape(())),
        }

        def chosen(images: Tensor, texts: Tensor) -> Tensor:
            return losses[loss]()(images, texts)

        vision, text = vision_tower(model), text_tower(model)
        options = replace(options, device=str(next(model.parameters()).device))
        return cls(model, vision, text, chosen, spec, options)

    def run(
        self, block: DataBlock, label: str, saved: SavedSums | None = None
    ) -> tuple[Arrays, float]:
        """Return the mean gradient of every parameter and the mean loss, over mini-batches.

        With `saved` sums, resume from those of an earlier run, and write them from time to time.
        Raises InputError naming mini-batch and keys where a loss or gradient is not finite.
        """
        (gradient,), loss = self._means(block, label, saved, kinds=1)
        return gradient, loss

    def run_squared(
        self, block: DataBlock, label: str, saved: SavedSums | None = None
    ) -> tuple[Arrays, Arrays, float]:
        """Return the mean gradient, the mean of its squares over mini-batches, the mean loss.

        The gradient of a sum of losses does not tell their squares apart, so each
        mini-batch has a forward and a backward of its own on any device.
        """
        (gradient, squares), loss = self._means(block, label, saved, kinds=2)
        return gradient, squares, loss

    def _means(
        self, block: DataBlock, label: str, saved: SavedSums | None, kinds: int
    ) -> tuple[list[Arrays], float]:
        """Run the pass over the mini-batches that the saved sums do not cover."""
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        batches = -(-block.rows // self.options.batch_size)
        sums = Sums.none(parameters.values(), batches, kinds)
        if saved and saved.resume(batches, sums.resume):
            progress.note(f"the {label} resumes after {sums.done} of its {batches} mini-batches")
        left = len(range(sums.done, batches, processes.world_size())) * self.options.batch_size
        with (
            arithmetic(self.options.precision),
            progress.bar(label, left) as ticker,
            adding_to(sums, parameters.values()),
        ):
            pairs = self.options.batch_size if kinds > 1 else self._pairs_per_forward(block)
            largest = pairs // self.options.batch_size
            share = -(-batches // processes.world_size())
            chunk = processes.agreed(max(CHUNK, min(largest, share)))
            while sums.added < batches:
                try:
                    for rows in self._added(block, sums, chunk=chunk, pairs=pairs, saved=saved):
                        ticker.advance(rows)
                except torch.cuda.OutOfMemoryError:
                    sums.drop_chunk()
                    pairs = self._shrink(pairs)
        whole = processes.summed(sums.total).div_(batches)
        means = [
            {n: v.cpu().numpy() for n, v in zip(parameters, values, strict=True)}
            for values in sums.split_up(whole, parameters.values())
        ]
        return means, float(processes.summed(sums.losses).cpu().double().sum()) / batches

    def _added(
        self, block: DataBlock, sums: Sums, *, chunk: int, pairs: int, saved: SavedSums | None
    ) -> Iterator[int]:
        """Add the other mini-batches, `chunk` at a time; yield rows as they are done."""
        normalize = pixel_normalizer(self.spec, self.options.device)
        size, tokens, unchecked = self.options.batch_size, block.tokens, None
        rounds = split_chunks(sums.added, len(sums.losses), chunk)
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
                under_way = processes.world_size() == 1 and sums.done < each.last
                if saved is not None and under_way and saved.due:
                    self._check(block, each.first, each.last, sums.finite(each.first))
                    sums.write(saved)
                yield stop - first
            if unchecked:
                self._check(block, *unchecked)
            unchecked = each.first, each.last, sums.end_chunk(each)
            if saved is not None and processes.agreed(saved.due):
                self._check(block, *unchecked)
                sums.write(saved)
        if unchecked:
            self._check(block, *unchecked)

    def losses(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of each of some mini-batches."""
        half = self.options.precision is Precision.BF16
        with torch.autocast(self._kind, torch.bfloat16, enabled=half):
            v = self.vision.features(images, images)
            t = text_features(self.text, ids, self.options.device)
        return per_batch(self.loss, v, t, self.options.batch_size)

    def _group(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return the losses of some mini-batches; their gradients go to what `.grad` is."""
        values = self.losses(images, ids)
        values.sum().backward()  # type: ignore[no-untyped-call]
        return values.detach()

    def _stream(
        self, block: DataBlock, chunks: Iterable[tuple[int, int]], pairs: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield rows of chunks, each from one mini-batch up to another, in groups of `pairs`."""
        size = self.options.batch_size
        ranges = [
            (first * size + a, first * size + b)
            for first, last in chunks
            for a, b in spans(min(last * size, block.rows) - first * size, pairs)
        ]
        device = self.options.device
        images = prefetch(lambda span: staged(block.images(*span), device), ranges, threads=2)
        for (first, stop), chunk in zip(ranges, images, strict=True):
            yield first, stop, chunk

    def _pairs_per_forward(self, block: DataBlock) -> int:
        """Return how many pairs to run at once: whole mini-batches within the budget."""
        size = self.options.batch_size
        needed = self._pair_bytes(block)
        budget = self.options.memory_budget or spare(self.options.device)
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
            self._shrink(rows)
        return self._pair_bytes(block)

    def _activation_bytes(self, block: DataBlock, rows: int) -> int:
        """Return what a backward keeps of a forward over the first `rows` pairs."""
        kept: dict[int, int] = {}
        weights = {parameter.data_ptr() for parameter in self.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            # A tensor that its own graph holds would never be freed.
            return tensor.detach()

        images = pixel_normalizer(self.spec, self.options.device)(block.images(0, rows))
        ids = to_tokens(block.tokens[:rows], "cpu")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.losses(images, ids)
        return max(1, sum(kept.values()))

    def _shrink(self, pairs: int) -> int:
        """Return half of `pairs` after running out of memory, or turn checkpointing on."""
        torch.cuda.empty_cache()
        size = self.options.batch_size
        if pairs > size:
            pairs = max(size, pairs // 2 // size * size)
            progress.note(f"out of memory: continuing with {pairs} pairs a forward")
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
class Chunk:
    """The mini-batches `first` to `last` (not included) of this rank, possibly none.

    Each rank has one; together they are followed by mini-batch `end`.
    """

    first: int
    last: int
    end: int


def split_chunks(start: int, batches: int, size: int) -> list[Chunk]:
    """Return this rank's chunks of the mini-batches from `start` on, `size` in each."""
    rank, each = processes.rank(), size * processes.world_size()
    chunks = []
    for begin, end in ((start + a, start + b) for a, b in spans(batches - start, each)):
        first = min(begin + rank * size, end)
        chunks.append(Chunk(first, min(first + size, end), end))
    return chunks


@contextlib.contextmanager
def adding_to(sums: Sums, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let every backward add its gradients to the chunk of `sums`, and their squares.

    Each gradient is added while it is in the processor's cache, and then dropped.
    """
    listed = list(parameters)
    before = [parameter.grad for parameter in listed]
    gradients, *squares = sums.split_up(sums.chunk, listed)
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
