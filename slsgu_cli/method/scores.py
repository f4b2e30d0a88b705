"""Importance and alignment of a layer (Eq. 7 and 8), summed in fp64."""

from math import fsum, sqrt

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.floating]


def norm(values: Vector) -> float:
    """Return the L2 norm of an array of any shape."""
    flat = values.reshape(-1)
    return sqrt(_dot(flat, flat))


def importance(forget_norm: float, weight_norm: float) -> float:
    """Return ||grad L_forget|| / ||W|| (Eq. 7); 0 for a layer of zeros."""
    return forget_norm / weight_norm if weight_norm else 0.0


def alignment(forget: Vector, retain: Vector, *, signed: bool = False) -> float:
    """Return the magnitude of the cosine of the two gradients (Eq. 8), or the cosine itself.

    A gradient of zeros is orthogonal to everything.
    """
    a, b = forget.reshape(-1), retain.reshape(-1)
    length = sqrt(_dot(a, a)) * sqrt(_dot(b, b))
    cosine = _dot(a, b) / length if length else 0.0
    return cosine if signed else abs(cosine)


def _dot(a: Vector, b: Vector) -> float:
    """Return the inner product in fp64 without an fp64 copy of the whole layer.

    Products of fp32 are exact in fp64, and numpy's pairwise sums have the same digits on every
    machine, unlike those of a BLAS.
    """
    chunk = 1 << 16
    return fsum(
        float(np.multiply(a[i : i + chunk], b[i : i + chunk], dtype=np.float64).sum())
        for i in range(0, a.size, chunk)
    )
