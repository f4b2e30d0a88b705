"""The trials of a search by layer, direction and step."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from math import inf, isclose
from typing import Generic, Protocol, TypeVar

from slsgu_cli import processes, progress
from slsgu_cli.method.step_search import bisection
from slsgu_cli.records.method import (
    Move,
    Trial,
    TrialKey,
)
from slsgu_cli.records.targets import TargetTrial

T_co = TypeVar("T_co", covariant=True)


T = TypeVar("T", Trial, TargetTrial)


class Candidate(Protocol[T_co]):
    """A layer and a direction, of which each step can be measured."""

    @property
    def move(self) -> Move:
        """The layer and the direction that it moves in."""

    @property
    def first(self) -> float:
        """The first step to try."""

    def measure(self, step: float) -> T_co:
        """Return the trial of a step, with its residual."""


class StepSearch(Generic[T]):
    """The trials of a search by move and step, including those recorded earlier.

    `residual` returns the residual of a trial. `path` has the steps of this search in order;
    recorded trials may be of other steps.
    """

    def __init__(self, trials: Mapping[TrialKey, T], residual: Callable[[T], float]) -> None:
        self.trials: dict[TrialKey, T] = dict(trials)
        self.residual: Callable[[T], float] = residual
        self.path: list[TrialKey] = []

    def trial(self, candidate: Candidate[T], step: float) -> T:
        """Return the recorded trial of a step, or measure it now."""
        key = self.key(candidate.move, step)
        if key not in self.trials:
            self.keep(key, processes.agreed(candidate.measure(step)))
        return self.trials[key]

    def key(self, move: Move, step: float) -> TrialKey:
        """Return the key of a step's trial, whose last digits may be those of another machine."""
        if (move, step) not in self.trials:
            known = (key for key in self.trials if key[0] == move)
            return next((key for key in known if isclose(key[1], step)), (move, step))
        return move, step

    def keep(self, key: TrialKey, trial: T) -> None:
        """Record a trial that was measured now, in place of an earlier one of its step."""
        self.trials[key] = trial

    def bisect(
        self, candidate: Candidate[T], steps: int, first: float | None = None, *, close: float = 0.0
    ) -> None:
        """Try at most `steps` steps of a candidate, from `first` (default: its own) on.

        Stop once the shortest step without a residual is known to a relative error of `close`.
        """
        trials = bisection(partial(self.trial, candidate), self.residual, first or candidate.first)
        with progress.bar(candidate.move[0], steps) as ticker:
            for trial in islice(trials, steps):
                self.path.append((candidate.move, trial.step))
                ticker.advance()
                if close and self.gap(candidate.move) <= close:
                    break

    def shortest(self, move: Move) -> float | None:
        """Return the shortest step of a move on the path without a residual."""
        return min(self._along(move, enough=True), default=None)

    def gap(self, move: Move) -> float:
        """Return the relative distance of the shortest step without a residual to the next one.

        It is infinite where every step has a residual.
        """
        enough = self.shortest(move)
        if enough is None:
            return inf
        shorter = [step for step in self._along(move, enough=False) if step < enough]
        return 1 - max(shorter, default=0.0) / enough

    def _along(self, move: Move, *, enough: bool) -> list[float]:
        steps = [key for key in self.path if key[0] == move]
        return [key[1] for key in steps if (self.residual(self.trials[key]) == 0) is enough]
