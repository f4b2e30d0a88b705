"""The pickle inside a torch archive, read as descriptions of tensors and nothing else.

A pickle names the functions that rebuild its objects. Here every name leads to a stand-in
of this module: tensors become records of where they lie, ordered dicts stay, whatever
else is named becomes an object that swallows what it is given. No foreign code runs.
"""

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slsgu_cli.dtypes import itemsize
from slsgu_cli.errors import InputError
from slsgu_cli.tensor_file import CONVERT_HINT

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
    "UntypedStorage": "U8",
}
DTYPES = {
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A storage class or a number format that the pickle names."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of the archive: its record's key and the bytes it should have."""

    key: str
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor over a storage; `start` and `strides` are in elements."""

    storage: Storage
    dtype: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Inert:
    """Stands in for an object that is not a tensor; keeps nothing, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        """Make one from any arguments."""
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take and forget any arguments."""

    def __setstate__(self, state: Any) -> None:
        """Forget a state."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget an item."""

    def append(self, _: Any) -> None:
        """Forget an item."""

    add = extend = append


class _Reader(pickle._Unpickler):
    """Unpickles to stand-ins.

    The unpickler written in Python is used because the one in C lets a few bytes of a
    pickle ask for gigabytes of memory.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.tensors: list[PickledTensor] = []

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name, whatever it is."""
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils":
            known = {
                "_rebuild_tensor_v2": self._tensor,
                "_rebuild_tensor_v3": self._typed_tensor,
                "_rebuild_parameter": _parameter,
                "_rebuild_parameter_with_state": _parameter,
            }
            return known.get(name, Inert)
        if module in ("torch", "torch.storage") and name in STORAGES:
            return Kind(STORAGES[name])
        if module == "torch" and name in DTYPES:
            return Kind(DTYPES[name])
        return Inert

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage a persistent id describes."""
        tag, kind, key, _, count = pid
        if tag != "storage" or not isinstance(kind, Kind) or not _is_count(count):
            raise ValueError("a persistent id that is not a storage")
        return Storage(str(key), kind.dtype, count * (itemsize(kind.dtype) or 1))

    def _tensor(self, storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> PickledTensor:
        return self._typed_tensor(storage, start, shape, strides, False, None, None)

    def _typed_tensor(
        self, storage: Any, start: Any, shape: Any, strides: Any, *rest: Any
    ) -> PickledTensor:
        kind = rest[2]
        if not isinstance(storage, Storage) or not _is_count(start):
            raise ValueError("a tensor without a storage")
        shape, strides = tuple(shape), tuple(strides)
        if len(shape) != len(strides) or not all(map(_is_count, shape + strides)):
            raise ValueError("a tensor without a proper shape")
        dtype = kind.dtype if isinstance(kind, Kind) else storage.dtype
        tensor = PickledTensor(storage, dtype, start, shape, strides)
        self.tensors.append(tensor)
        return tensor


def read_pickle(path: Path, data: bytes) -> tuple[dict[str, PickledTensor], list[PickledTensor]]:
    """Return the tensors of the state dict by name, and every tensor of the pickle.

    Raises InputError where the pickle is broken or its tensors are not a state dict;
    a pickle of no tensors at all (training arguments, say) has none to offer.
    """
    reader = _Reader(data)
    try:
        content = reader.load()
    except Exception as error:
        # A damaged pickle may fail in any way at all.
        raise InputError(
            f"{path} is damaged: its pickle cannot be read ({type(error).__name__}: {error})",
            hint="fetch or copy the checkpoint again",
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    named = (
        {key: value for key, value in state.items() if isinstance(value, PickledTensor)}
        if isinstance(state, dict)
        else {}
    )
    if not reader.tensors:
        return {}, []
    if not named or not all(isinstance(key, str) for key in named):
        raise InputError(f"{path} holds no state dict of named tensors", hint=CONVERT_HINT)
    return named, reader.tensors


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
