"""`quantise`: weights rounded to 8 and 4 bits, and to 16-bit floating point."""

from collections.abc import Callable
from functools import partial
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.method.layers import is_candidate
from slsgu_cli.records.verification import Settings, Variant
from slsgu_cli.verification.model import ModelUnderTest, altered
from slsgu_cli.verification.registry import CheckSpec

# Levels of int8 and of symmetric int4 on either side of zero, and steps of asymmetric int4.
LEVELS, FOUR_BITS, STEPS = 127, 7, 15
GROUPS = (64, 128)
NF4_BLOCK = 64
# The largest number of e4m3, which has no infinity.
FP8, FP8_LARGEST = torch.float8_e4m3fn, 448.0
# The formats in which utility is measured, one of each size.
COSTLY = ("int8", "int4, groups of 128", "nf4")


def to_int8(weight: Tensor, axis: int) -> Tensor:
    """Return weights rounded to 255 levels for each output channel, as floating point.

    Symmetric, to nearest: channel c becomes s_c * round(w / s_c) with s_c = max |w| / 127,
    so no weight moves by more than s_c / 2. `axis` is that of the output channels.
    """
    scale = _largest(weight, axis) / LEVELS
    # A channel of zeros stays zero.
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)


def to_fp8(weight: Tensor, axis: int) -> Tensor:
    """Return weights rounded to e4m3, each output channel scaled so that its largest is 448."""
    scale = _largest(weight, axis) / FP8_LARGEST
    # Not every device has the type. Rounding may put the largest slightly above 448.
    scaled = (weight / scale).clamp(-FP8_LARGEST, FP8_LARGEST).cpu().to(FP8)
    return torch.where(scale > 0, scaled.to(weight.device, weight.dtype) * scale, weight)


def _largest(weight: Tensor, axis: int) -> Tensor:
    others = [dimension for dimension in range(weight.ndim) if dimension != axis]
    return weight.abs().amax(dim=others, keepdim=True)


def to_int4(weight: Tensor, axis: int, *, group: int, symmetric: bool) -> Tensor:
    """Return weights rounded to 4 bits, `group` inputs of an output channel at a time.

    Symmetric: s * round(w / s), s = max |w| / 7. Asymmetric: s * (clamp(round(w / s) + z,
    0, 15) - z), with s = (max - min) / 15 and z = round(-min / s), zero always in the range.
    """

    def rounded(groups: Tensor) -> Tensor:
        if symmetric:
            scale = groups.abs().amax(dim=-1, keepdim=True) / FOUR_BITS
            levels = (groups / scale).round()
        else:
            least = groups.amin(dim=-1, keepdim=True).clamp(max=0)
            scale = (groups.amax(dim=-1, keepdim=True).clamp(min=0) - least) / STEPS
            zero = (-least / scale).round()
            levels = ((groups / scale).round() + zero).clamp(0, STEPS) - zero
        return torch.where(scale > 0, levels * scale, groups)

    return _by_group(weight, axis, group, rounded)


def nf4_levels() -> Tensor:
    """Return the 16 numbers of NF4: quantiles of a normal distribution, scaled to [-1, 1].

    Eight are positive, seven negative, evenly spaced in probability, and one is 0 (QLoRA,
    arXiv 2305.14314; the outermost probability is that of its code).
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    inverse = NormalDist().inv_cdf

    def half(count: int) -> list[float]:
        spread = (outermost - 0.5) / count
        return [inverse(outermost - place * spread) for place in range(count)]

    values = [-value for value in half(7)] + [0.0] + half(8)[::-1]
    return torch.tensor(values) / max(values)


def to_nf4(weight: Tensor, axis: int) -> Tensor:
    """Return weights rounded to the nearest NF4 number times the largest of their block.

    A block has 64 inputs of an output channel. Its scale is not rounded itself.
    """
    levels = nf4_levels().to(weight.device)
    between = (levels[1:] + levels[:-1]) / 2

    def rounded(blocks: Tensor) -> Tensor:
        scale = blocks.abs().amax(dim=-1, keepdim=True)
        nearest = levels[torch.bucketize((blocks / scale).contiguous(), between)]
        return torch.where(scale > 0, nearest * scale, blocks)

    return _by_group(weight, axis, NF4_BLOCK, rounded)


def _by_group(weight: Tensor, axis: int, size: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Round weights (channels, groups, size) at a time; a last group may have fewer inputs."""
    channels = weight.movedim(axis, 0)
    rows = channels.flatten(1)
    # Padding with zeros changes neither a group's largest weight nor a range that contains 0.
    padded = F.pad(rows, (0, -rows.shape[1] % size))
    out = rounded(padded.reshape(len(rows), -1, size)).flatten(1)[:, : rows.shape[1]]
    return out.reshape(channels.shape).movedim(0, axis)


def output_axis(name: str) -> int:
    """Return the axis of output channels: 1 for projections applied as x @ W."""
    return 0 if name.endswith("weight") else 1


def _of_matrices(change: Callable[[Tensor, int], Tensor]) -> Callable[[str, Tensor], Tensor]:
    def rounded(name: str, values: Tensor) -> Tensor:
        is_matrix = values.ndim > 1 and is_candidate(name)
        return change(values, output_axis(name)) if is_matrix else values

    return rounded


def _through(dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    return lambda _name, values: values.to(dtype).to(values.dtype)


def quantise(model: ModelUnderTest, _settings: Settings) -> list[Variant]:
    """Measure with weight matrices in 8 and 4 bits, then with all parameters in 16 bits."""
    changes = {"int8": _of_matrices(to_int8), "fp8": _of_matrices(to_fp8)}
    for size in GROUPS:
        for kind, symmetric in (("", True), (" asymmetric", False)):
            int4 = partial(to_int4, group=size, symmetric=symmetric)
            changes[f"int4{kind}, groups of {size}"] = _of_matrices(int4)
    changes["nf4"] = _of_matrices(to_nf4)
    changes |= {"fp16": _through(torch.float16), "bf16": _through(torch.bfloat16)}
    variants = []
    for name, change in changes.items():
        with altered(model.module, change):
            utility = model.utility_now() if name in COSTLY else None
            variants.append(Variant(name, model.accuracy_now(model.evaluation.forget), utility))
    return variants


SPEC = CheckSpec(
    run=quantise,
    fills="variants",
    settings=("rows", "seed"),
    revision=2,
    effort="rounding the weights ({})",
)
