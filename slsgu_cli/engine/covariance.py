"""The statistics of layers over a data block, split over ranks and resumable.

Those of inputs need a forward of the towers, and those of derivatives a backward too.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli import processes, progress
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.clip.batches import by_length, pixel_normalizer, spans, staged, to_tokens
from slsgu_cli.clip.onednn import linear
from slsgu_cli.clip.towers import SplitTower, text_tower, vision_tower
from slsgu_cli.engine.applied_layers import AppliedLayers, Use
from slsgu_cli.engine.resumable import SavedSums
from slsgu_cli.method.layer_statistics import projection, widens
from slsgu_cli.prefetch import prefetch
from slsgu_cli.records.directions import Statistic
from slsgu_cli.records.method import Tower
from slsgu_cli.records.sets import InputSpec
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Arrays

# Most retain rows that are used: at 50 tokens each, 16 inputs for each of 3,072 dimensions.
MOST_ROWS = 1000
ROWS_PER_FORWARD = {"cpu": 128, "cuda": 1024, "mps": 256}

# Columns in a block of a symmetric product on a CPU: 0.5 to 0.65 of the plain one's time.
GRAM_BLOCK = 256

# Suffixes of layer names in saved sums: the sum itself; its axis of inputs and its count.
TOTAL, ABOUT = " total", " about"


@dataclass(slots=True)
class Covariance:
    """The sum over one layer so far; `axis` is the weight's axis of inputs."""

    axis: int
    total: Tensor
    count: float = 0.0

    def mean(self) -> Tensor:
        """Return the matrix (n, n), or its diagonal (n,) for a norm or scale; fp64.

        A grouped convolution has one matrix of inputs for each group: (groups, inputs, inputs).
        """
        return self.total / self.count


class LayerSums(AppliedLayers):
    """Sums over the calls of some layers while active.

    Each rank adds up its own rows; `collect` sums over all ranks and leaves the sum on rank 0.
    """

    # The memory of a row, as a multiple of a forward's.
    memory: ClassVar = 1

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__(model, layers)
        self.covariances: dict[str, Covariance] = {}
        # Which positions (rows, length) of the texts of a call count; None: all.
        self.valid: Tensor | None = None
        self._vectors = {name for name in layers if model.get_parameter(name).ndim == 1}
        self._device = exact_device(str(next(model.parameters()).device))

    def add(self, read: Callable[[], Tensor], *, rows: int, part: int) -> None:
        """Add the calls of `read`, which returns the features of some rows.

        `part` numbers the parts of a pass.
        """
        raise NotImplementedError

    def resume(self, saved: SavedSums, parts: int) -> int:
        """Resume from saved sums, with any number of ranks; return how many `parts` they have."""
        done, arrays = saved.read(parts)
        if done:
            progress.note(f"the covariances resume after {done} of their {parts} parts")
        if processes.is_first():
            for name in (name.removesuffix(TOTAL) for name in arrays if name.endswith(TOTAL)):
                axis, count = arrays[name + ABOUT].tolist()
                total = torch.from_numpy(arrays[name + TOTAL]).to(self._device)
                self.covariances[name] = Covariance(int(axis), total, count)
        return done

    def arrays(self) -> Arrays:
        """Return the sums over all ranks on rank 0, from which a later run resumes."""
        self.collect()
        arrays: Arrays = {}
        for name, each in self.covariances.items():
            arrays[name + TOTAL] = each.total.cpu().numpy()
            arrays[name + ABOUT] = np.array([each.axis, each.count], dtype=np.float64)
        return arrays

    def collect(self) -> None:
        """Move the sums of all ranks to rank 0."""
        if processes.world_size() == 1:
            return
        about: dict[str, tuple[int, tuple[int, ...]]] = {}
        for part in processes.gathered(
            {name: (c.axis, tuple(c.total.shape)) for name, c in self.covariances.items()}
        ):
            about |= part
        for name, (axis, shape) in sorted(about.items()):
            covariance = self._covariance(name, axis, shape)
            covariance.total = processes.summed(covariance.total)
            covariance.count = sum(processes.gathered(covariance.count))
        if not processes.is_first():
            self.covariances.clear()

    def _add(self, use: Use, x: Tensor, count: float) -> None:
        """Add x^T x of the rows of a call, or its diagonal for a norm or scale."""
        total = x.square().sum(dim=0) if use.layer in self._vectors else gram(x)
        covariance = self._covariance(use.layer, use.axis, total.shape)
        covariance.total.add_(total.to(self._device), alpha=use.share)
        covariance.count += use.share * count

    def _covariance(self, name: str, axis: int, shape: Sequence[int]) -> Covariance:
        """Return the covariance of a layer, which is zero at first."""
        if name not in self.covariances:
            total = torch.zeros(shape, dtype=torch.float64, device=self._device)
            self.covariances[name] = Covariance(axis, total)
        return self.covariances[name]


class InputCovariances(LayerSums):
    """Sum x x^T over the inputs x of some layers while active."""

    @torch.no_grad()
    def add(self, read: Callable[[], Tensor], *, rows: int, part: int) -> None:
        """Add the inputs of a forward."""
        with self:
            read()

    def applied(self, use: Use, inputs: Iterable[Tensor], outputs: Tensor) -> None:
        """Add the inputs of a call, weighted by the share of the layer that it applies."""
        for part in inputs:
            x = self._counted(part, use.groups)
            self._add(use, x, x.shape[-2])

    def _counted(self, x: Tensor, groups: int) -> Tensor:
        """Return the counted inputs, (rows, inputs) or (groups, rows, inputs).

        16-bit inputs are converted to fp32, because 16-bit sums would be rounded or overflow.
        """
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        if groups > 1:
            return x.transpose(0, 1)
        if self.valid is not None and x.shape[:-1] == self.valid.shape:
            x = x[self.valid]
        return x.reshape(-1, x.shape[-1])


class SeenInputs(InputCovariances):
    """The inputs of some layers themselves, (rows, inputs), of all positions."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__(model, layers)
        self.inputs: dict[str, list[Tensor]] = {}

    def applied(self, use: Use, inputs: Iterable[Tensor], outputs: Tensor) -> None:
        """Keep the inputs of a call."""
        self.inputs.setdefault(use.layer, []).extend(self._counted(x, use.groups) for x in inputs)


class OutputDerivatives(LayerSums):
    """Sum g g^T over the derivatives g of projected features at the outputs of some layers.

    The mean is over rows, of sums over positions. Layers that a call applies in part have none, nor
    have those that widen.
    """

    memory: ClassVar = 4

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__(model, layers)
        self._calls: list[tuple[Use, int, Tensor]] = []

    @torch.enable_grad()
    def add(self, read: Callable[[], Tensor], *, rows: int, part: int) -> None:
        """Add the derivatives of a forward and a backward."""
        with self:
            features = read().float()
        projected = (features * projection(features, seed=part)).sum()
        outputs = [each for _, _, each in self._calls]
        derivatives = torch.autograd.grad(projected, outputs, allow_unused=True)
        for (use, channels, _), g in zip(self._calls, derivatives, strict=True):
            if g is not None:
                last = g.movedim(channels, -1).float()
                self._add(use, last.reshape(-1, last.shape[-1]), rows)
        self._calls.clear()

    def applied(self, use: Use, inputs: Iterable[Tensor], outputs: Tensor) -> None:
        """Remember the outputs of a call."""
        if use.share == 1 and use.channels is not None and outputs.requires_grad:
            width = outputs.shape[use.channels]
            if use.layer in self._vectors or not widens(width, use.entries, use.groups):
                self._calls.append((use, use.channels, outputs))


SUMS: dict[Statistic, type[LayerSums]] = {
    Statistic.INPUTS: InputCovariances,
    Statistic.DERIVATIVES: OutputDerivatives,
}


def layer_sums(
    kind: Statistic,
    model: nn.Module,
    layers: Sequence[str],
    block: DataBlock,
    *,
    spec: InputSpec,
    device: str,
    saved: SavedSums | None = None,
    most: int | None = None,
) -> dict[str, Covariance]:
    """Return a statistic of `layers` over pairs of a block, by one pass of their towers.

    At most `most` rows of the block are used (default: MOST_ROWS), at equal distances: first the
    texts in parts of similar length, then the images. The result lacks layers that cannot be
    captured. With `saved` sums, resume from those of an earlier run, and write them from time to
    time. With several ranks, only rank 0 has the result.
    """
    sums = SUMS[kind](model, layers)
    text, vision = text_tower(model), vision_tower(model)
    rows = spread(block.rows, MOST_ROWS if most is None else most)
    size = ROWS_PER_FORWARD[torch.device(device).type] // sums.memory
    parts: list[tuple[SplitTower, npt.NDArray[np.int64]]] = []
    if has_tower(Tower.TEXT, layers):
        tokens = to_tokens(block.tokens[rows], "cpu")
        parts += [(text, rows[part.numpy()]) for part in by_length(text, tokens, size)]
    if has_tower(Tower.VISION, layers):
        parts += [(vision, rows[start:stop]) for start, stop in spans(len(rows), size)]
    normalize = pixel_normalizer(spec, device)

    def read(part: int) -> tuple[int, Tensor]:
        tower, chosen = parts[part]
        if tower is vision:
            return part, staged(block.take(chosen), device)
        return part, text.trim(to_tokens(block.tokens[chosen], "cpu"))

    def add(part: int, values: Tensor) -> None:
        tower, chosen = parts[part]
        sums.valid = None if tower is vision else text.counted(values).to(device)
        x = normalize(values) if tower is vision else values.to(device)
        sums.add(lambda: tower.features(x, x), rows=len(chosen), part=part)

    done = sums.resume(saved, len(parts)) if saved is not None else 0
    ranks = processes.world_size()
    rounds = range(done, len(parts), ranks)
    mine = prefetch(read, processes.split(range(done, len(parts))), threads=2)
    with progress.bar(f"retain {kind}", len(rounds)) as ticker:
        # In the last round, some ranks may have no part.
        for start, each in zip_longest(rounds, mine):
            if each is not None:
                add(*each)
            if saved is not None and start != rounds[-1] and processes.agreed(saved.due):
                saved.write(sums.arrays(), done=start + ranks, batches=len(parts))
            ticker.advance()
    sums.collect()
    return sums.covariances


def has_tower(tower: Tower, layers: Iterable[str]) -> bool:
    """Return whether some of the layers are of a tower."""
    return any(Layer.parse(layer).tower is tower for layer in layers)


def gram(x: Tensor) -> Tensor:
    """Return x^T x (..., columns, columns), computing mirrored blocks once."""
    size = x.shape[-1]
    if x.device.type != "cpu" or x.dtype is not torch.float32 or x.ndim > 2:
        return x.mT @ x
    columns, product = x.T.contiguous(), x.new_empty(size, size)
    for start in range(0, size, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, size)
        block = linear(columns[:stop], columns[start:stop])
        product[:stop, start:stop] = block
        product[start:stop, :stop] = block.T
    return product


def chosen_rows(rows: int) -> npt.NDArray[np.int64]:
    """Return the rows that statistics are computed on, of a block of `rows`."""
    return spread(rows, MOST_ROWS)


def spread(rows: int, most: int) -> npt.NDArray[np.int64]:
    """Return at most `most` of `rows` rows, at equal distances."""
    return np.linspace(0, rows - 1, min(rows, most)).round().astype(np.int64)


def exact_device(device: str) -> str:
    """Return the device for fp64 tensors: the CPU for Apple's GPUs, which have no fp64."""
    return "cpu" if device.partition(":")[0] == "mps" else device
