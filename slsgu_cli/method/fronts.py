"""The layers worth searching: the Pareto front of importance and alignment (Alg. 2)."""

from collections.abc import Sequence
from itertools import groupby


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which (importance, alignment) points no other point dominates.

    A point is dominated by one of strictly larger importance and strictly smaller
    alignment. O(n log n): by falling importance, a point is dominated exactly if a point
    of larger importance has a smaller alignment.
    """
    front = [False] * len(points)
    least_above = float("inf")
    order = sorted(range(len(points)), key=lambda index: -points[index][0])
    for _, group in groupby(order, key=lambda index: points[index][0]):
        level = list(group)
        for index in level:
            front[index] = points[index][1] <= least_above
        least_above = min(least_above, *(points[index][1] for index in level))
    return front


def layers_to_try(points: Sequence[tuple[float, float]], first: int | None) -> list[bool]:
    """Return which layers a search tries, given their (importance, alignment).

    These are the Pareto front, or the `first` most important layers of a direction with one scale
    for all layers.
    """
    if first is None:
        return pareto_front(points)
    order = sorted(range(len(points)), key=lambda index: -points[index][0])
    return [index in order[:first] for index in range(len(points))]
