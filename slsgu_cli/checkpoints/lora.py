"""Edits as LoRAs: write and read the names and shapes that clients load.

A LoRA adds `up @ down` to the weight of a linear module, times the strength that a user sets.
Clients have separate modules for query, key and value, so a fused layer of open_clip becomes
three. There are two layouts:

- kohya's, one file, which A1111, ComfyUI and diffusers load: `lora_te_` before the module's
  name, or `lora_te1_` and `lora_te2_` for SDXL's two text encoders, both in one file.
- PEFT's, a folder with `adapter_config.json`, for text encoders of transformers.

The LoRA of rank r is the best approximation of an edit: the r largest singular directions of
each module's change.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.layouts import assembled
from slsgu_cli.checkpoints.naming_schemes import (
    NamingScheme,
    TensorPlace,
    TowerPlace,
    tensor_places,
)
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.checkpoints.safetensors_file import open_safetensors
from slsgu_cli.errors import InputError
from slsgu_cli.records.method import EditHeader, LoraEdit, LoraHeader, LoraLayout, Tower
from slsgu_cli.store.store import Store

# The prefix of a text encoder's names in transformers.
TEXT = TowerPlace(Tower.TEXT, NamingScheme.TRANSFORMERS, "text_model.")
# The linear modules of a block that kohya, diffusers and PEFT all support.
MODULE = re.compile(
    r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight"
)
IN_ATTENTION = re.compile(r"(.*\.self_attn)\.[qkv]_proj\.weight")
DOWN, UP = ".lora_down.weight", ".lora_up.weight"
PEFT_DOWN, PEFT_UP = ".lora_A.weight", ".lora_B.weight"
PEFT_PREFIX = "base_model.model."
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def modules_of(header: EditHeader) -> tuple[TensorPlace, ...]:
    """Return the tensors of a text encoder that hold an edit's layer.

    Raises InputError for a layer that no client supports as a LoRA.
    """
    layer = Layer.parse(header.layer)
    places = tensor_places(header.layer, TEXT)
    if layer.tower is Tower.TEXT and places and all(MODULE.fullmatch(p.key) for p in places):
        return places
    what = (
        "is in the vision tower, which diffusion models do not have"
        if layer.tower is Tower.VISION
        else "is not a linear module of a text encoder's block"
    )
    raise InputError(
        f"no client supports a LoRA of {header.layer}, which the edit {header.name} changes: "
        f"it {what}",
        hint=f"`slsgu search {header.name} --layer L` for a layer like "
        "transformer.resblocks.N.mlp.c_proj.weight, or `slsgu apply` writes a whole checkpoint",
    )


# The change of one module, `up @ down`: arrays of shapes (out, rank) and (rank, in).
Factors = tuple[Floats, Floats]


class Decomposed:
    """The singular directions of an edit's change, module by module; cut to any rank."""

    def __init__(self, header: EditHeader, delta: Floats) -> None:
        """Decompose a change of open_clip's shape. Raises InputError as `modules_of` does."""
        self.header, self._places = header, modules_of(header)
        self._parts = {
            place.key: np.linalg.svd(
                np.asarray(place.from_layer(delta), dtype=np.float64), full_matrices=False
            )
            for place in self._places
        }

    @property
    def full_rank(self) -> int:
        """The smallest rank that represents the whole change."""
        return max(int(np.count_nonzero(s > s[:1] * 1e-7)) for _, s, _ in self._parts.values())

    def factors(self, rank: int) -> dict[str, Factors]:
        """Return the factors of each module at a rank, fp32, by its tensor's name."""
        factors = {}
        for key, (u, s, v) in self._parts.items():
            root = np.sqrt(s[:rank])
            up, down = u[:, :rank] * root, root[:, None] * v[:rank]
            factors[key] = up.astype(np.float32), down.astype(np.float32)
        return factors

    def delta(self, rank: int) -> Floats:
        """Return the change at a rank, in open_clip's shape."""
        return _delta(self._places, self.factors(rank))


def _delta(places: Sequence[TensorPlace], factors: Mapping[str, Factors]) -> Floats:
    tensors = {key: up @ down for key, (up, down) in factors.items()}
    alone = [replace(place, within=None) for place in places]
    whole: Floats = assembled(alone, tensors.__getitem__)
    return np.ascontiguousarray(whole, dtype=np.float32)


def lora_tensors(
    edits: Sequence[tuple[Decomposed, int, str]], *, layout: LoraLayout
) -> tuple[dict[str, Floats], LoraHeader]:
    """Return the tensors and the header of a LoRA of edits, each with its rank.

    Each edit also has kohya's prefix of its text encoder; PEFT's layout allows only one. Edits of
    one module are concatenated. The scale of clients, alpha over rank, is 1.
    """
    together: dict[str, dict[str, list[Factors]]] = {}
    listed, first = [], edits[0][2]
    for decomposed, rank, prefix in edits:
        starts = {}
        for key, factors in decomposed.factors(rank).items():
            before = together.setdefault(prefix, {}).setdefault(key, [])
            starts[key] = sum(len(down) for _, down in before)
            before.append(factors)
        elsewhere = None if prefix == first else prefix
        listed.append(LoraEdit(decomposed.header, rank, starts, elsewhere))
    tensors_of = _peft_tensors if layout is LoraLayout.PEFT else _kohya_tensors
    tensors: dict[str, Floats] = {}
    for prefix, modules in sorted(together.items()):
        whole = {}
        for key, parts in sorted(modules.items()):
            ups, downs = zip(*parts, strict=True)
            whole[key] = np.concatenate(ups, axis=1), np.concatenate(downs)
        tensors |= tensors_of(whole, prefix)
    return tensors, LoraHeader(layout, first, tuple(listed), version=listed[0].edit.version)


def _kohya_tensors(factors: Mapping[str, Factors], prefix: str) -> dict[str, Floats]:
    """Return the factors under kohya's names, padded with zeros to one rank.

    diffusers supports only one rank and one alpha for a text encoder, and detects attention by the
    output projection, which is zero if no edit changes it.
    """
    rank = max(len(down) for _, down in factors.values())
    whole = dict(factors)
    for key, (_, down) in factors.items():
        if attention := IN_ATTENTION.fullmatch(key):
            output, width = f"{attention[1]}.out_proj.weight", down.shape[1]
            zeros = np.zeros((width, 0), np.float32), np.zeros((0, width), np.float32)
            whole.setdefault(output, zeros)
    tensors: dict[str, Floats] = {}
    for key, (up, down) in sorted(whole.items()):
        module, lacking = _kohya_module(key, prefix), rank - len(down)
        tensors[module + DOWN] = np.pad(down, ((0, lacking), (0, 0)))
        tensors[module + UP] = np.pad(up, ((0, 0), (0, lacking)))
        tensors[f"{module}.alpha"] = np.array(rank, dtype=np.float32)
    return tensors


def _peft_tensors(factors: Mapping[str, Factors], prefix: str) -> dict[str, Floats]:
    """Return the factors under both names of a text encoder's module in transformers."""
    tensors: dict[str, Floats] = {}
    for key, (up, down) in factors.items():
        for module in _peft_modules(key):
            tensors[f"{PEFT_PREFIX}{module}{PEFT_DOWN}"] = down
            tensors[f"{PEFT_PREFIX}{module}{PEFT_UP}"] = up
    return tensors


def _kohya_module(key: str, prefix: str) -> str:
    return prefix + key.removesuffix(".weight").replace(".", "_")


def _peft_modules(key: str) -> tuple[str, str]:
    module = key.removesuffix(".weight")
    return module, module.removeprefix(TEXT.prefix)


def peft_config(header: LoraHeader, base: str) -> str:
    """Return the `adapter_config.json` of a LoRA of the model called `base`."""
    ranks: dict[str, int] = {}
    for one in header.edits:
        for key in one.starts:
            module = _peft_modules(key)[1]
            ranks[module] = ranks.get(module, 0) + one.rank
    modules = "|".join(map(re.escape, sorted(ranks)))
    most = max(ranks.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        # The full name, because a vision tower has modules with the same ending.
        "target_modules": rf"(text_model\.)?({modules})",
        "lora_dropout": 0.0,
        "bias": "none",
        "task_type": None,
        "inference_mode": True,
    }
    return json.dumps(config, indent=2) + "\n"


def is_lora(path: Path) -> bool:
    """Return whether a safetensors file holds the factors of any LoRA."""
    try:
        names = open_safetensors(path).entries
    except InputError:
        return False
    return any(name.endswith((DOWN, PEFT_DOWN)) for name in names)


def read_lora(store: Store, path: str) -> list[tuple[EditHeader, Callable[[str], Floats]]]:
    """Return the edits in a LoRA that slsgu wrote: each header, and a function for its change.

    Raises ForeignError for other LoRAs, which do not name their weights, and MissingError,
    InputError or StaleError.
    """
    header = store.read_header(path, LoraHeader)
    return [
        (replace(one.edit, rank=one.rank), partial(_read_change, store, path, header, one))
        for one in header.edits
    ]


def _read_change(store: Store, path: str, header: LoraHeader, edit: LoraEdit, name: str) -> Floats:
    """Return the change of an edit in a LoRA. Raises InputError for the original values."""
    if name != "delta":
        raise InputError(
            f"{path} is a LoRA and does not hold the original values of {edit.edit.layer}",
            hint=f"use the edit {edit.edit.name} itself",
        )
    factors = {}
    for key, start in edit.starts.items():
        if header.layout is LoraLayout.PEFT:
            module = PEFT_PREFIX + _peft_modules(key)[0]
            down, up = module + PEFT_DOWN, module + PEFT_UP
        else:
            module = _kohya_module(key, edit.prefix or header.prefix)
            down, up = module + DOWN, module + UP
        tensors = store.read_tensors(path, [down, up])
        span = slice(start, start + edit.rank)
        factors[key] = tensors[up][:, span], tensors[down][span]
    return _delta(modules_of(edit.edit), factors)
