"""The losses, and the mean gradient of one over a data block, for every parameter.

Mini-batches are what the loss is defined on; how many of them run in one forward is only
a matter of speed and memory. They are stacked until the memory budget or the device's
best size is reached, their losses are summed, and one backward gives their gradients'
sum: the same numbers as one mini-batch after another.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.clip.inputs import pixel_normalizer, spans, spare, staged, text_features, to_tokens
from slsgu_cli.clip.towers import SplitTower, text_tower, vision_tower
from slsgu_cli.errors import InputError
from slsgu_cli.records.method import Precision
from slsgu_cli.records.options import PassOptions
from slsgu_cli.records.sets import InputSpec
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.files import prefetch
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


# Pairs per forward beyond which a device gains nothing more, measured.
BEST_PAIRS = {"cpu": 64, "cuda": 1024, "mps": 256}
TEXTS_PER_FORWARD = {"cpu": 32, "cuda": 512, "mps": 128}
Sums = dict[str, Tensor]


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

    def run(self, block: DataBlock, label: str) -> tuple[Arrays, float]:
        """Return the mean gradient of every parameter and the mean loss, over mini-batches.

        Raises InputError naming mini-batch and keys where a loss or gradient is not finite.
        """
        return self._run(block, label, None)

    def run_squared(self, block: DataBlock, label: str) -> tuple[Arrays, Arrays, float]:
        """Return the mean gradient, the mean of its squares over mini-batches, the mean loss.

        The gradient of a sum of losses does not tell their squares apart, so each
        mini-batch has a forward and a backward of its own.
        """
        squares: Sums = {}
        gradient, loss = self._run(block, label, squares)
        return gradient, {name: value.cpu().numpy() for name, value in squares.items()}, loss

    def _run(self, block: DataBlock, label: str, squares: Sums | None) -> tuple[Arrays, float]:
        """Run the pass; fill `squares`, if given, with the mean squared gradients."""
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters.values()]
        squared = [torch.zeros_like(value) for value in sums] if squares is not None else []
        tokens = block.tokens
        normalize = pixel_normalizer(self.spec, self.options.device)
        losses: list[Tensor] = []
        with (
            arithmetic(self.options.precision),
            progress.bar(label, block.rows) as ticker,
        ):
            pairs = self._pairs_per_forward(block)
            if squares is not None:
                pairs = self.options.batch_size
            start, unchecked = 0, None
            while start < block.rows:
                try:
                    for first, stop, images in self._stream(block, start, pairs):
                        ids = to_tokens(tokens[first:stop], "cpu")
                        values, gradients = self._group(
                            normalize(images), ids, list(parameters.values())
                        )
                        finite = _finite(values, gradients)
                        # Looked at when the next group is under way: a GPU never waits for it.
                        if unchecked:
                            self._check(block, *unchecked)
                        _accumulate(sums, gradients)
                        if squares is not None:
                            _accumulate(squared, [g if g is None else g * g for g in gradients])
                        unchecked = first, stop, finite
                        losses.append(values)
                        ticker.advance(stop - first)
                        start = stop
                except torch.cuda.OutOfMemoryError:
                    pairs = self._shrink(pairs)
            if unchecked:
                self._check(block, *unchecked)
        batches = sum(values.numel() for values in losses)
        if squares is not None:
            means_of_squares = (value.div_(batches) for value in squared)
            squares.update(zip(parameters, means_of_squares, strict=True))
        means = (value.div_(batches).cpu().numpy() for value in sums)
        total = float(torch.cat(losses).cpu().double().sum())
        return dict(zip(parameters, means, strict=True)), total / batches

    def losses(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of each of some mini-batches."""
        half = self.options.precision is Precision.BF16
        with torch.autocast(self._kind, dtype=torch.bfloat16, enabled=half):
            v = self.vision.features(images, images)
            t = text_features(self.text, ids, TEXTS_PER_FORWARD[self._kind], self.options.device)
        return self.loss(v, t, self.options.batch_size)

    def _group(
        self, images: Tensor, ids: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the losses of some mini-batches and the gradient of their sum."""
        values = self.losses(images, ids)
        gradients = torch.autograd.grad(values.sum(), parameters, allow_unused=True)
        return values.detach(), list(gradients)

    def _stream(
        self, block: DataBlock, start: int, pairs: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        ranges = [(start + a, start + b) for a, b in spans(block.rows - start, pairs)]
        device = self.options.device
        images = prefetch(lambda span: staged(block.images(*span), device), ranges, threads=2)
        for (first, stop), chunk in zip(ranges, images, strict=True):
            yield first, stop, chunk

    def _pairs_per_forward(self, block: DataBlock) -> int:
        """Return how many pairs to run at once: whole mini-batches within the budget."""
        size = self.options.batch_size
        needed = self._pair_bytes(block)
        budget = self.options.memory_budget or spare(self.options.device)
        if needed * size > budget:
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
        of_parameters = {p.data_ptr() for p in self.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in of_parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

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

    def _check(self, block: DataBlock, start: int, stop: int, finite: Tensor) -> None:
        if not finite:
            self._name_culprit(block, start, stop)

    def _name_culprit(self, block: DataBlock, start: int, stop: int) -> None:
        """Raise InputError naming the first mini-batch whose loss or gradient is not finite."""
        normalize = pixel_normalizer(self.spec, self.options.device)
        parameters = list(self.model.parameters())
        size = self.options.batch_size
        for a, b in ((start + x, start + y) for x, y in spans(stop - start, size)):
            ids = to_tokens(block.tokens[a:b], "cpu")
            values, gradients = self._group(normalize(block.images(a, b)), ids, parameters)
            if not _finite(values, gradients):
                keys = ", ".join(block.keys[a:b])
                raise InputError(
                    f"the gradient is not finite in mini-batch {a // size} "
                    f"(rows {a} to {b - 1}): {keys}",
                    hint="look at these images and captions, and whether the weights hold NaN; "
                    "with --precision bf16, try fp32",
                )
        raise InputError(
            f"the gradient of rows {start} to {stop - 1} is not finite, though each of their "
            "mini-batches alone is",
            hint="try --precision fp32",
        )

    @property
    def _kind(self) -> str:
        return self.options.device.partition(":")[0]


def _accumulate(sums: list[Tensor], gradients: list[Tensor | None]) -> None:
    pairs = [(total, g) for total, g in zip(sums, gradients, strict=True) if g is not None]
    torch._foreach_add_([total for total, _ in pairs], [g for _, g in pairs])


def _finite(values: Tensor, gradients: list[Tensor | None]) -> Tensor:
    norms = torch._foreach_norm([g for g in gradients if g is not None])
    return torch.isfinite(torch.stack([values.float().sum(), *norms])).all()


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
