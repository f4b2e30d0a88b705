"""Second moments of what layers are applied to, and the inner product they make."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slsgu_cli import progress
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.clip import processes
from slsgu_cli.clip.inputs import by_length, pixel_normalizer, spans, staged, to_tokens
from slsgu_cli.clip.towers import text_tower, vision_tower
from slsgu_cli.records.method import Tower
from slsgu_cli.records.sets import InputSpec
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.files import prefetch

# At most so many retain rows are run: at 50 tokens each, 16 inputs for each of 3,072 dimensions.
MOST_ROWS = 1000
ROWS_PER_FORWARD = {"cpu": 128, "cuda": 1024, "mps": 256}

# Columns in a block of a symmetric product on a CPU: 0.6 to 0.75 of the plain one's time.
GRAM_BLOCK = 256
MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
NORMS = (F.layer_norm, F.rms_norm)

# The arguments of the functions that apply a weight, in their order.
ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys(MATMULS, ("input", "other")),
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
}


@dataclass(slots=True)
class Moment:
    """The sum over one layer's inputs so far; `axis` is the weight's axis of inputs."""

    axis: int
    total: Tensor
    count: float = 0.0

    def mean(self) -> Tensor:
        """Return C (inputs, inputs), or its diagonal (inputs,) for a norm; fp64."""
        return self.total / self.count


class AppliedLayers(TorchFunctionMode):
    """While active, hears of every call that applies one of some layers of a model."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        weights = {name: model.get_parameter(name) for name in layers}
        self._layers = {_place(weight): (n, weight.numel()) for n, weight in weights.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make a call, and tell of its inputs and outputs where it applies one of the layers."""
        kwargs = kwargs or {}
        named = dict(zip(ARGUMENTS.get(func, ()), args, strict=False)) | kwargs
        outputs = func(*args, **kwargs)
        if func is F.linear:
            self._tell(named.get("weight"), lambda: named["input"], outputs, axis=1)
        elif func in MATMULS:
            self._tell(named.get("other"), lambda: named["input"], outputs, axis=0)
        elif func is F.conv2d and _is_of_patches(**named):
            weight = named["weight"]
            self._tell(weight, lambda: _patches(named["input"], weight), outputs, axis=1)
        elif func in NORMS:
            self._tell(named.get("weight"), lambda: _normed(func, named), outputs, axis=0)
        return outputs

    def applied(
        self, name: str, share: float, inputs: Tensor, outputs: Tensor, *, axis: int
    ) -> None:
        """Hear of a call that applies a share of the entries of a layer to `inputs`."""
        raise NotImplementedError

    def _tell(self, weight: Any, inputs: Callable[[], Tensor], outputs: Any, *, axis: int) -> None:
        if isinstance(weight, Tensor) and _place(weight) in self._layers:
            name, size = self._layers[_place(weight)]
            self.applied(name, weight.numel() / size, inputs(), outputs, axis=axis)


class InputMoments(AppliedLayers):
    """While active, adds up the second moments of the inputs of some layers of a model."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__(model, layers)
        self.moments: dict[str, Moment] = {}
        self._valid: Tensor | None = None
        self._norms = {name for name in layers if model.get_parameter(name).ndim == 1}

    @contextmanager
    def only(self, valid: Tensor) -> Iterator[None]:
        """Count only the positions of some texts where `valid` (rows, length) holds."""
        self._valid = valid
        try:
            yield
        finally:
            self._valid = None

    def applied(
        self, name: str, share: float, inputs: Tensor, outputs: Tensor, *, axis: int
    ) -> None:
        """Add the inputs of a call, weighted by the share of the layer that it applies."""
        x = inputs
        if self._valid is not None and x.shape[:-1] == self._valid.shape:
            x = x[self._valid]
        x = x.reshape(-1, x.shape[-1])
        total = x.square().sum(dim=0) if name in self._norms else gram(x)
        if name not in self.moments:
            zeros = torch.zeros(
                total.shape, dtype=torch.float64, device=exact_device(total.device.type)
            )
            self.moments[name] = Moment(axis, zeros)
        moment = self.moments[name]
        moment.total.add_(total.to(moment.total.device), alpha=share)
        moment.count += share * x.shape[0]


class Keeper(Protocol):
    """Keeps moments under way where a later run finds them."""

    def restore(self, parts: int) -> tuple[int, dict[str, Moment]]:
        """Return what was kept, and of how many of the parts it is."""

    @property
    def due(self) -> bool:
        """Whether it is time to keep them."""

    def keep(self, moments: dict[str, Moment], parts: int, *, done: int) -> None:
        """Keep the moments over the first parts that are done."""


@torch.no_grad()
def input_moments(
    model: nn.Module,
    layers: Sequence[str],
    block: DataBlock,
    *,
    spec: InputSpec,
    device: str,
    keeper: Keeper | None = None,
) -> dict[str, Moment]:
    """Return the moments of `layers` over pairs of a block, by one forward of their towers.

    Of a large block, MOST_ROWS rows are taken at equal distances. A layer that no linear
    map of its tower is seen to apply is left out. With a `keeper`, a process that is alone
    goes on with what an earlier run kept, and keeps its own.
    """
    rows = chosen_rows(block.rows)
    inputs = InputMoments(model, layers)
    size = ROWS_PER_FORWARD[device.partition(":")[0]]
    towers = {Layer.parse(layer).tower for layer in layers}
    texts: list[Any] = []
    if Tower.TEXT in towers:
        tokens = to_tokens(block.tokens[rows], "cpu")
        texts = processes.dealt(by_length(text_tower(model), tokens, size))
    images: list[Any] = []
    if Tower.VISION in towers:
        images = processes.dealt([rows[start:stop] for start, stop in spans(len(rows), size)])
    parts, done = len(texts) + len(images), 0
    if keeper is not None and processes.count() > 1:
        keeper = None
    if keeper is not None:
        done, inputs.moments = keeper.restore(parts)
    with progress.bar("retain inputs", parts - done) as ticker:
        run = chain(
            _run_texts(model, inputs, (tokens[part] for part in texts[done:]), device),
            _run_images(model, inputs, block, images[max(0, done - len(texts)) :], spec, device),
        )
        for number, _ in enumerate(run, done + 1):
            if keeper is not None and number < parts and keeper.due:
                keeper.keep(inputs.moments, parts, done=number)
            ticker.advance()
    return _over_all(inputs.moments, exact_device(device))


def _run_images(
    model: nn.Module,
    inputs: InputMoments,
    block: DataBlock,
    parts: Sequence[Any],
    spec: InputSpec,
    device: str,
) -> Iterator[None]:
    """Run the vision tower over parts of a block's rows; yield after each."""
    if not parts:
        return
    tower, normalize = vision_tower(model), pixel_normalizer(spec, device)
    for images in prefetch(lambda part: staged(block.take(part), device), parts, threads=2):
        pixels = normalize(images)
        with inputs:
            tower.features(pixels, pixels)
        yield


def _over_all(moments: dict[str, Moment], device: str) -> dict[str, Moment]:
    """Return the moments over the inputs that every process ran, by sums in fp64."""
    if processes.count() == 1:
        return moments
    whole: dict[str, Moment] = {}
    about = {name: (m.axis, m.total.shape, m.count) for name, m in moments.items()}
    for part in processes.gathered(about):
        for name, (axis, shape, rows) in part.items():
            if name not in whole:
                zeros = torch.zeros(shape, dtype=torch.float64, device=device)
                whole[name] = Moment(axis, moments[name].total if name in moments else zeros)
            whole[name].count += rows
    for name in sorted(whole):
        processes.add_up(whole[name].total)
    return whole


def gram(x: Tensor) -> Tensor:
    """Return x^T x (columns, columns); what mirrors another block of it is copied."""
    size = x.shape[1]
    if size <= GRAM_BLOCK or x.device.type != "cpu":
        return x.T @ x
    product = x.new_empty(size, size)
    for start in range(0, size, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, size)
        columns = x[:, :stop].T @ x[:, start:stop]
        product[:stop, start:stop] = columns
        product[start:stop, :stop] = columns.T
    return product


def chosen_rows(rows: int) -> npt.NDArray[np.int64]:
    """Return the rows of a block of `rows` whose inputs count."""
    return spread(rows, MOST_ROWS)


def spread(rows: int, most: int) -> npt.NDArray[np.int64]:
    """Return at most so many of `rows` rows, at equal distances."""
    return np.linspace(0, rows - 1, min(rows, most)).round().astype(np.int64)


def _run_texts(
    model: nn.Module, inputs: InputMoments, parts: Iterable[Tensor], device: str
) -> Iterator[None]:
    """Run the text tower over parts of some texts; yield after each."""
    tower = text_tower(model)
    for tokens in parts:
        short = tower.trim(tokens)
        valid = torch.arange(short.shape[1]) < tower.lengths(short).unsqueeze(1)
        short = short.to(device)
        with inputs, inputs.only(valid.to(device)):
            tower.features(short, short)
        yield


def _place(tensor: Tensor) -> int:
    """Return what a parameter shares with its parts and with nothing else."""
    return tensor.untyped_storage().data_ptr()


def _is_of_patches(*, weight: Tensor, groups: int = 1, **settings: Any) -> bool:
    """Return whether a convolution is a linear map of patches that do not overlap."""
    size = tuple(weight.shape[2:])
    strides = (size, list(size), size[0] if len(set(size)) == 1 else None)
    unpadded = settings.get("padding", 0) in (0, (0, 0), [0, 0], "valid")
    return groups == 1 and unpadded and settings.get("stride", 1) in strides


def _patches(x: Tensor, weight: Tensor) -> Tensor:
    """Return what a convolution applies its flattened weight to, (rows, positions, inputs)."""
    size = weight.shape[2:]
    return F.unfold(x, size, stride=size).transpose(1, 2)


def _normed(func: Any, named: dict[str, Any]) -> Tensor:
    """Return what a norm multiplies by its weight."""
    plain = {name: value for name, value in named.items() if name not in ("weight", "bias")}
    normed: Tensor = func(**plain)
    return normed


@dataclass(slots=True)
class RetainMetric:
    """The inner product <., .>_P of one layer's changes; `axis` is that of its inputs.

    `moment` is C (inputs, inputs), or its diagonal (inputs,). All arithmetic is fp64.
    """

    moment: Tensor
    axis: int
    ridge: float
    _factor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        damped = self.damped()
        self._factor = damped if damped.ndim == 1 else torch.linalg.cholesky(damped)

    def damped(self) -> Tensor:
        """Return P, or its diagonal: the moment, and what the ridge adds; fp64."""
        damped = self.moment.double().clone()
        (damped if damped.ndim == 1 else damped.diagonal()).add_(self.floor)
        return damped

    @property
    def floor(self) -> float:
        """Return what the ridge adds to the diagonal: ridge * tr(C) / d."""
        diagonal = self.moment if self.moment.ndim == 1 else self.moment.diagonal()
        return self.ridge * float(diagonal.double().mean())

    def whiten(self, gradient: Tensor) -> Tensor:
        """Return D = G P^-1 in the shape of `gradient`; fp64."""
        flat = gradient.double()
        if self.moment.ndim == 1:
            return flat / self._factor
        if self.axis == 0:
            return torch.cholesky_solve(flat, self._factor)
        rows = flat.reshape(flat.shape[0], -1)
        return torch.cholesky_solve(rows.T, self._factor).T.reshape(gradient.shape)

    def half_whiten(self, gradient: Tensor) -> Tensor:
        """Return G L^-T, inputs first: its plain products are those of D in <., .>_P; fp64."""
        flat = gradient.double()
        if self.moment.ndim == 1:
            return flat / self._factor.sqrt()
        inputs_first = flat if self.axis == 0 else flat.reshape(flat.shape[0], -1).T
        half: Tensor = torch.linalg.solve_triangular(self._factor, inputs_first, upper=False)
        return half

    def weight_norm(self, weight_norm: float, output: float) -> float:
        """Return ||W||_P from the layer's own norm and its mean squared output tr(W C W^T)."""
        return float((output + self.floor * weight_norm**2) ** 0.5)


def exact_device(device: str) -> str:
    """Return where fp64 is to be had for tensors on `device`: Apple's GPUs have none."""
    return "cpu" if device == "mps" else device


def whitened_importance(forget: Tensor, direction: Tensor, weight_norm: float) -> float:
    """Return ||D||_P / ||W||_P, for the forget gradient, its D, and ||W||_P.

    It is the forget loss gained by a step along D over the disturbance of the retained
    outputs that it makes, both to first order, and over the size of these outputs.
    """
    gain = float((forget.double() * direction.double()).sum())
    return gain**0.5 / weight_norm if weight_norm else 0.0


def mean_square_output(weight: Tensor, moment: Tensor, axis: int) -> float:
    """Return tr(W C W^T), the layer's mean squared output over its inputs, bias aside."""
    rows = weight.double()
    if moment.ndim == 1:
        return float((rows.square() * moment.double()).sum())
    rows = rows.reshape(rows.shape[0], -1) if axis == 1 else rows.T
    return float(((rows @ moment.double()) * rows).sum())
