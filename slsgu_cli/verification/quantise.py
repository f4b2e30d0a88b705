"""Coarser weights: int8 as inference engines store them, fp16 and bf16 as checkpoints do."""

from collections.abc import Callable

import torch
from torch import Tensor

from slsgu_cli.naming import is_candidate
from slsgu_cli.verification.bench import Bench, altered
from slsgu_cli.verification.records import Probe, Settings

LEVELS = 127


def to_int8(weight: Tensor, axis: int) -> Tensor:
    """Return weights rounded to 255 levels for each output channel, as floating point.

    Symmetric, to nearest: channel c becomes s_c * round(w / s_c) with s_c = max |w| / 127,
    so no weight moves by more than s_c / 2. `axis` is that of the output channels.
    """
    others = [dimension for dimension in range(weight.ndim) if dimension != axis]
    scale = weight.abs().amax(dim=others, keepdim=True) / LEVELS
    # A channel of zeros stays one.
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)


def output_axis(name: str) -> int:
    """Return the axis of output channels: 1 for projections that stand right of their input."""
    return 0 if name.endswith("weight") else 1


def quantise(bench: Bench, _settings: Settings) -> list[Probe]:
    """Measure with the weight matrices in int8, then with all parameters in fp16 and bf16.

    Utility is measured in int8 alone: it is the one that may cost some.
    """

    def int8(name: str, values: Tensor) -> Tensor:
        matrix = values.ndim > 1 and is_candidate(name)
        return to_int8(values, output_axis(name)) if matrix else values

    def through(kind: torch.dtype) -> Callable[[str, Tensor], Tensor]:
        return lambda _name, values: values.to(kind).to(values.dtype)

    changes = {"int8": int8, "fp16": through(torch.float16), "bf16": through(torch.bfloat16)}
    probes = []
    for name, change in changes.items():
        with altered(bench.model, change):
            probes.append(Probe(name, *bench.figures(utility=change is int8)))
    return probes
