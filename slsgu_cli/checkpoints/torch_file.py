"""Checkpoints of PyTorch: state dicts that `torch.save` wrote, and TorchScript.

State dicts are loaded with `weights_only`, which refuses all objects but tensors and plain
containers. TorchScript, as OpenAI's own files are, is loaded by `torch.jit`. PyTorch is imported
when such a file is opened.
"""

import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
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

    def __init__(self, path: Path, named: "dict[str, torch.Tensor]", *, is_script: bool) -> None:
        entries = [_entry(name, tensor) for name, tensor in named.items()]
        super().__init__(path, entries)
        self._tensors = named
        self.is_script = is_script

    def stored(self, name: str) -> Raw:
        """Return a tensor's elements as they are stored (bf16 as uint16), in its shape."""
        self._require_known(name)
        return _as_array(self._tensors[name], self.entry(name).dtype)

    def write_copy(self, target: Path, values: Mapping[str, Raw]) -> None:
        """Write a copy in which tensors have new values; see `prepared`.

        All else in the file is written as it was read. Raises InputError.
        """
        import torch

        # Changes of tensors that are mapped into memory do not reach the file.
        content, named, is_script = _load(self.path)
        for name, new in values.items():
            old = named[name].detach()
            old.copy_(torch.from_numpy(np.array(new, order="C")).view(old.dtype))
        if is_script:
            with warnings.catch_warnings(action="ignore"):
                torch.jit.save(content, str(target))
        else:
            torch.save(content, target)
        target.chmod(stat.S_IMODE(self.path.stat().st_mode) | stat.S_IRUSR | stat.S_IWUSR)

    def prepared(self, patches: Mapping[str, Raw]) -> dict[str, Raw]:
        """Return what to write for new values of tensors; see `TensorFile`."""
        values = super().prepared(patches)
        if values:
            content, named, _ = _load(self.path)
            for name in values:
                _require_own_storage(self.path, name, named, content)
        return values


def open_torch(path: Path) -> TorchFile:
    """Open a state dict or TorchScript. Raises InputError for damaged and foreign files."""
    _, named, is_script = _load(path)
    return TorchFile(path, named, is_script=is_script)


def _load(path: Path) -> "tuple[Any, dict[str, torch.Tensor], bool]":
    """Return what a file holds, its named tensors, and whether it is TorchScript."""
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
        named = {n: t for n, t in state.items() if n.rpartition(".")[2] not in SETTINGS}
        return script, named, True
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise InputError(f"{path} is a compressed archive", hint=CONVERT_HINT)
    if not any(name.startswith("data/") for name in names):
        # Training arguments and the like: nothing in it is a tensor, and nothing is unpickled.
        return {}, {}, False
    content = _loaded(path, is_script=False)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    return content, _named(path, state), False


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


def _named(path: Path, state: Any) -> "dict[str, torch.Tensor]":
    import torch

    items = state.items() if isinstance(state, dict) else ()
    named = {key: value for key, value in items if isinstance(value, torch.Tensor)}
    if not named or not all(isinstance(key, str) for key in named):
        raise InputError(f"{path} holds no state dict of named tensors", hint=CONVERT_HINT)
    return named


def _entry(name: str, tensor: "torch.Tensor") -> TensorEntry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    plain = (
        str(tensor.layout) == "torch.strided"
        and not tensor.is_quantized
        and tensor.device.type == "cpu"
    )
    return TensorEntry(name, FORMATS.get(dtype, dtype) if plain else "?", tuple(tensor.shape))


def _as_array(tensor: "torch.Tensor", dtype: str) -> Raw:
    import torch

    whole = tensor.detach().contiguous()
    if dtype in AS_INTEGERS:
        whole = whole.view(getattr(torch, AS_INTEGERS[dtype]))
    array: Raw = whole.numpy()
    return array


def _require_own_storage(
    path: Path, name: str, named: "Mapping[str, torch.Tensor]", content: Any
) -> None:
    """Refuse to change a tensor whose bytes another tensor may use too."""
    tensor = named[name]
    if any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise InputError(f"{name} in {path} repeats its own elements", hint=CONVERT_HINT)
    names = {id(each): other for other, each in named.items()}
    storage = tensor.untyped_storage().data_ptr()
    for each in [*named.values(), *_tensors(content)]:
        if each is not tensor and each.untyped_storage().data_ptr() == storage:
            other = names.get(id(each), "a tensor outside the state dict")
            raise InputError(
                f"{name} shares its storage with {other} in {path}, "
                "so one cannot change without the other",
                hint=CONVERT_HINT,
            )


def _tensors(content: Any) -> "Iterator[torch.Tensor]":
    """Yield every tensor in nested containers."""
    import torch

    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list | tuple | set):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _tensors(value)
