"""The covariances of layers' inputs over a data block, split over ranks and resumable."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

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
from slsgu_cli.prefetch import prefetch
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
    """The sum over one layer's inputs so far; `axis` is the weight's axis of inputs."""

    axis: int
    total: Tensor
    count: float = 0.0

    def mean(self) -> Tensor:
        """Return C (inputs, inputs), or its diagonal (inputs,) for a norm or scale; fp64.

        A grouped convolution has one C for each group: (groups, inputs, inputs).
        """
        return self.total / self.count


class InputCovariances(AppliedLayers):
    """Sum x x^T over the inputs x of some layers while active.

    Only positions of texts where `valid` (rows, length) holds are counted. Each rank adds up its
    own rows; `collect` sums over all ranks and leaves the sum on rank 0.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__(model, layers)
        self.covariances: dict[str, Covariance] = {}
        self.valid: Tensor | None = None
        self._vectors = {name for name in layers if model.get_parameter(name).ndim == 1}
        self._device = exact_device(str(next(model.parameters()).device))

    def resume(self, arrays: Arrays) -> None:
        """Resume from saved sums, with any number of ranks."""
        if not processes.is_first():
            return
        for name in (name.removesuffix(TOTAL) for name in arrays if name.endswith(TOTAL)):
            axis, count = arrays[name + ABOUT].tolist()
            total = torch.from_numpy(arrays[name + TOTAL]).to(self._device)
            self.covariances[name] = Covariance(int(axis), total, count)

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

    def applied(self, use: Use, inputs: Iterable[Tensor], outputs: Tensor) -> None:
        """Add the inputs of a call, weighted by the share of the layer that it applies."""
        for part in inputs:
            x = self._counted(part, use.groups)
            total = x.square().sum(dim=0) if use.layer in self._vectors else gram(x)
            covariance = self._covariance(use.layer, use.axis, total.shape)
            covariance.total.add_(total.to(self._device), alpha=use.share)
            covariance.count += use.share * x.shape[-2]

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

    def _covariance(self, name: str, axis: int, shape: Sequence[int]) -> Covariance:
        """Return the covariance of a layer, which is zero at first."""
        if name not in self.covariances:
            total = torch.zeros(shape, dtype=torch.float64, device=self._device)
            self.covariances[name] = Covariance(axis, total)
        return self.covariances[name]


@torch.no_grad()
def input_covariances(
    model: nn.Module,
    layers: Sequence[str],
    block: DataBlock,
    *,
    spec: InputSpec,
    device: str,
    saved: SavedSums | None = None,
) -> dict[str, Covariance]:
    """Return the covariances of `layers` over pairs of a block, by one forward of their towers.

    At most MOST_ROWS rows of the block are used, at equal distances: first the texts in parts of
    similar length, then the images. The result lacks layers whose inputs cannot be captured. With
    `saved` sums, resume from those of an earlier run, and write them from time to time. With
    several ranks, only rank 0 has the covariances.
    """
    text, vision = text_tower(model), vision_tower(model)
    inputs = InputCovariances(model, layers)
    rows, size = chosen_rows(block.rows), ROWS_PER_FORWARD[torch.device(device).type]
    towers = {Layer.parse(layer).tower for layer in layers}
    parts: list[tuple[SplitTower, npt.NDArray[np.int64]]] = []
    if Tower.TEXT in towers:
        tokens = to_tokens(block.tokens[rows], "cpu")
        parts += [(text, rows[part.numpy()]) for part in by_length(text, tokens, size)]
    if Tower.VISION in towers:
        parts += [(vision, rows[start:stop]) for start, stop in spans(len(rows), size)]
    done = 0
    if saved is not None:
        done, arrays = saved.read(len(parts))
        inputs.resume(arrays)
    if done:
        progress.note(f"the covariances resume after {done} of their {len(parts)} parts")

    def read(part: tuple[SplitTower, npt.NDArray[np.int64]]) -> tuple[SplitTower, Tensor]:
        tower, chosen = part
        if tower is vision:
            return tower, staged(block.take(chosen), device)
        return tower, text.trim(to_tokens(block.tokens[chosen], "cpu"))

    normalize, ranks = pixel_normalizer(spec, device), processes.world_size()
    rounds = range(done, len(parts), ranks)
    mine = prefetch(read, processes.split(parts[done:]), threads=2)
    with progress.bar("retain inputs", len(rounds)) as ticker:
        # In the last round, some ranks may have no part.
        for start, part in zip_longest(rounds, mine):
            if part is not None:
                tower, values = part
                inputs.valid = None if tower is vision else text.counted(values).to(device)
                values = normalize(values) if tower is vision else values.to(device)
                with inputs:
                    tower.features(values, values)
            if saved is not None and start != rounds[-1] and processes.agreed(saved.due):
                saved.write(inputs.arrays(), done=start + ranks, batches=len(parts))
            ticker.advance()
    inputs.collect()
    return inputs.covariances


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
    """Return the rows that covariances are computed on, of a block of `rows`."""
    return spread(rows, MOST_ROWS)


def spread(rows: int, most: int) -> npt.NDArray[np.int64]:
    """Return at most `most` of `rows` rows, at equal distances."""
    return np.linspace(0, rows - 1, min(rows, most)).round().astype(np.int64)


def exact_device(device: str) -> str:
    """Return the device for fp64 tensors: the CPU for Apple's GPUs, which have no fp64."""
    return "cpu" if device.partition(":")[0] == "mps" else device
