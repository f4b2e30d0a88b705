"""The mean gradient of a loss over a data block, for every parameter.

The loss is defined on mini-batches. A CPU runs them one after another, so the order of fp32
additions, and every byte of the gradient, is independent of the available memory. Other devices
stack mini-batches up to the memory budget or the device's best size, sum their losses, and run
one backward for all of them, which changes the last digit only.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from slsgu_cli import processes, progress
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.clip.batches import pixel_normalizer, spans, staged, text_features, to_tokens
from slsgu_cli.clip.memory import spare
from slsgu_cli.clip.towers import text_tower, vision_tower
from slsgu_cli.engine.resumable import SavedSums
from slsgu_cli.errors import InputError
from slsgu_cli.method.losses import cosine_forget, toward_anchor
from slsgu_cli.method.unlearn import retain_loss
from slsgu_cli.prefetch import prefetch
from slsgu_cli.records.method import Precision, Tower
from slsgu_cli.records.options import PassOptions
from slsgu_cli.records.sets import InputSpec
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Arrays

# Pairs per forward beyond which a device gains nothing more, measured: at least a mini-batch.
BEST_PAIRS = {"cpu": 1, "cuda": 1024, "mps": 256}

# Mini-batches that are summed before they are added to the total: a chunk that fails, because
# memory runs out or a value is not finite, leaves the total unchanged.
CHUNK = 8


def per_batch(loss: Callable[..., Tensor], features: Sequence[Tensor], batch_size: int) -> Tensor:
    """Return the loss of each mini-batch of unit features, (pairs, width) each.

    Full mini-batches run as one stack, and a smaller last one by itself.
    """
    pairs = len(features[0])
    full = pairs - pairs % batch_size
    losses = []
    if full:
        stacks = (torch.unflatten(each[:full], 0, (-1, batch_size)) for each in features)
        losses.append(loss(*stacks))
    if full < pairs:
        losses.append(loss(*(each[full:] for each in features))[None])
    return torch.cat(losses)


# The forget losses: the paper's, and that towards an anchor.
COSINE, ANCHOR = "cosine", "anchor"
FORGET_LOSSES: dict[str, Callable[..., Tensor]] = {COSINE: cosine_forget, ANCHOR: toward_anchor}


class Sums:
    """Gradients of mini-batches added up in their order, fp32, and the loss of each.

    `total` sums the chunks that this rank has finished, among the first `done` mini-batches;
    `chunk` is the sum of its current chunk. Both have the shape (kinds, entries of all
    parameters): the gradients and, with two kinds, their squares.
    """

    def __init__(self, parameters: Sequence[Tensor], batches: int, kinds: int) -> None:
        size, device = sum(p.numel() for p in parameters), parameters[0].device
        self.total = torch.zeros(kinds, size, device=device)
        self.chunk = torch.zeros_like(self.total)
        self.losses = torch.zeros(batches, device=device)
        self.done = 0

    def resume(self, saved: SavedSums) -> None:
        """Resume from saved sums, with any number of ranks."""
        self.done, arrays = saved.read(len(self.losses))
        if self.done and processes.is_first():
            self.total.copy_(torch.from_numpy(arrays["total"]))
            self.losses.copy_(torch.from_numpy(arrays["losses"]))

    def write(self, saved: SavedSums) -> None:
        """Write the sums over all ranks, so that a later run can resume from them."""
        sums = {"total": processes.summed(self.total), "losses": processes.summed(self.losses)}
        arrays = {name: values.cpu().numpy() for name, values in sums.items()}
        saved.write(arrays, done=self.done, batches=len(self.losses))


class GradientPass:
    """A model ready to give gradients of one loss.

    It runs on the device that the model is on, whatever `options` say.
    """

    def __init__(
        self, model: nn.Module, loss: str, *, spec: InputSpec, options: PassOptions
    ) -> None:
        """Prepare a pass for a forget loss by name, or else the retain loss of the model."""
        self.model, self.options = model, options
        self.device = str(next(model.parameters()).device)
        self.vision, self.text = vision_tower(model), text_tower(model)
        self.normalize = pixel_normalizer(spec, self.device)
        # What the texts of the block of a run are to become, (rows, width).
        self.anchors: Tensor | None = None
        self.loss = FORGET_LOSSES.get(loss) or retain_loss(model)

    def run(
        self,
        block: DataBlock,
        label: str,
        saved: SavedSums | None = None,
        *,
        squares: bool = False,
    ) -> tuple[list[Arrays], float]:
        """Return the means over mini-batches of every parameter's gradient, and of the loss.

        With `squares`, the means of the squared gradients come second. The gradient of a sum of
        losses cannot be split into their squares, so each mini-batch then has a forward and a
        backward of its own on any device. With `saved` sums, resume from those of an earlier
        run, and write them from time to time. Raises InputError naming rows and keys where a
        loss or gradient is not finite.
        """
        trained = {n: p for n, p in self.parameters(block).items() if p.requires_grad}
        names, parameters = list(trained), list(trained.values())
        size, ranks = self.options.batch_size, processes.world_size()
        batches = -(-block.rows // size)
        self.anchors = self._anchors(block)
        sums = Sums(parameters, batches, kinds=2 if squares else 1)
        if saved:
            sums.resume(saved)
        if sums.done:
            progress.note(f"the {label} resumes after {sums.done} of its {batches} mini-batches")
        with (
            arithmetic(self.options.precision),
            progress.bar(label, len(range(sums.done, batches, ranks)) * size) as ticker,
            adding_to(sums.chunk, parameters),
        ):
            pairs = size if squares else self._pairs_per_forward(block)
            chunk = processes.agreed(max(CHUNK, min(pairs // size, -(-batches // ranks))))
            while sums.done < batches:
                try:
                    for rows in self._add(block, sums, chunk=chunk, pairs=pairs, saved=saved):
                        ticker.advance(rows)
                except torch.cuda.OutOfMemoryError:
                    pairs = self._shrink(pairs)
        total = processes.summed(sums.total).div_(batches).cpu()
        means = [
            {name: value.numpy() for name, value in zip(names, views(row, parameters), strict=True)}
            for row in total
        ]
        return means, float(processes.summed(sums.losses).cpu().double().sum()) / batches

    def parameters(self, block: DataBlock) -> dict[str, nn.Parameter]:
        """Return the parameters to differentiate: without images, none of the vision tower."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if block.has_images or Layer.parse(name).tower is not Tower.VISION
        }

    def _anchors(self, block: DataBlock) -> Tensor | None:
        """Return the features that the texts of a block are to become, (rows, width)."""
        if block.anchors is None:
            return None
        ids = to_tokens(block.anchors, "cpu")
        with torch.no_grad():
            return text_features(self.text, ids, self.device)

    def _add(
        self, block: DataBlock, sums: Sums, *, chunk: int, pairs: int, saved: SavedSums | None
    ) -> Iterator[int]:
        """Add the other mini-batches, `chunk` on each rank at a time; yield rows as they are done.

        Each forward runs `pairs` rows.
        """
        size, batches = self.options.batch_size, len(sums.losses)
        starts = range(sums.done, batches, chunk * processes.world_size())
        chunks = []
        for start in starts:
            first = min((start + processes.rank() * chunk) * size, block.rows)
            last = min(first + chunk * size, block.rows)
            chunks.append([(first + a, first + b) for a, b in spans(last - first, pairs)])
        images = prefetch(
            lambda span: staged(block.content_of(*span), self.device), chain(*chunks), threads=2
        )
        for start, groups in zip(starts, chunks, strict=True):
            sums.chunk.zero_()
            for first, last in groups:
                values = self._group(*self._inputs(block, next(images), first, last))
                sums.losses[first // size : -(-last // size)] = values
                yield last - first
            if groups:
                self._require_finite(block, sums, groups[0][0], groups[-1][1])
            sums.total += sums.chunk
            sums.done = min(start + starts.step, batches)
            if saved is not None and processes.agreed(saved.due):
                sums.write(saved)

    def _inputs(
        self, block: DataBlock, content: Tensor, first: int, last: int
    ) -> tuple[Tensor, ...]:
        """Return what `losses` takes of some rows: images or stand-ins, texts, and any anchors."""
        images = self.normalize(content) if block.has_images else content.to(self.device)
        texts = to_tokens(block.tokens[first:last], "cpu")
        return (
            (images, texts) if self.anchors is None else (images, texts, self.anchors[first:last])
        )

    def losses(self, images: Tensor, ids: Tensor, *anchors: Tensor) -> Tensor:
        """Return the loss of each of some mini-batches of images, or stand-ins, and texts.

        There may be one further argument: the features that the texts are to become.
        """
        half = self.options.precision is Precision.BF16
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=half):
            v = images if images.ndim == 2 else self.vision.features(images, images)
            t = text_features(self.text, ids, self.device)
        return per_batch(self.loss, (v, t, *anchors), self.options.batch_size)

    def _group(self, images: Tensor, ids: Tensor, *anchors: Tensor) -> Tensor:
        """Return the losses of some mini-batches; their gradients go to what `.grad` is."""
        values = self.losses(images, ids, *anchors)
        values.sum().backward()  # type: ignore[no-untyped-call]
        return values.detach()

    def _pairs_per_forward(self, block: DataBlock) -> int:
        """Return how many pairs to run at once: whole mini-batches within the budget."""
        size = self.options.batch_size
        needed = self._pair_bytes(block)
        budget = self.options.memory_budget or spare(self.device)
        if needed * size > budget and not self.vision.checkpointing:
            self._recompute("memory is short")
            needed = self._pair_bytes(block)
        best = BEST_PAIRS[torch.device(self.device).type] // size
        pairs = size * max(1, min(int(budget / needed / size), best))
        progress.detail(f"{needed / 2**20:.1f} MiB of activations a pair, {pairs} pairs a forward")
        return pairs

    def _pair_bytes(self, block: DataBlock) -> float:
        """Return what a backward needs of one pair, from a forward of one mini-batch.

        It is infinite if the mini-batch does not fit.
        """
        rows = min(self.options.batch_size, block.rows)
        saved_bytes: dict[int, int] = {}
        weights = {parameter.data_ptr() for parameter in self.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved_bytes[storage.data_ptr()] = storage.nbytes()
            # A tensor that its own graph holds would never be freed.
            return tensor.detach()

        inputs = self._inputs(block, torch.from_numpy(block.content_of(0, rows)), 0, rows)
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                self.losses(*inputs)
        except torch.cuda.OutOfMemoryError:
            return math.inf
        return max(1, sum(saved_bytes.values())) / rows

    def _shrink(self, pairs: int) -> int:
        """Return half of `pairs` after running out of memory, or recompute activations."""
        torch.cuda.empty_cache()
        size = self.options.batch_size
        if pairs > size:
            pairs = max(size, pairs // 2 // size * size)
            progress.note(f"out of memory: continuing with {pairs} pairs a forward")
        elif not self.vision.checkpointing:
            self._recompute("out of memory")
        else:
            raise InputError(
                f"one mini-batch of {size} pairs does not fit in {self.device}'s memory",
                hint="use a smaller --batch-size (it changes the contrastive loss) or --device cpu",
            )
        return pairs

    def _recompute(self, why: str) -> None:
        self.vision.checkpointing = self.text.checkpointing = True
        progress.note(f"{why}: activations are recomputed block by block")

    def _require_finite(self, block: DataBlock, sums: Sums, start: int, stop: int) -> None:
        """Raise InputError unless the chunk of some rows is finite; name the mini-batch."""
        size = self.options.batch_size
        losses = sums.losses[start // size : -(-stop // size)]
        if torch.isfinite(torch.stack([*sums.chunk.aminmax(), losses.sum()])).all():
            return
        for first, last in [(start + a, start + b) for a, b in spans(stop - start, size)]:
            sums.chunk.zero_()
            content = torch.from_numpy(block.content_of(first, last))
            values = self._group(*self._inputs(block, content, first, last))
            if not (values.isfinite().all() and sums.chunk.isfinite().all()):
                start, stop = first, last
                break
        raise InputError(
            f"the gradient is not finite in mini-batch {start // size} "
            f"(rows {start} to {stop - 1}): {', '.join(block.keys[start:stop])}",
            hint="look at these images and captions, and whether the weights hold NaN; "
            "with --precision bf16, try fp32",
        )


def views(values: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a flat tensor in the shapes of the parameters."""
    parts = torch.split(values, [parameter.numel() for parameter in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


@contextlib.contextmanager
def adding_to(chunk: Tensor, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let every backward add its gradients to the rows of `chunk`, and their squares.

    Each gradient is added while it is in the processor's cache, and then dropped.
    """
    before = [parameter.grad for parameter in parameters]
    gradients, *squares = (views(row, parameters) for row in chunk)
    hooks: list[Any] = []
    try:
        for index, parameter in enumerate(parameters):
            parameter.grad = gradients[index]
            for kind in squares:
                add_square: Any = partial(_add_square, kind[index])
                hooks.append(parameter.register_hook(add_square))  # type: ignore[no-untyped-call]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(parameters, before, strict=True):
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
