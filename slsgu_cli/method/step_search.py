"""The step size of a layer by doubling and bisection (Alg. 3), and the best step (Alg. 1)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar


class Stepped(Protocol):
    """A trial of a step size."""

    @property
    def step(self) -> float:
        """The step size."""


T = TypeVar("T", bound=Stepped)


def first_step(weight_norm: float, direction_norm: float) -> float:
    """Return the step that moves the layer by 10% of its norm.

    The paper's text has Importance / 10, its inverse up to the factor, which moves a layer
    the less the more it has to move; the released code has this one.
    """
    return 0.1 * weight_norm / direction_norm


def next_step(tried: Sequence[tuple[float, float]], first: float) -> float:
    """Return the step to try after `tried`, a list of (step, residual forget accuracy) in order.

    Doubles until the residual is 0, then bisects between the largest step known to be too
    small and the smallest known to be enough (Alg. 3).
    """
    low, high, step = 0.0, None, first
    for tried_step, residual in tried:
        if residual == 0:
            high = tried_step
        else:
            low = tried_step
        step = 2 * tried_step if high is None else (low + high) / 2
    return step


def bisection(
    measure: Callable[[float], T], residual: Callable[[T], float], first: float
) -> Iterator[T]:
    """Yield trials of doubled, then bisected steps (Alg. 3), without end.

    `measure` returns the trial of a step, and `residual` its residual forget accuracy.
    """
    tried: list[tuple[float, float]] = []
    while True:
        trial = measure(next_step(tried, first))
        yield trial
        tried.append((trial.step, residual(trial)))


def best(candidates: Sequence[tuple[float, float]]) -> int:
    """Return the index of the lowest residual, ties by the highest utility (Alg. 1).

    Candidates are (residual forget accuracy, utility); the first of equals wins.
    """
    return min(range(len(candidates)), key=lambda i: (candidates[i][0], -candidates[i][1], i))
