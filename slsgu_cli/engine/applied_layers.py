"""The inputs that each call of a layer gets, for all ways in which towers apply a layer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import permutations
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slsgu_cli.checkpoints.layers import LETTERS
from slsgu_cli.clip.batches import spans
from slsgu_cli.clip.onednn import linear

# Windows of a convolution that count in an image, at most, drawn by a seed that all images share.
# With 1000 images, that is 55 windows for each of 4,608 inputs.
MOST_POSITIONS = 256
POSITION_SEED = 0
# Entries of overlapping windows in memory together: 64 MiB in fp32.
WINDOW_ENTRIES = 2**24

LINEAR = (F.linear, linear)
MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
NORMS = (F.layer_norm, F.rms_norm)
CHANNEL_NORMS = (F.batch_norm, F.group_norm)
ATTENTION = F.multi_head_attention_forward

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


@dataclass(frozen=True, slots=True)
class Use:
    """How a call applies a layer: a share of its `entries`, with inputs along an axis.

    Each of the `groups` of a convolution has its own rows of the weight and its own inputs.
    `channels` is the axis of the layer's outputs in those of the call; None where the call is one
    of attention, whose outputs are those of its last projection.
    """

    layer: str
    entries: int
    share: float
    axis: int
    groups: int
    channels: int | None


class AppliedLayers(TorchFunctionMode):
    """While active, reports every call of some layers of a model to `applied`."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        # open_clip's attention pool, whose first position alone leaves a ResNet.
        pools: list[Any] = [m for m in model.modules() if type(m).__name__ == "AttentionPool2d"]
        self._pools = {_place(pool.q_proj.weight) for pool in pools}
        weights = ((name, model.get_parameter(name)) for name in layers)
        self._layers = {_place(weight): (name, weight.numel()) for name, weight in weights}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make a call, and report it if it applies one of the layers."""
        kwargs = kwargs or {}
        named: dict[str, Any] = dict(zip(ARGUMENTS.get(func, ()), args, strict=False)) | kwargs
        if func is ATTENTION:
            return self._attend(named)
        outputs, weight = func(*args, **kwargs), named.get("weight")
        if func in LINEAR:
            self._report(weight, lambda: named["input"], outputs, axis=1, channels=-1)
        elif func in MATMULS:
            self._report(named.get("other"), lambda: named["input"], outputs, axis=0, channels=-1)
        elif func is F.conv2d:
            groups = named.get("groups", 1)
            windows = partial(_windows, named)
            self._report(weight, windows, outputs, axis=1, channels=1, groups=groups)
        elif func in NORMS or func in CHANNEL_NORMS:
            channels = 1 if func in CHANNEL_NORMS else -1
            self._report(weight, partial(_normed, func, named), outputs, axis=0, channels=channels)
        elif func in PRODUCTS:
            for scale, x in permutations([named["input"], named["other"]]):
                if _scales(scale, x):
                    at = _axis_of(scale)
                    self._report(scale, partial(x.movedim, at, -1), outputs, axis=0, channels=at)
        return outputs

    def applied(self, use: Use, inputs: Iterable[Tensor], outputs: Tensor) -> None:
        """Handle a call of a layer.

        `inputs` come in parts (..., inputs), those of a convolution in groups as (rows, groups,
        inputs).
        """
        raise NotImplementedError

    def _report(
        self,
        weight: Any,
        inputs: Callable[[], Tensor | Iterator[Tensor]],
        outputs: Any,
        *,
        axis: int,
        channels: int | None,
        groups: int = 1,
    ) -> None:
        if isinstance(weight, Tensor) and _place(weight) in self._layers:
            name, size = self._layers[_place(weight)]
            use = Use(name, size, weight.numel() / size, axis, groups, channels)
            parts = inputs()
            self.applied(use, [parts] if isinstance(parts, Tensor) else parts, outputs)

    def _attend(self, named: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Make a call of attention in two steps: the mixed values, and their projection."""
        query, key, value = (named[part] for part in ("query", "key", "value"))
        weight = named.get("q_proj_weight")
        if weight is not None and _place(weight) in self._pools:
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
            # Inputs of attention have positions before rows.
            channels = -1 if weight is projection else None
            self._report(weight, partial(x.transpose, 0, -2), outputs, axis=1, channels=channels)
        return outputs, weights


def _place(tensor: Tensor) -> int:
    """Return an address that a parameter shares with its parts only."""
    return tensor.untyped_storage().data_ptr()


def _scales(weight: Any, x: Any) -> bool:
    """Return whether a product multiplies each channel of inputs by an entry of a vector."""
    if not (isinstance(weight, Tensor) and isinstance(x, Tensor)) or weight.ndim > x.ndim:
        return False
    if isinstance(weight, nn.Parameter) and weight.ndim > 1:
        return False
    channels = weight.numel()
    return channels == max(weight.shape, default=0) == x.shape[_axis_of(weight)]


def _axis_of(weight: Tensor) -> int:
    """Return along which axis a vector lies, from the last."""
    return int(np.argmax(weight.shape)) - weight.ndim


def _windows(named: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the windows of a convolution, in parts of bounded size.

    Windows that do not overlap come in one part, (rows, positions, inputs). Of others, each image
    has those at `chosen_positions`: (windows, inputs), or (windows, groups, inputs).
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
    """Return the positions in an image that count: at most MOST_POSITIONS, drawn by seed."""
    if positions <= MOST_POSITIONS:
        return np.arange(positions)
    drawn = np.random.default_rng(POSITION_SEED).choice(positions, MOST_POSITIONS, replace=False)
    return np.sort(drawn)


def _pair(value: Any) -> tuple[int, int]:
    """Return a setting of a convolution for each of two axes."""
    return (value, value) if isinstance(value, int) else tuple(value) * (3 - len(value))


def _padding(padding: Any, reach: Sequence[int]) -> list[int]:
    """Return the padding as F.pad takes it: the last axis first, before and after."""
    if padding == "same":
        around = [(r // 2, r - r // 2) for r in reach]
    else:
        around = [(p, p) for p in _pair(0 if padding == "valid" else padding)]
    return [side for sides in reversed(around) for side in sides]


def _normed(func: Any, named: dict[str, Any]) -> Tensor:
    """Return the normalised inputs of a norm, before its weight, channels last."""
    plain = {name: value for name, value in named.items() if name not in ("weight", "bias")}
    normed: Tensor = func(**plain)
    return normed.movedim(1, -1) if func in CHANNEL_NORMS else normed
