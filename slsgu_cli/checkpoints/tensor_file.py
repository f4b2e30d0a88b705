"""Random access to the tensors of a checkpoint file."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from slsgu_cli.checkpoints.number_formats import CHUNK, STORAGE, Raw
from slsgu_cli.errors import InputError

# Prefixes that torch.compile and training in several processes put before every name.
COMPILED = "_orig_mod."
TRAINING_PREFIXES = ("module.", COMPILED)
CONVERT_HINT = "load the model with open_clip and save its state_dict() as safetensors"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The number format and the shape of one tensor of a file."""

    dtype: str
    shape: tuple[int, ...]


class TensorFile(ABC):
    """Random access to the tensors of one checkpoint file, whose `entries` are by name.

    `is_script` is True for TorchScript, which has a model's code next to its weights.
    """

    container: str
    is_script = False

    def __init__(self, path: Path, entries: Mapping[str, TensorEntry]) -> None:
        self.path = path
        self.entries = entries

    def stored(self, name: str) -> Raw:
        """Return a tensor's elements as they are stored (bf16 as uint16), in its shape."""
        dtype = self.entries[name].dtype
        if dtype not in STORAGE:
            raise InputError(f"{name} in {self.path} has the unknown number format {dtype}")
        return self._stored(name)

    @abstractmethod
    def _stored(self, name: str) -> Raw: ...

    @abstractmethod
    def write_copy(self, target: Path, values: Mapping[str, Raw]) -> None:
        """Write a copy in which tensors have new values, as the file stores them."""

    def chunks(self, name: str) -> Iterator[Raw]:
        """Yield a tensor's stored elements in order, a few MB at a time, flat."""
        flat = self.stored(name).reshape(-1)
        for start in range(0, flat.size, CHUNK):
            yield flat[start : start + CHUNK]


def canonical_name(name: str) -> str:
    """Return a tensor's name without the prefixes of training checkpoints."""
    while name.startswith(TRAINING_PREFIXES):
        name = name.partition(".")[2]
    return name


def damaged(path: Path, why: str) -> InputError:
    """Return the error of a damaged file."""
    return InputError(f"{path} is damaged: {why}", hint="fetch or copy the checkpoint again")
