"""Checkpoints as files: what is in them, which weights they are, copies with edited layers.

Neither torch nor open_clip is imported; a checkpoint of several GB is read in pieces.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.tensor_file import (
    CHUNK,
    CONVERT_HINT,
    FLOATS,
    Floats,
    Raw,
    Splice,
    TensorFile,
    canonical_name,
    looks_like_safetensors,
    open_safetensors,
    rounded,
    widen,
)
from slsgu_cli.checkpoints.torch_archive import open_torch
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.store.files import copy_file, write_at

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
DIGEST_PRECISIONS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
THREADS = 8


def open_weights(path: Path) -> TensorFile:
    """Return random access to the tensors of a .safetensors file or a torch archive.

    The format is told by the content. Raises MissingError or InputError.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if start.startswith(ZIP_START):
            return open_torch(path)
        if looks_like_safetensors(start) or path.suffix == ".safetensors":
            return open_safetensors(path)
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if start.startswith(LEGACY_START):
        raise InputError(f"{path} is in torch's format of before 1.6", hint=CONVERT_HINT)
    raise InputError(
        f"{path} is neither a safetensors file nor a torch archive",
        hint=f"give a checkpoint ending in {', '.join(SUFFIXES)} that holds a state dict",
    )


def read_layer(path: Path, name: str) -> Floats:
    """Return the layer that open_clip calls `name` in the file's own precision.

    fp16 stays fp16 and fp64 stays fp64; fp32 and bf16 come as fp32.
    """
    file = open_weights(path)
    layer = Layer.parse(name)
    stored = file.resolve_name(layer.parameter)
    half = file.entry(stored).dtype == "F16"
    values: Floats = layer.rows(file.stored(stored) if half else file.read(stored))
    return values


def layer_digests(values: Floats) -> dict[str, str]:
    """Return digests of a layer's values as they are in fp32, rounded to fp16, to bf16.

    Equal digests under `fp32` and `fp16` mean that the values are all fp16 numbers.
    """
    return {precision: layer_digest(values, precision) for precision in DIGEST_PRECISIONS}


def layer_digest(values: Floats, precision: str) -> str:
    """Return the digest of values rounded to `precision`: fp32, fp16 or bf16."""
    flat = values.reshape(-1)
    whole = hashlib.sha256()
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK].astype(np.float32, copy=False)
        wide = rounded(part, DIGEST_PRECISIONS[precision])
        whole.update(np.ascontiguousarray(wide, "<f4").data)
    return whole.hexdigest()


def file_fingerprint(path: Path, instead: Mapping[str, Floats] | None = None) -> str:
    """Return 64 hexadecimal digits that name the weights a file holds.

    Parameters of `instead` count with these values in place of their own.

    The same weights have one fingerprint in every container and after upcasting, for the
    values are hashed as fp32 under open_clip's names; what a checkpoint keeps beside its
    weights does not count.
    """
    file = open_weights(path)
    names = {canonical_name(name): name for name in file.names()}
    other = {
        canonical_name(file.resolve_name(name)): values for name, values in (instead or {}).items()
    }

    def digest(name: str) -> str:
        if name in other:
            return layer_digest(other[name], "fp32")
        return _tensor_digest(file, names[name])

    shapes = {name: file.entry(stored).shape for name, stored in names.items()}
    return combined_fingerprint(shapes, digest)


def combined_fingerprint(
    shapes: Mapping[str, tuple[int, ...]], digest: Callable[[str], str]
) -> str:
    """Return the fingerprint of weights from their shapes and `digest`, which hashes one."""
    names = sorted(shapes)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(digest, names))
    whole = hashlib.sha256()
    for name, value in zip(names, digests, strict=True):
        whole.update(f"{name} {list(shapes[name])} {value}\n".encode())
    return whole.hexdigest()


def values_digest(chunks: Iterable[Raw], dtype: str) -> str:
    """Return the digest of stored elements that stand in the number format `dtype`."""
    value = hashlib.sha256()
    if dtype not in FLOATS:
        value.update(f"{dtype} ".encode())
    for chunk in chunks:
        wide = widen(chunk, dtype).astype("<f4", copy=False) if dtype in FLOATS else chunk
        value.update(np.ascontiguousarray(wide).data)
    return value.hexdigest()


def copy_spliced(source: Path, target: Path, splices: Iterable[Splice]) -> None:
    """Copy a file to a new place and overwrite the spliced bytes in the copy."""
    copy_file(source, target)
    write_at(target, ((splice.offset, splice.data) for splice in splices))


def weight_files(folder: Path) -> list[Path]:
    """Return the files directly in a folder that are named like checkpoints, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())


def _tensor_digest(file: TensorFile, name: str) -> str:
    return values_digest(file.chunks(name), file.entry(name).dtype)
