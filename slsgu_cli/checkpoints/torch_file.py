"""Checkpoints of PyTorch: state dicts that `torch.save` wrote, and TorchScript.

State dicts are loaded with `weights_only`, which refuses all objects but tensors and plain
containers. TorchScript, such as OpenAI's files, is loaded by `torch.jit`. PyTorch is imported
when such a file is opened.
"""

import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slsgu_cli.checkpoints.number_formats import Raw
from slsgu_cli.checkpoints.tensor_file import CONVERT_HINT, TensorEntry, TensorFile, damaged
from slsgu_cli.errors import InputError
from slsgu_cli.text import first_lines

if TYPE_CHECKING:
    import torch

ZIP_START = b"PK\x03\x04"

# The number formats that numpy lacks, or that checkpoints store as plain integers.
FORMATS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "complex128": "C128",
}
AS_INTEGERS = {"BF16": "uint16", "BOOL": "uint8", "F8_E4M3": "uint8", "F8_E5M2": "uint8"}

# Tensors of OpenAI's TorchScript models that are settings, not weights.
SETTINGS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


class TorchFile(TensorFile):
    """Random access to the tensors of a file that PyTorch wrote.

    The file stays mapped into memory, and a tensor takes memory only when it is read.
    """

    container = "torch"

    def __init__(self, path: Path) -> None:
        """Open a state dict or TorchScript. Raises InputError for damaged and foreign files."""
        _, state, self.is_script = _load(path)
        self._tensors = _tensors(state)
        named = self._tensors.items()
        entries = {name: TensorEntry(_number_format(t), tuple(t.shape)) for name, t in named}
        super().__init__(path, entries)

    def _stored(self, name: str) -> Raw:
        import torch

        whole, dtype = self._tensors[name].detach().contiguous(), self.entries[name].dtype
        if dtype in AS_INTEGERS:
            whole = whole.view(getattr(torch, AS_INTEGERS[dtype]))
        array: Raw = whole.numpy()
        return array

    def write_copy(self, target: Path, values: Mapping[str, Raw]) -> None:
        """Write a copy in which tensors have new values, in separate storage.

        All else in the file is written as it was read.
        """
        import torch

        content, state, is_script = _load(self.path)
        for name, new in values.items():
            old = state[name].detach()
            tensor = torch.from_numpy(np.array(new, order="C")).view(old.dtype)
            if is_script:
                old.copy_(tensor)
            else:
                state[name] = tensor
        if is_script:
            with warnings.catch_warnings(action="ignore"):
                torch.jit.save(content, str(target))
        else:
            torch.save(content, target)
        target.chmod(stat.S_IMODE(self.path.stat().st_mode) | stat.S_IRUSR | stat.S_IWUSR)


def _number_format(tensor: "torch.Tensor") -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return FORMATS.get(name, name) if str(tensor.layout) == "torch.strided" else "sparse"


def _load(path: Path) -> "tuple[Any, dict[str, Any], bool]":
    """Return what a file holds, its state dict, and whether it is TorchScript."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise damaged(path, str(error)) from error
    names = [record.filename.partition("/")[2] for record in records]
    if "data.pkl" not in names:
        raise InputError(f"{path} is a zip file, but not one that torch.save wrote")
    if "constants.pkl" in names:
        script = _loaded(path, is_script=True)
        state = script.state_dict()
        return (
            script,
            {n: t for n, t in state.items() if n.rpartition(".")[2] not in SETTINGS},
            True,
        )
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise InputError(f"{path} is a compressed archive", hint=CONVERT_HINT)
    if not any(name.startswith("data/") for name in names):
        # Training arguments and the like: nothing in it is a tensor, and nothing is unpickled.
        return {}, {}, False
    content = _loaded(path, is_script=False)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not _tensors(state):
        raise InputError(f"{path} holds no state dict of named tensors", hint=CONVERT_HINT)
    return content, state, False


def _tensors(state: "dict[Any, Any]") -> "dict[str, torch.Tensor]":
    import torch

    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}


def _loaded(path: Path, *, is_script: bool) -> Any:
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            if is_script:
                return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        # A damaged file may fail in any way at all.
        raise InputError(f"cannot read {path}: {first_lines(error)}", hint=CONVERT_HINT) from error
