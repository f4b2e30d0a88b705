"""Which epoch of a baseline is reported: the first that forgets, else the one that forgets most.

Later epochs cannot change what is reported once the forget accuracy is 0, so a run ends
there. Its learning rates are those of the whole schedule.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.activations import CacheBudget
from slsgu_cli.evaluation import Evaluation
from slsgu_cli.records import Accuracy

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Reported:
    """The epoch reported and its figures; how many epochs ran, and their seconds.

    The seconds are those of the epochs alone, without measuring.
    """

    epoch: int
    epochs: int
    forget: Accuracy
    utility: dict[str, Accuracy]
    seconds: float


def follow(epochs: Iterator[int], evaluation: Evaluation, *, label: str, total: int) -> Reported:
    """Run epochs until one forgets or none is left; leave the model as it is reported."""
    seconds, epoch, best = 0.0, 0, 0
    least: Accuracy | None = None
    weights: Weights = {}
    with progress.bar(label, total) as ticker:
        while True:
            start = perf_counter()
            ended = next(epochs, None)
            if ended is None:
                break
            _settle(evaluation.model)
            seconds += perf_counter() - start
            epoch = ended
            ticker.advance()
            found = forget_accuracy(evaluation)
            if least is None or found.top1 < least.top1:
                best, least, weights = epoch, found, weights_of(evaluation.model)
            if found.top1 == 0:
                break
    if least is None:
        raise ValueError("a run has at least one epoch")
    set_weights(evaluation.model, weights)
    return Reported(best, epoch, least, utility(evaluation), seconds)


def forget_accuracy(evaluation: Evaluation) -> Accuracy:
    """Return how often the concept is recognised by the model as it is now."""
    group = evaluation.forget
    with torch.no_grad():
        group.prompts.base_pass((), CacheBudget(0))
        for _ in group.images.base_pass((), CacheBudget(0)):
            pass
        return group.base_accuracy()


def utility(evaluation: Evaluation) -> dict[str, Accuracy]:
    """Return the accuracy on each evaluation set of the model as it is now."""
    with progress.silent():
        evaluation.base_pass((), cache_bytes=0)
    return {name: group.base_accuracy() for name, group in evaluation.utility.items()}


def weights_of(model: nn.Module) -> Weights:
    """Return a copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def set_weights(model: nn.Module, weights: Weights) -> None:
    """Put back what `weights_of` returned."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def _settle(model: nn.Module) -> None:
    """Wait for a GPU: its clock runs on after a call has returned."""
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
