"""The figures that trials are compared by: residual and utility."""

from collections.abc import Mapping

from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import Criterion, Trial, Trials, UtilityMetric


def residual(forget: Accuracy, gap: float, criterion: Criterion, margin: float | None) -> float:
    """Return what the search drives to zero: a forget accuracy, or the rest of the margin.

    For prompts, instead of FA@5, it is the rest of their gap.
    """
    if criterion is Criterion.FA1:
        return forget.top1
    if criterion is Criterion.MARGIN or forget.of_prompts:
        return max(0.0, (margin or 0.0) - gap)
    return forget.top5


def mean_top1(utility: Mapping[str, Accuracy]) -> float:
    """Return the mean TA@1 over the evaluation sets, in percent."""
    return sum(figure.top1 for figure in utility.values()) / len(utility)


def utility_of(trial: Trial, by: UtilityMetric) -> float:
    """Return the utility of a measured trial, in percent, by which steps are compared.

    Nearly all prompts of other names are recognised after any step, so for prompts it is how
    little their cosines change.
    """
    if trial.forget.of_prompts and trial.moved is not None:
        return 100 * (1 - trial.moved)
    if by is UtilityMetric.EXPECTED and trial.expected is not None:
        return trial.expected
    return mean_top1(trial.utility or {})


def best_of_each(trials: Trials, chosen: Trial | None) -> list[Trial]:
    """Return each layer's trial with the lowest residual, ties by utility, then by step.

    The layer of `chosen` has that trial.
    """
    layers: dict[str, list[Trial]] = {}
    for trial in trials.trials:
        layers.setdefault(trial.layer, []).append(trial)

    def order(trial: Trial) -> tuple[bool, float, float, float]:
        utility = mean_top1(trial.utility) if trial.utility else -1.0
        left = residual(trial.forget, trial.gap, trials.criterion, trials.margin)
        return trial != chosen, left, -utility, trial.step

    return [min(trials_of_layer, key=order) for trials_of_layer in layers.values()]
