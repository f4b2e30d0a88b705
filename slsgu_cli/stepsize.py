"""The search for a step size along one layer's direction (Algorithm 3).

The search is a pure function of what was tried so far, so that recorded trials resume it
and a test can drive it with any made-up accuracy.
"""

from collections.abc import Sequence

from slsgu_cli.records import Accuracy, Steer, Trial, Trials


def first_step(weight_norm: float, direction_norm: float) -> float:
    """Return the step that moves the layer by 10% of its norm.

    The paper's text has Importance / 10, its inverse up to the factor, which moves a layer
    the less the more it has to move; the released code has this one.
    """
    return 0.1 * weight_norm / direction_norm


def next_step(tried: Sequence[tuple[float, float]], first: float) -> float:
    """Return the step to try after `tried`, a list of (step, what is left to forget) in order.

    Doubles until nothing is left, then bisects between the largest step known to be too
    small and the smallest known to be enough.
    """
    low, high, step = 0.0, None, first
    for tried_step, left in tried:
        if left == 0:
            high = tried_step
        else:
            low = tried_step
        step = 2 * tried_step if high is None else (low + high) / 2
    return step


def left_to_forget(trial: Trial, steer: Steer, margin: float | None) -> float:
    """Return what the search drives to zero: a forget accuracy, or what the margin lacks."""
    return left_of(trial.forget, trial.gap, steer, margin)


def left_of(forget: Accuracy, gap: float, steer: Steer, margin: float | None) -> float:
    """Return what a forget accuracy, and the gap that comes with it, leave to forget."""
    if steer is Steer.MARGIN:
        return max(0.0, (margin or 0.0) - gap)
    return forget.top1 if steer is Steer.FA1 else forget.top5


def best(candidates: Sequence[tuple[float, float]]) -> int:
    """Return the index of what leaves least to forget, ties by the highest utility.

    Candidates are (what is left to forget, utility); of equals the first is kept.
    """
    return min(range(len(candidates)), key=lambda i: (candidates[i][0], -candidates[i][1], i))


def best_of_each(trials: Trials, chosen: Trial | None) -> list[Trial]:
    """Return each layer's trial that forgets most, then keeps most, then moves least.

    Of the layer of `chosen`, that is the one.
    """
    layers: dict[str, list[Trial]] = {}
    for trial in trials.trials:
        layers.setdefault(trial.layer, []).append(trial)

    def order(trial: Trial) -> tuple[bool, float, float, float]:
        forget = left_to_forget(trial, trials.steer, trials.margin)
        kept = [figure.top1 for figure in (trial.utility or {}).values()]
        return trial != chosen, forget, -sum(kept) / len(kept) if kept else 1.0, trial.step

    return [min(own, key=order) for own in layers.values()]
