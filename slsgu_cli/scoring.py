"""Layer importance, gradient alignment and the Pareto front (Eq. 7, Eq. 8, Algorithm 2)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from slsgu_cli.records import Alignment

Vector = npt.NDArray[np.floating]


def norm(values: Vector) -> float:
    """Return the L2 norm of an array of any shape, summed in fp64."""
    flat = values.reshape(-1)
    return float(np.sqrt(_dot(flat, flat)))


def importance(forget_norm: float, weight_norm: float) -> float:
    """Return ||grad L_forget|| / ||W|| (Eq. 7); 0 for a layer of zeros."""
    return forget_norm / weight_norm if weight_norm else 0.0


def alignment(forget: Vector, retain: Vector, kind: Alignment) -> float:
    """Return the cosine of the two gradients (Eq. 8), its magnitude for `Alignment.ABS`.

    A gradient of zeros is orthogonal to everything.
    """
    a, b = forget.reshape(-1), retain.reshape(-1)
    length = float(np.sqrt(_dot(a, a)) * np.sqrt(_dot(b, b)))
    cosine = _dot(a, b) / length if length else 0.0
    return abs(cosine) if kind is Alignment.ABS else cosine


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which (importance, alignment) points no other point dominates.

    A point is dominated by one of strictly larger importance and strictly smaller
    alignment. O(n log n): by falling importance, a point is dominated exactly if a point
    of larger importance has a smaller alignment.
    """
    order = sorted(range(len(points)), key=lambda index: -points[index][0])
    front = [False] * len(points)
    least_above = float("inf")
    start = 0
    while start < len(order):
        level = points[order[start]][0]
        stop = start
        while stop < len(order) and points[order[stop]][0] == level:
            index = order[stop]
            front[index] = points[index][1] <= least_above
            stop += 1
        least_above = min(least_above, *(points[index][1] for index in order[start:stop]))
        start = stop
    return front


def _dot(a: Vector, b: Vector) -> float:
    """Return the inner product in fp64 without an fp64 copy of the whole layer."""
    chunk = 1 << 22
    return sum(
        float(np.dot(a[i : i + chunk].astype(np.float64), b[i : i + chunk].astype(np.float64)))
        for i in range(0, a.size, chunk)
    )
