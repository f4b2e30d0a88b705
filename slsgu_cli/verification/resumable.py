"""State that long checks save while they run, to resume after an interruption."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from slsgu_cli import progress
from slsgu_cli.engine.resumable import SavedSums
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import SumsHeader
from slsgu_cli.store.store import Arrays

# The state that Adam has for a parameter, and the key of the measured accuracies.
STEP = "step"
ADAM = (STEP, "exp_avg", "exp_avg_sq")
FIGURES = "figures"
T = TypeVar("T")


@dataclass(slots=True)
class PartialResults:
    """The results of a check so far, and how to save them.

    A check computes its results in the same order every time. They are independent.
    """

    results: list[Any]
    save: Callable[[Sequence[Any]], None] | None = None
    _position: int = field(init=False, default=0)

    def next(self, count: int, compute: Callable[[], Sequence[T]]) -> list[T]:
        """Return the next `count` results: saved ones, or else computed now."""
        start, self._position = self._position, self._position + count
        if len(self.results) < self._position:
            self.results[start:] = compute()
            if self.save is not None:
                self.save(self.results)
        return self.results[start : self._position]


@dataclass(slots=True)
class Training:
    """Training by Adam that saves its state from time to time.

    `figures` are accuracies measured during training. On a CPU, a resumed training ends with the
    same bytes as one without interruption.
    """

    optimizer: torch.optim.Optimizer
    steps: int
    saved: SavedSums | None = None
    figures: list[Accuracy] = field(default_factory=list)
    done: int = 0

    @classmethod
    def resume(cls, optimizer: torch.optim.Optimizer, steps: int, saved: SavedSums | None) -> Self:
        """Return a training, resumed from its saved state if there is one."""
        training = cls(optimizer, steps, saved)
        if saved is not None and (done := saved.resume(steps, training._load)):
            training.done = done
            progress.note(f"training resumes after {done} of its {steps} steps")
        return training

    def advance(self) -> None:
        """Count a step; save the state if it is due."""
        self.done += 1
        if self.saved is not None and self.saved.due:
            self.saved.write(self._arrays, self.steps, added=self.done, done=self.done)

    def remove(self) -> None:
        """Remove the saved state."""
        if self.saved is not None:
            self.saved.remove()

    @property
    def _parameters(self) -> list[Tensor]:
        return [each for group in self.optimizer.param_groups for each in group["params"]]

    def _arrays(self) -> Arrays:
        figures = [(each.top1, each.top5, each.rows, each.is_test) for each in self.figures]
        arrays = {FIGURES: np.array(figures, dtype=np.float64).reshape(-1, 4)}
        for index, parameter in enumerate(self._parameters):
            arrays[f"{index}"] = parameter.detach().cpu().numpy()
            for name, value in self.optimizer.state[parameter].items():
                arrays[f"{index}.{name}"] = value.cpu().numpy()
        return arrays

    @torch.no_grad()
    def _load(self, _header: SumsHeader, arrays: Arrays) -> None:
        for top1, top5, rows, is_test in arrays[FIGURES].tolist():
            self.figures.append(Accuracy(top1, top5, int(rows), bool(is_test)))
        for index, parameter in enumerate(self._parameters):
            parameter.copy_(torch.tensor(arrays[f"{index}"]))
            state = {name: f"{index}.{name}" for name in ADAM if f"{index}.{name}" in arrays}
            self.optimizer.state[parameter] = {
                name: torch.tensor(arrays[key], device="cpu" if name == STEP else parameter.device)
                for name, key in state.items()
            }
