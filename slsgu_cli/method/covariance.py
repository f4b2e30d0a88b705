"""Second covariances of what layers are applied to, and the inner product they make."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from itertools import permutations
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slsgu_cli import progress
from slsgu_cli.checkpoints.layers import LETTERS, Layer
from slsgu_cli.clip import processes
from slsgu_cli.clip.blocks import linear
from slsgu_cli.clip.inputs import by_length, pixel_normalizer, spans, staged, to_tokens
from slsgu_cli.clip.towers import SplitTower, text_tower, vision_tower
from slsgu_cli.prefetch import prefetch
from slsgu_cli.records.method import Tower
from slsgu_cli.records.sets import InputSpec
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Arrays

# At most so many retain rows are run: at 50 tokens each, 16 inputs for each of 3,072 dimensions.
MOST_ROWS = 1000
ROWS_PER_FORWARD = {"cpu": 128, "cuda": 1024, "mps": 256}

# At most so many of the positions in an image that a window of a convolution goes to are counted:
# at 1000 images, 55 windows for each of 4,608 inputs. Drawn by this seed, alike for all images.
MOST_POSITIONS = 256
POSITION_SEED = 0
# Entries of windows, which overlap, that are laid out at once: 64 MiB in fp32.
WINDOW_ENTRIES = 2**24

# Columns in a block of a symmetric product on a CPU: 0.5 to 0.65 of the plain one's time.
GRAM_BLOCK = 256
LINEAR = (F.linear, linear)
MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
NORMS = (F.layer_norm, F.rms_norm)
CHANNEL_NORMS = (F.batch_norm, F.group_norm)
ATTENTION = F.multi_head_attention_forward

# Behind a layer's name, in what is kept of covariances: their sum; the axis of inputs, and a count.
TOTAL, ABOUT = " total", " about"

# The arguments of the functions that apply a weight, in their order.
ARGUMENTS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(LINEAR, ("input", "weight", "bias")),
    **dict.fromkeys((*MATMULS, *PRODUCTS), ("input", "other")),
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.batch_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    ATTENTION: tuple(signature(ATTENTION).parameters),
}


@dataclass(slots=True)
class Covariance:
    """The sum over one layer's inputs so far; `axis` is the weight's axis of inputs."""

    axis: int
    total: Tensor
    count: float = 0.0

    def mean(self) -> Tensor:
        """Return C (inputs, inputs), or its diagonal (inputs,) for a norm or scale; fp64.

        Of a convolution in groups, C has a block for each: (groups, inputs, inputs).
        """
        return self.total / self.count


@dataclass(frozen=True, slots=True)
class Use:
    """How a call applies a layer: which share of its entries, and along which axis inputs lie.

    Of a convolution in `groups`, each has its rows of the weight and inputs of its own.
    """

    layer: str
    share: float
    axis: int
    groups: int


class AppliedLayers(TorchFunctionMode):
    """While active, hears of every call that applies one of some layers of a model."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self._weights = {name: partial(model.get_parameter, name) for name in layers}
        self._pools: list[Any] = list(filter(_is_pool_of_resnet, model.modules()))
        self.sharded = processes.has_shards(model)
        self._places = self._layer_at()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make a call, and tell of its inputs and outputs where it applies one of the layers."""
        kwargs = kwargs or {}
        named = dict(zip(ARGUMENTS.get(func, ()), args, strict=False)) | kwargs
        if func is ATTENTION:
            return self._attend(named)
        outputs = func(*args, **kwargs)
        if func in LINEAR:
            self._tell(named.get("weight"), lambda: [named["input"]], outputs, axis=1)
        elif func in MATMULS:
            self._tell(named.get("other"), lambda: [named["input"]], outputs, axis=0)
        elif func is F.conv2d:
            groups = named.get("groups", 1)
            self._tell(named.get("weight"), lambda: _windows(named), outputs, axis=1, groups=groups)
        elif func in NORMS or func in CHANNEL_NORMS:
            self._tell(named.get("weight"), lambda: [_normed(func, named)], outputs, axis=0)
        elif func in PRODUCTS:
            for weight, x in permutations((named.get("input"), named.get("other"))):
                if _scales(weight, x):
                    self._tell(weight, partial(_scaled, x, weight), outputs, axis=0)
        return outputs

    def applied(self, use: Use, inputs: Iterable[Tensor], outputs: Tensor) -> None:
        """Hear of a call that applies a layer to `inputs`.

        They come in parts (..., inputs); of a convolution in groups, (rows, groups, inputs).
        """
        raise NotImplementedError

    def _tell(
        self,
        weight: Any,
        inputs: Callable[[], Iterable[Tensor]],
        outputs: Any,
        *,
        axis: int,
        groups: int = 1,
    ) -> None:
        if not isinstance(weight, Tensor):
            return
        # Where weights are gathered changes from block to block.
        places = self._layer_at() if self.sharded else self._places
        if _place(weight) in places:
            name, size = places[_place(weight)]
            use = Use(name, weight.numel() / size, axis, groups)
            self.applied(use, inputs(), outputs)

    def _attend(self, named: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Make a call of attention in two: what it mixes, and the projection of that.

        Of the pool of a ResNet, the first position alone leaves the tower.
        """
        query, key, value = (named[part] for part in ("query", "key", "value"))
        if any(_shares(named.get("q_proj_weight"), pool.q_proj.weight) for pool in self._pools):
            query = query[:1]
        fused, projection = named["in_proj_weight"], named["out_proj_weight"]
        plain = {"out_proj_weight": torch.eye(projection.shape[1]).to(projection)}
        mixed, weights = ATTENTION(**named | {"query": query, "out_proj_bias": None} | plain)
        outputs = F.linear(mixed, projection, named["out_proj_bias"])
        if fused is not None and query is key is value:
            uses = [(fused, query)]
        else:
            apart = [named.get(f"{letter}_proj_weight") for letter in LETTERS]
            thirds = apart if fused is None else fused.chunk(3)
            uses = list(zip(thirds, (query, key, value), strict=True))
        for weight, x in (*uses, (projection, mixed)):
            self._tell(weight, partial(_rows_first, x), outputs, axis=1)
        return outputs, weights

    def _layer_at(self) -> dict[int, tuple[str, int]]:
        """Return by its place each layer that this process has whole now, and its entries."""
        weights = {name: weight() for name, weight in self._weights.items()}
        return {
            _place(weight): (name, weight.numel())
            for name, weight in weights.items()
            if not processes.is_sharded(weight)
        }


class InputCovariances(AppliedLayers):
    """While active, adds up the second moments of the inputs of some layers of a model.

    Of several processes each has what it ran, of all layers, until `gather` leaves each layer
    to one of them. A sharded model is run by all of them at once: what they ran of a layer is
    added up in each call, and one process has it.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__(model, layers)
        self.covariances: dict[str, Covariance] = {}
        # Whether what this process runs counts.
        self.counts = True
        self._valid: Tensor | None = None
        self._vectors = {name for name in layers if model.get_parameter(name).ndim == 1}
        self._holders = _holders({name: model.get_parameter(name).shape for name in layers})
        self._device = exact_device(str(next(model.parameters()).device))

    @contextmanager
    def only(self, valid: Tensor) -> Iterator[None]:
        """Count only the positions of some texts where `valid` (rows, length) holds."""
        self._valid = valid
        try:
            yield
        finally:
            self._valid = None

    def kept(self) -> Arrays:
        """Return to the first process what a later run goes on with."""
        self.gather()
        totals = {name + TOTAL: each.total for name, each in self.covariances.items()}
        about = {
            name + ABOUT: torch.tensor([each.axis, each.count], dtype=torch.float64)
            for name, each in self.covariances.items()
        }
        return processes.on_first(totals | about)

    def go_on(self, kept: Arrays) -> None:
        """Go on with what an earlier run kept, in any number of processes."""
        for name in (name.removesuffix(TOTAL) for name in kept if name.endswith(TOTAL)):
            if self._holders[name] == processes.rank():
                axis, count = kept[name + ABOUT].tolist()
                total = torch.from_numpy(kept[name + TOTAL]).to(self._device)
                self.covariances[name] = Covariance(int(axis), total, count)

    def gather(self) -> None:
        """Let one process have each covariance, over the inputs that all ran, by sums in fp64."""
        if processes.count() == 1 or self.sharded:
            return
        about: dict[str, tuple[int, tuple[int, ...]]] = {}
        for part in processes.gathered(
            {name: (m.axis, tuple(m.total.shape)) for name, m in self.covariances.items()}
        ):
            about |= part
        for name, (axis, shape) in sorted(about.items()):
            covariance = self.covariances.pop(name, None) or self._none(axis, shape)
            self._add_up(name, covariance)

    def applied(self, use: Use, inputs: Iterable[Tensor], outputs: Tensor) -> None:
        """Add the inputs of a call, weighted by the share of the layer that it applies."""
        name = use.layer
        covariance = None if self.sharded else self.covariances.get(name)
        for part in inputs:
            x = self._counted(part, use.groups)
            total = x.square().sum(dim=0) if name in self._vectors else gram(x)
            if covariance is None:
                covariance = self._none(use.axis, total.shape)
            if self.counts:
                covariance.total.add_(total.to(self._device), alpha=use.share)
                covariance.count += use.share * x.shape[-2]
        if covariance is not None and self.sharded:
            self._add_up(name, covariance)
        elif covariance is not None:
            self.covariances[name] = covariance

    def _counted(self, x: Tensor, groups: int) -> Tensor:
        """Return the inputs that count, (rows, inputs), or (groups, rows, inputs).

        Those of 16 bits come as fp32: as 16 bits, their sums are rounded, or not finite.
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

    def _add_up(self, name: str, covariance: Covariance) -> None:
        """Add a layer's covariances of all processes to what the one that holds it has."""
        holder = self._holders[name]
        count = torch.tensor([covariance.count], dtype=torch.float64)
        processes.add_up_at(covariance.total, holder)
        processes.add_up_at(count, holder)
        if holder == processes.rank():
            so_far = self.covariances.setdefault(
                name, Covariance(covariance.axis, covariance.total)
            )
            if so_far.total is not covariance.total:
                so_far.total.add_(covariance.total)
            so_far.count += float(count)


def _holders(shapes: dict[str, Sequence[int]]) -> dict[str, int]:
    """Return which process has the covariance of each layer: those of a shape are dealt evenly."""
    seen: Counter[Sequence[int]] = Counter()
    holders = {}
    for name, shape in sorted(shapes.items()):
        holders[name] = seen[shape] % processes.count()
        seen[shape] += 1
    return holders


class Keeper(Protocol):
    """Keeps covariances under way where a later run finds them."""

    def restore(self, covariances: InputCovariances, parts: int) -> int:
        """Put what was kept into covariances of nothing; return of how many of the parts it is."""

    @property
    def due(self) -> bool:
        """Whether it is time to keep them."""

    def keep(self, covariances: InputCovariances, parts: int, *, done: int) -> None:
        """Keep the covariances over the first parts that are done."""


@torch.no_grad()
def input_covariances(
    model: nn.Module,
    layers: Sequence[str],
    block: DataBlock,
    *,
    spec: InputSpec,
    device: str,
    keeper: Keeper | None = None,
) -> dict[str, Covariance]:
    """Return the covariances of `layers` over pairs of a block, by one forward of their towers.

    Of a large block, MOST_ROWS rows are taken at equal distances. A layer that no linear
    map of its tower is seen to apply is left out. With a `keeper`, it goes on with what an
    earlier run kept, and keeps its own. Of several processes each has some of the covariances.
    """
    run = _Parts(model, layers, block, spec, device)
    inputs = run.inputs
    done = keeper.restore(inputs, run.count) if keeper is not None else 0
    rounds = run.rounds(done)
    with progress.bar("retain inputs", len(rounds)) as ticker:
        for each, _ in zip(rounds, run.run(rounds), strict=True):
            if keeper is not None and each is not rounds[-1] and processes.agreed(keeper.due):
                keeper.keep(inputs, run.count, done=each.stop)
            ticker.advance()
    inputs.gather()
    return inputs.covariances


@dataclass(slots=True)
class _Parts:
    """The parts in which covariances are taken of a block's pairs: of its texts, then its images.

    `texts` are token ids, of alike lengths in a part, and `images` rows of the block.
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
        """Return the parts after the first that are `done`, in turns: one for each process.

        All of a round are of one tower; in the last of a tower some processes may have none.
        """
        texts = len(self.texts)
        bounds = ((done, texts), (max(done, texts), self.count))
        return [
            range(first + a, first + b)
            for first, last in bounds
            for a, b in spans(max(0, last - first), processes.count())
        ]

    def run(self, rounds: Sequence[range]) -> Iterator[None]:
        """Run this process's part of each round, if it has one, and yield after it.

        A sharded model all have to run: the first part once more, which does not count.
        """
        rank, first_image = processes.rank(), len(self.texts)
        turns = [(each[rank], True) if rank < len(each) else (each[0], False) for each in rounds]
        heard = [part for part, counts in turns if counts or self.inputs.sharded]
        chosen = [self.images[part - first_image] for part in heard if part >= first_image]
        normalize = pixel_normalizer(self.spec, self.device)
        pixels = prefetch(
            lambda rows: staged(self.block.take(rows), self.device), chosen, threads=2
        )
        for part, counts in turns:
            self.inputs.counts = counts
            if counts or self.inputs.sharded:
                if part < first_image:
                    self._run_texts(self.texts[part])
                else:
                    self._run(self._vision, normalize(next(pixels)))
            yield

    def _run_texts(self, tokens: Tensor) -> None:
        short = self._text.trim(tokens)
        with self.inputs.only(self._text.counted(short).to(self.device)):
            self._run(self._text, short.to(self.device))

    def _run(self, tower: SplitTower, values: Tensor) -> None:
        with self.inputs:
            tower.run(partial(tower.features, values, values))


def gram(x: Tensor) -> Tensor:
    """Return x^T x (..., columns, columns); what mirrors another block of it is copied."""
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
    """Return the rows of a block of `rows` whose inputs count."""
    return spread(rows, MOST_ROWS)


def spread(rows: int, most: int) -> npt.NDArray[np.int64]:
    """Return at most so many of `rows` rows, at equal distances."""
    return np.linspace(0, rows - 1, min(rows, most)).round().astype(np.int64)


def _place(tensor: Tensor) -> int:
    """Return what a parameter shares with its parts and with nothing else."""
    return tensor.untyped_storage().data_ptr()


def _is_pool_of_resnet(module: nn.Module) -> bool:
    """Return whether it is open_clip's attention pool, in shards or not."""
    return any(base.__name__ == "AttentionPool2d" for base in type(module).__mro__)


def _shares(weight: Any, other: Tensor) -> bool:
    """Return whether a weight is another one, or a part of it."""
    return isinstance(weight, Tensor) and _place(weight) == _place(other)


def _rows_first(x: Tensor) -> list[Tensor]:
    """Return inputs of attention, which has positions before rows, as others come."""
    return [x.transpose(0, -2)]


def _scales(weight: Any, x: Any) -> bool:
    """Return whether a product is that of inputs and a vector's entry for each channel."""
    if not (isinstance(weight, Tensor) and isinstance(x, Tensor)) or weight.ndim > x.ndim:
        return False
    if isinstance(weight, nn.Parameter) and weight.ndim > 1:
        return False
    channels = weight.numel()
    return channels == max(weight.shape, default=0) == x.shape[_axis_of(weight)]


def _axis_of(weight: Tensor) -> int:
    """Return along which axis a vector lies, from the last."""
    return int(np.argmax(weight.shape)) - weight.ndim


def _scaled(x: Any, weight: Any) -> list[Tensor]:
    """Return what a vector is multiplied by, channels last."""
    return [x.movedim(_axis_of(weight), -1)]


def _windows(named: dict[str, Any]) -> Iterator[Tensor]:
    """Yield what a convolution applies its flattened weight to, in parts of bounded size.

    Windows that do not overlap come in one part, (rows, positions, inputs). Others are
    (windows, inputs), in groups (windows, groups, inputs): in each image those at
    `chosen_positions`, unfolded at once for as many images as WINDOW_ENTRIES let.
    """
    x, size = named["input"], tuple(named["weight"].shape[2:])
    stride, dilation = (_pair(named.get(name, 1)) for name in ("stride", "dilation"))
    reach = tuple(d * (k - 1) for d, k in zip(dilation, size, strict=True))
    padding, groups = _padding(named.get("padding", 0), reach), named.get("groups", 1)
    if groups == 1 and stride == size and dilation == (1, 1) and not any(padding):
        yield F.unfold(x, size, stride=size).transpose(1, 2)
        return
    x = F.pad(x, padding)
    height, width = (
        (n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride, strict=True)
    )
    positions = chosen_positions(height * width)
    row, column = (
        torch.from_numpy(at[:, None] * s + np.arange(k) * d).to(x.device)
        for at, s, k, d in zip(np.divmod(positions, width), stride, size, dilation, strict=True)
    )
    inputs = x.shape[1] * prod(size)
    shape = (-1, inputs) if groups == 1 else (-1, groups, inputs // groups)
    for start, stop in spans(len(x), max(1, WINDOW_ENTRIES // (len(positions) * inputs))):
        windows = x[start:stop, :, row[:, :, None], column[:, None, :]]
        yield windows.transpose(1, 2).reshape(shape)


def chosen_positions(positions: int) -> npt.NDArray[np.int64]:
    """Return which positions in an image are counted: MOST_POSITIONS at most, by seed."""
    if positions <= MOST_POSITIONS:
        return np.arange(positions)
    drawn = np.random.default_rng(POSITION_SEED).choice(positions, MOST_POSITIONS, replace=False)
    return np.sort(drawn)


def _pair(value: Any) -> tuple[int, int]:
    """Return a setting of a convolution for both axes."""
    return (value, value) if isinstance(value, int) else tuple(value) * (3 - len(value))


def _padding(padding: Any, reach: Sequence[int]) -> list[int]:
    """Return the padding as F.pad takes it: last axis first, before and behind it."""
    if padding == "same":
        around = [(r // 2, r - r // 2) for r in reach]
    else:
        around = [(p, p) for p in _pair(0 if padding == "valid" else padding)]
    return [side for sides in reversed(around) for side in sides]


def _normed(func: Any, named: dict[str, Any]) -> Tensor:
    """Return what a norm multiplies by its weight, channels last."""
    plain = {name: value for name, value in named.items() if name not in ("weight", "bias")}
    normed: Tensor = func(**plain)
    return normed.movedim(1, -1) if func in CHANNEL_NORMS else normed


@dataclass(slots=True)
class RetainMetric:
    """The inner product <., .>_P of one layer's changes; `axis` is that of its inputs.

    `covariance` is C (inputs, inputs), its diagonal (inputs,), or blocks (groups, inputs, inputs)
    of it, each of as many rows of the weight. All arithmetic is fp64.
    """

    covariance: Tensor
    axis: int
    damping: float
    _factor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        damped = self.damped()
        self._factor = damped if damped.ndim == 1 else torch.linalg.cholesky(damped)

    def damped(self) -> Tensor:
        """Return P, or its diagonal: the covariance, and what the damping adds; fp64."""
        damped = self.covariance.double().clone()
        _diagonal(damped).add_(self.floor)
        return damped

    @property
    def floor(self) -> float:
        """Return what the damping adds to the diagonal: damping * tr(C) / d."""
        return self.damping * float(_diagonal(self.covariance).double().mean())

    def whiten(self, gradient: Tensor) -> Tensor:
        """Return D = G P^-1 in the shape of `gradient`; fp64."""
        flat = gradient.double()
        if self.covariance.ndim == 1:
            return flat / self._factor
        if self.axis == 0:
            return torch.cholesky_solve(flat, self._factor)
        rows = _rows_by_group(flat, self.covariance)
        return torch.cholesky_solve(rows.mT, self._factor).mT.reshape(gradient.shape)

    def half_whiten(self, gradient: Tensor) -> Tensor:
        """Return G L^-T, inputs first: its plain products are those of D in <., .>_P; fp64."""
        flat = gradient.double()
        if self.covariance.ndim == 1:
            return flat / self._factor.sqrt()
        inputs_first = flat if self.axis == 0 else _rows_by_group(flat, self.covariance).mT
        half: Tensor = torch.linalg.solve_triangular(self._factor, inputs_first, upper=False)
        return half

    def weight_norm(self, weight_norm: float, output: float) -> float:
        """Return ||W||_P from the layer's own norm and its mean squared output tr(W C W^T)."""
        return float((output + self.floor * weight_norm**2) ** 0.5)


def _diagonal(covariance: Tensor) -> Tensor:
    """Return the diagonal of a covariance, or of each of its blocks, as a view."""
    return covariance if covariance.ndim == 1 else covariance.diagonal(dim1=-2, dim2=-1)


def _rows_by_group(weight: Tensor, covariance: Tensor) -> Tensor:
    """Return a weight's rows, (rows, inputs), or (groups, rows, inputs) where C is of blocks."""
    return weight.reshape(*covariance.shape[:-2], -1, covariance.shape[-1])


def exact_device(device: str) -> str:
    """Return where fp64 is to be had for tensors on `device`: Apple's GPUs have none."""
    return "cpu" if device.partition(":")[0] == "mps" else device


def whitened_importance(forget: Tensor, direction: Tensor, weight_norm: float) -> float:
    """Return ||D||_P / ||W||_P, for the forget gradient, its D, and ||W||_P.

    It is the forget loss gained by a step along D over the disturbance of the retained
    outputs that it makes, both to first order, and over the size of these outputs.
    """
    gain = float((forget.double() * direction.double()).sum())
    return gain**0.5 / weight_norm if weight_norm else 0.0


def mean_square_output(weight: Tensor, covariance: Tensor, axis: int) -> float:
    """Return tr(W C W^T), the layer's mean squared output over its inputs, bias aside."""
    rows = weight.double()
    if covariance.ndim == 1:
        return float((rows.square() * covariance.double()).sum())
    rows = _rows_by_group(rows, covariance) if axis == 1 else rows.T
    return float(((rows @ covariance.double()) * rows).sum())
