"""Small checkpoints in every container and precision."""

import json
import struct
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from slsgu_cli.checkpoints.edit_plan import FilePlan
from slsgu_cli.checkpoints.layouts import open_weights
from slsgu_cli.checkpoints.model_copy import CopyPlan, write_copy
from slsgu_cli.checkpoints.number_formats import STORAGE, narrow
from slsgu_cli.records.options import ApplyOptions

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
CONTAINERS = ("safetensors", "pt")


def state(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return OrderedDict(
        {
            "positional_embedding": make(7, 4),
            "visual.proj": make(6, 5),
            "transformer.resblocks.0.mlp.c_fc.weight": make(8, 4),
            "logit_scale": make(),
            "empty": make(0, 3),
            "position_ids": torch.arange(9)[None],
        }
    )


def save(weights: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(weights, path, {"format": "pt"})
    else:
        torch.save(weights, path)
    return path


def load(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path)


def write_patched(source: Path, out: Path, patches: dict[str, np.ndarray]) -> None:
    """Write a copy of a file as `apply` does, with new values for some of its tensors."""
    entries = open_weights(source).entries
    values = {}
    for name, new in patches.items():
        dtype = entries[name].dtype
        is_stored = new.dtype == np.dtype(STORAGE[dtype])
        values[name] = new if is_stored else narrow(new, dtype)
    write_copy(CopyPlan(out, {"": source}, {"": FilePlan(values)}), ApplyOptions())


def content(path: Path) -> object:
    """Return the bytes of a file; for a PyTorch file, its tensors' names, formats and bits.

    PyTorch writes its own name into an archive, so files with equal content may differ.
    """
    try:
        loaded = torch.load(path, weights_only=True) if path.suffix != ".safetensors" else None
    except (RuntimeError, UnpicklingError):
        loaded = None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if state is None:
        return path.read_bytes()
    return [
        (name, str(t.dtype), tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, t in state.items()
    ]


def differing(one: Path, other: Path) -> list[int]:
    a, b = (np.frombuffer(path.read_bytes(), np.uint8) for path in (one, other))
    assert a.size == b.size
    return np.flatnonzero(a != b).tolist()


def header(entries: dict, body: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file made of a header and a body that may not match."""
    content = json.dumps(entries).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + body
