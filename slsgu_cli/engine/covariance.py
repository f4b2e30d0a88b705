"""The covariances of layers' inputs over a data block, split over ranks and resumable."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

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
from slsgu_cli.records.method import SumsHeader, Tower
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
    """Add up the second moments of the inputs of some layers while active.

    Each rank adds up its own rows; `collect` sums over all ranks and leaves the sum on rank 0.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__(model, layers)
        self.covariances: dict[str, Covariance] = {}
        self._valid: Tensor | None = None
        self._vectors = {name for name in layers if model.get_parameter(name).ndim == 1}
        self._device = exact_device(str(next(model.parameters()).device))

    @contextmanager
    def only(self, valid: Tensor) -> Iterator[None]:
        """Count only the positions of some texts where `valid` (rows, length) holds."""
        self._valid = valid
        try:
            yield
        finally:
            self._valid = None

    def state(self) -> Arrays:
        """Return the sums over all ranks on rank 0, from which a later run resumes."""
        self.collect()
        totals = {name + TOTAL: each.total.cpu().numpy() for name, each in self.covariances.items()}
        about = {
            name + ABOUT: np.array([each.axis, each.count], dtype=np.float64)
            for name, each in self.covariances.items()
        }
        return totals | about

    def resume(self, _header: SumsHeader, state: Arrays) -> None:
        """Resume from the state of an earlier run, with any number of ranks."""
        if not processes.is_first():
            return
        for name in (name.removesuffix(TOTAL) for name in state if name.endswith(TOTAL)):
            axis, count = state[name + ABOUT].tolist()
            total = torch.from_numpy(state[name + TOTAL]).to(self._device)
            self.covariances[name] = Covariance(int(axis), total, count)

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
            own = self.covariances.pop(name, None) or self._none(axis, shape)
            total = processes.summed(own.total)
            count = sum(processes.gathered(own.count))
            if processes.is_first():
                self.covariances[name] = Covariance(axis, total, count)

    def applied(self, use: Use, inputs: Iterable[Tensor], outputs: Tensor) -> None:
        """Add the inputs of a call, weighted by the share of the layer that it applies."""
        name = use.layer
        for part in inputs:
            x = self._counted(part, use.groups)
            total = x.square().sum(dim=0) if name in self._vectors else gram(x)
            if name not in self.covariances:
                self.covariances[name] = self._none(use.axis, total.shape)
            covariance = self.covariances[name]
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
        if self._valid is not None and x.shape[:-1] == self._valid.shape:
            x = x[self._valid]
        return x.reshape(-1, x.shape[-1])

    def _none(self, axis: int, shape: Sequence[int]) -> Covariance:
        return Covariance(axis, torch.zeros(shape, dtype=torch.float64, device=self._device))


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

    At most MOST_ROWS rows of the block are used, at equal distances. The result lacks layers
    whose inputs cannot be captured. With `saved` sums, resume from those of an earlier run, and
    write them from time to time. With several ranks, only rank 0 has the covariances.
    """
    run = _Parts(model, layers, block, spec, device)
    inputs = run.inputs
    done = 0
    if saved is not None and (done := saved.resume(run.count, inputs.resume)):
        progress.note(f"the covariances resume after {done} of their {run.count} parts")
    rounds = run.rounds(done)
    with progress.bar("retain inputs", len(rounds)) as ticker:
        for each, _ in zip(rounds, run.run(rounds), strict=True):
            if saved is not None and each is not rounds[-1] and processes.agreed(saved.due):
                saved.write(inputs.state, run.count, added=each.stop, done=each.stop)
            ticker.advance()
    inputs.collect()
    return inputs.covariances


@dataclass(slots=True)
class _Parts:
    """The forwards of a covariance pass: first over parts of the texts, then of the images.

    `texts` are token ids, of similar lengths within a part; `images` are rows of the block.
    """

    model: nn.Module
    layers: Sequence[str]
    block: DataBlock
    spec: InputSpec
    device: str
    inputs: InputCovariances = field(init=False)
    texts: list[Tensor] = field(init=False, default_factory=list)
    images: list[npt.NDArray[np.int64]] = field(init=False, default_factory=list)
    _text: SplitTower = field(init=False)
    _vision: SplitTower = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = InputCovariances(self.model, self.layers)
        self._text, self._vision = text_tower(self.model), vision_tower(self.model)
        rows = chosen_rows(self.block.rows)
        size = ROWS_PER_FORWARD[self.device.partition(":")[0]]
        towers = {Layer.parse(layer).tower for layer in self.layers}
        if Tower.TEXT in towers:
            tokens = to_tokens(self.block.tokens[rows], "cpu")
            self.texts = [tokens[part] for part in by_length(self._text, tokens, size)]
        if Tower.VISION in towers:
            self.images = [rows[start:stop] for start, stop in spans(len(rows), size)]

    @property
    def count(self) -> int:
        """How many parts there are."""
        return len(self.texts) + len(self.images)

    def rounds(self, done: int) -> list[range]:
        """Return the parts after the first `done`, in rounds of one part a process.

        All parts of a round run the same tower. The last round of a tower may be incomplete.
        """
        texts = len(self.texts)
        bounds = ((done, texts), (max(done, texts), self.count))
        return [
            range(first + a, first + b)
            for first, last in bounds
            for a, b in spans(max(0, last - first), processes.world_size())
        ]

    def run(self, rounds: Sequence[range]) -> Iterator[None]:
        """Run this rank's part of each round, if it has one, and yield after the round."""
        rank, first_image = processes.rank(), len(self.texts)
        own = [each[rank] if rank < len(each) else None for each in rounds]
        chosen = [
            self.images[part - first_image]
            for part in own
            if part is not None and part >= first_image
        ]
        normalize = pixel_normalizer(self.spec, self.device)
        pixels = prefetch(
            lambda rows: staged(self.block.take(rows), self.device), chosen, threads=2
        )
        for part in own:
            if part is not None and part < first_image:
                self._run_texts(self.texts[part])
            elif part is not None:
                self._run(self._vision, normalize(next(pixels)))
            yield

    def _run_texts(self, tokens: Tensor) -> None:
        short = self._text.trim(tokens)
        with self.inputs.only(self._text.counted(short).to(self.device)):
            self._run(self._text, short.to(self.device))

    def _run(self, tower: SplitTower, values: Tensor) -> None:
        with self.inputs:
            tower.features(values, values)


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
