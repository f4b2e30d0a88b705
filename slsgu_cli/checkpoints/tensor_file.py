"""Random access to the tensors of a checkpoint file."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slsgu_cli.checkpoints.number_formats import CHUNK, FLOATS, STORAGE, Floats, Raw, narrow, widen
from slsgu_cli.errors import InputError
from slsgu_cli.text import near_names

# Prefixes that torch.compile and training in several processes put before every name.
COMPILED = "_orig_mod."
TRAINING_PREFIXES = ("module.", COMPILED)
TEXT_PREFIX = "text."
CONVERT_HINT = "load the model with open_clip and save its state_dict() as safetensors"


@dataclass(frozen=True)
class TensorEntry:
    """The name, the number format and the shape of one tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class TensorFile(ABC):
    """Random access to the tensors of one checkpoint file.

    `is_script` is True for TorchScript, which has a model's code next to its weights.
    """

    container: str
    is_script = False

    def __init__(self, path: Path, entries: Sequence[TensorEntry]) -> None:
        self.path = path
        self._entries = {entry.name: entry for entry in entries}

    def names(self) -> list[str]:
        """Return the file's own tensor names, in the file's order."""
        return list(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Return the entry of the tensor the file calls `name`. Raises InputError."""
        if name not in self._entries:
            near = near_names(name, [*map(canonical_name, self._entries)])
            raise InputError(f"{self.path} holds no {name}{near}")
        return self._entries[name]

    def resolve_name(self, name: str) -> str:
        """Return the file's own name of the parameter open_clip calls `name`.

        Training checkpoints have prefixes before every name; models with a text tower of
        their own (`text.`) also load from files of models without. Raises InputError.
        """
        plain = {canonical_name(stored): stored for stored in self._entries}
        if name in plain:
            return plain[name]
        older = name.removeprefix(TEXT_PREFIX)
        if older in plain and "positional_embedding" in plain:
            return plain[older]
        hint = None
        if any(key.startswith(("text_model.", "vision_model.")) for key in plain):
            hint = "this file has the names of transformers: use --target"
        raise InputError(f"{self.path} holds no layer {name}{near_names(name, plain)}", hint=hint)

    @abstractmethod
    def stored(self, name: str) -> Raw:
        """Return a tensor's elements as they are stored (bf16 as uint16), in its shape."""

    @abstractmethod
    def write_copy(self, target: Path, values: Mapping[str, Raw]) -> None:
        """Write a copy in which tensors have new values, as `prepared` returns them."""

    def read(self, name: str) -> Floats:
        """Return a floating-point tensor as fp32 (fp64 where the file has fp64), exactly."""
        dtype = self.entry(name).dtype
        if dtype not in FLOATS:
            raise InputError(f"{name} in {self.path} is {dtype}, not floating point")
        return widen(self.stored(name), dtype)

    def chunks(self, name: str) -> Iterator[Raw]:
        """Yield a tensor's stored elements in order, a few MB at a time, flat."""
        flat = self.stored(name).reshape(-1)
        for start in range(0, flat.size, CHUNK):
            yield flat[start : start + CHUNK]

    def prepared(self, patches: Mapping[str, Raw]) -> dict[str, Raw]:
        """Return new values of tensors as the file stores them; nothing is written.

        Values in the tensor's storage type (uint16 for bf16) stay unchanged, and others are
        rounded once. Raises InputError.
        """
        return {name: self._prepared(self.entry(name), values) for name, values in patches.items()}

    def _prepared(self, entry: TensorEntry, values: Raw) -> Raw:
        if entry.dtype not in FLOATS:
            raise InputError(f"{entry.name} in {self.path} is {entry.dtype}, not floating point")
        if values.shape != entry.shape:
            raise InputError(
                f"{entry.name} in {self.path} has shape {list(entry.shape)}, "
                f"the new values {list(values.shape)}"
            )
        kind = np.dtype(STORAGE[entry.dtype])
        return values if values.dtype == kind else narrow(values, entry.dtype)

    def _require_known(self, name: str) -> None:
        dtype = self.entry(name).dtype
        if dtype not in STORAGE:
            raise InputError(f"{name} in {self.path} has the unknown number format {dtype}")


def canonical_name(name: str) -> str:
    """Return a tensor's name without the prefixes of training checkpoints."""
    while name.startswith(TRAINING_PREFIXES):
        name = name.partition(".")[2]
    return name


def damaged(path: Path, why: str) -> InputError:
    """Return the error of a damaged file."""
    return InputError(f"{path} is damaged: {why}", hint="fetch or copy the checkpoint again")
