"""Number formats of stored tensors: widened exactly, rounded once, digested."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Raw = npt.NDArray[Any]
STORAGE: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|u1",
    "F8_E4M3": "|u1",
    "F8_E5M2": "|u1",
    "C64": "<c8",
    "C128": "<c16",
}
FLOATS = ("F64", "F32", "F16", "BF16")
PRECISION = {"F64": "fp32", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
DIGEST_PRECISIONS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
CHUNK = 1 << 20
BFLOAT16_QUIET = np.uint32(0x0040_0000)


def widen(stored: Raw, dtype: str) -> Floats:
    """Return stored elements as fp32 (fp64 for F64), exactly, in the same shape."""
    if dtype == "BF16":
        # asarray: numpy makes a scalar of a shift of a 0-dimensional array.
        wide: Floats = np.asarray(stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide
    return stored.astype(np.float64 if dtype == "F64" else np.float32, copy=False)


def narrow(values: Floats, dtype: str) -> Raw:
    """Return values as stored in `dtype`, rounded to nearest even.

    Too large values become infinities and NaN stays NaN.
    """
    if dtype == "BF16":
        return _bfloat16(values)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(STORAGE[dtype], copy=False)


def rounded(values: Floats, dtype: str) -> Floats:
    """Return values rounded to `dtype`, as fp32 (fp64 for F64)."""
    return widen(narrow(values, dtype), dtype)


def _bfloat16(values: Floats) -> Raw:
    bits = _to_odd(values).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    up = (bits + (np.uint32(0x7FFF) + even)) >> np.uint32(16)
    # A NaN with its payload in the lower half would round to infinity.
    quiet = (bits | BFLOAT16_QUIET) >> np.uint32(16)
    return np.where(np.isnan(values), quiet, up).astype("<u2")


def _to_odd(values: Floats) -> npt.NDArray[np.float32]:
    """Return fp64 as fp32 rounded to odd, after which a second rounding acts as the first."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        near = values.astype(np.float32)
    if values.dtype == np.float32:
        return near
    exact = values.astype(np.float64, copy=False)
    back = near.astype(np.float64)
    inexact = (back != exact) & ~np.isnan(exact)
    bits = near.view(np.uint32)
    toward_zero = bits - (inexact & (np.abs(back) > np.abs(exact))).astype(np.uint32)
    odd: npt.NDArray[np.float32] = (toward_zero | inexact.astype(np.uint32)).view(np.float32)
    return odd


def layer_digests(values: Floats) -> dict[str, str]:
    """Return digests of a layer's values as they are in fp32, rounded to fp16, to bf16.

    Equal digests under `fp32` and `fp16` mean that the values are all fp16 numbers.
    """
    return {precision: layer_digest(values, precision) for precision in DIGEST_PRECISIONS}


def layer_digest(values: Floats, precision: str) -> str:
    """Return the digest of values rounded to `precision`: fp32, fp16 or bf16."""
    flat, dtype = values.reshape(-1), DIGEST_PRECISIONS[precision]
    parts = (flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK))
    singles = (part.astype(np.float32, copy=False) for part in parts)
    return values_digest((narrow(single, dtype) for single in singles), dtype)


def values_digest(chunks: Iterable[Raw], dtype: str) -> str:
    """Return the digest of elements stored in the number format `dtype`."""
    value = hashlib.sha256()
    if dtype not in FLOATS:
        value.update(f"{dtype} ".encode())
    for chunk in chunks:
        wide = widen(chunk, dtype).astype("<f4", copy=False) if dtype in FLOATS else chunk
        value.update(np.ascontiguousarray(wide).data)
    return value.hexdigest()
