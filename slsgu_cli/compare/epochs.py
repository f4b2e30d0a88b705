"""Train a baseline epoch by epoch, and report the epoch with the lowest FA@1."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.clip.activations import CacheBudget
from slsgu_cli.clip.evaluation import Evaluation
from slsgu_cli.errors import NotFiniteError
from slsgu_cli.records.figures import Accuracy, Figures

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Reported:
    """The reported epoch with its validation figures, and how many epochs ran.

    The seconds are those of training, without measuring.
    """

    epoch: int
    epochs: int
    figures: Figures
    seconds: float


def follow(epochs: Iterator[int], evaluation: Evaluation, *, label: str, total: int) -> Reported:
    """Run epochs until one forgets; leave the model at the epoch with the lowest FA@1."""
    seconds, epoch, best, least = 0.0, 0, 0, math.inf
    weights: Weights = {}
    with progress.bar(label, total) as ticker:
        start = perf_counter()
        for epoch in epochs:
            settle(evaluation.model)
            seconds += perf_counter() - start
            ticker.advance()
            try:
                forget = forget_accuracy(evaluation).top1
            except NotFiniteError:
                if not best:
                    raise
                progress.warn(f"{label}: epoch {epoch} is dropped, its weights are not finite")
                break
            if forget < least:
                best, least, weights = epoch, forget, weights_of(evaluation.model)
            if forget == 0:
                break
            start = perf_counter()
    if not best:
        raise ValueError("a run has at least one epoch")
    evaluation.model.load_state_dict(weights)
    return Reported(best, epoch, figures_of(evaluation), seconds)


def forget_accuracy(evaluation: Evaluation) -> Accuracy:
    """Return the forget accuracy of the model with its current weights."""
    with torch.no_grad():
        evaluation.forget.prompts.base_pass((), CacheBudget(0))
        for _ in evaluation.forget.images.base_pass({}, CacheBudget(0)):
            pass
        return evaluation.forget.base_accuracy()


def figures_of(evaluation: Evaluation) -> Figures:
    """Return forget accuracy and utility of the model with its current weights."""
    with progress.silent():
        evaluation.base_pass((), cache_bytes=0)
    utility = {name: group.base_accuracy() for name, group in evaluation.utility.items()}
    return Figures(evaluation.forget.base_accuracy(), utility)


def weights_of(model: nn.Module) -> Weights:
    """Return a copy of the state of a model, to load again."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def settle(model: nn.Module) -> None:
    """Wait for a GPU, which may still run after a call has returned."""
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
