"""RAZOR: move several layers along forget, retain and drift gradients (arXiv 2603.14819)."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.clip.batches import text_features, to_tokens
from slsgu_cli.compare.epochs import figures_of
from slsgu_cli.compare.registry import Hyperparameter, Trained, register
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.compare.training import LossTerm
from slsgu_cli.compare.tuning import balance
from slsgu_cli.errors import NotFiniteError
from slsgu_cli.method.layers import candidates
from slsgu_cli.method.scores import alignment, importance, norm
from slsgu_cli.records.comparison import Method

# Rounds, trials of a step in each, and the exponents of 2 between which steps are searched.
ROUNDS, TRIALS = 6, 6
SMALLEST, LARGEST = -8.0, 0.0
# The exponent of a score, and the weights of the forget and the drift gradient.
EXPONENT, FORGET, DRIFT = 1.0, 1.0, 1.0

Rows = npt.NDArray[np.intp]
Gradients = dict[str, Tensor]


def razor(runner: BaselineRunner, threshold: float) -> Iterator[int]:
    """Move the layers whose score is above a fraction of the largest; then one more each round."""
    model, plan = runner.model, runner.plan
    forget, retain = runner.term("forget"), runner.term("retain")
    layers, chosen = candidates(name for name, _ in model.named_parameters()), set[str]()
    batches = {term.sign: term.order(plan, 1) for term in (forget, retain)}
    with torch.no_grad():
        frozen = [similarities(retain, rows) for rows in batches[retain.sign]]

    def drift(number: int) -> Tensor:
        now = similarities(retain, batches[retain.sign][number])
        return (now - frozen[number]).square().mean()

    def gradient(term: LossTerm) -> Gradients:
        own = batches[term.sign]
        return gradients(model, layers, len(own), lambda n: term.sign * term.of(own[n]))

    for number in range(1, min(ROUNDS, plan.epochs) + 1):
        of_forget, of_retain = gradient(forget), gradient(retain)
        of_drift = gradients(model, layers, len(frozen), drift)
        chosen |= selected(scores(model, of_forget, of_retain), threshold, chosen)
        along = {
            name: FORGET * of_forget[name] - of_retain[name] - DRIFT * of_drift[name]
            for name in sorted(chosen)
        }
        move(model, along, best_step(runner, along))
        progress.detail(f"RAZOR moved {len(chosen)} layers in round {number}")
        yield number


register(
    Method.RAZOR,
    Trained(
        label="RAZOR",
        hyperparameter=Hyperparameter("tau", 0.5, (0.1, 0.25, 0.5, 0.9)),
        losses=("forget", "retain"),
        epochs=razor,
    ),
)


def similarities(term: LossTerm, rows: Rows) -> Tensor:
    """Return the cosines of all images and texts among some rows."""
    run = term.loss
    images, ids = run.normalize(term.images[rows]), to_tokens(term.tokens[rows], "cpu")
    return run.vision.features(images, images) @ text_features(run.text, ids, run.device).T


def gradients(
    model: nn.Module, layers: Sequence[str], count: int, loss: Callable[[int], Tensor]
) -> Gradients:
    """Return the mean gradient of the losses of mini-batches, for each layer."""
    parameters = [model.get_parameter(name) for name in layers]
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for number in range(count):
        found = torch.autograd.grad(loss(number), parameters, allow_unused=True)
        for total, each in zip(totals, found, strict=True):
            if each is not None:
                total += each / count
    return dict(zip(layers, totals, strict=True))


def scores(model: nn.Module, forget: Gradients, retain: Gradients) -> dict[str, float]:
    """Return |g_f| / |W| (1 - cos(g_f, g_r))^EXPONENT of each layer."""
    found = {}
    for name, gradient in forget.items():
        g, other = gradient.cpu().numpy(), retain[name].cpu().numpy()
        weight = model.get_parameter(name).detach().cpu().numpy()
        apart = 1 - alignment(g, other, signed=True)
        found[name] = importance(norm(g), norm(weight)) * apart**EXPONENT
    return found


def selected(found: Mapping[str, float], threshold: float, chosen: set[str]) -> set[str]:
    """Return the layers to add: those above the threshold, or the best of those not chosen yet."""
    largest = max(found.values())
    if not chosen:
        return {name for name, score in found.items() if score >= threshold * largest}
    others = sorted(found.keys() - chosen)
    return {max(others, key=found.__getitem__)} if others else set()


@torch.no_grad()
def move(model: nn.Module, along: Gradients, step: float) -> None:
    """Move each layer by `step` times its norm."""
    for name, direction in along.items():
        weight, size = model.get_parameter(name), float(direction.norm())
        if size:
            weight.add_(direction, alpha=step * float(weight.norm()) / size)


def best_step(runner: BaselineRunner, along: Gradients) -> float:
    """Return the step with the best trade-off on validation rows, by bisection.

    Steps are halved geometrically towards the shortest one that forgets.
    """
    model, low, high = runner.model, SMALLEST, LARGEST
    before = {name: model.get_parameter(name).detach().clone() for name in along}
    tried: dict[float, float] = {}
    for _ in range(TRIALS):
        middle = (low + high) / 2
        move(model, along, 2**middle)
        try:
            figures = figures_of(runner.validation)
            tried[2**middle] = balance(figures)
            is_long = not figures.forget.top1
        except NotFiniteError:
            is_long = True
        with torch.no_grad():
            for name, value in before.items():
                model.get_parameter(name).copy_(value)
        low, high = (low, middle) if is_long else (middle, high)
    return max(tried, key=lambda step: (tried[step], -step), default=0.0)
