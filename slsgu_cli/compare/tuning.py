"""Tuning: the setting of a baseline with the best trade-off on the validation rows."""

from collections.abc import Callable, Iterator, Sequence

from slsgu_cli import progress
from slsgu_cli.compare.registry import DECADES, Trained, baseline
from slsgu_cli.engine.choice import mean_top1
from slsgu_cli.errors import NotFiniteError
from slsgu_cli.records.comparison import ClipOutcome, Method
from slsgu_cli.records.figures import Figures


def tune(
    method: Method, run: Callable[[float], ClipOutcome]
) -> tuple[ClipOutcome, list[ClipOutcome]]:
    """Return the best outcome of a method and all outcomes that were tried.

    The grid of learning rates has three decades, then half a decade on either side of the best.
    """
    spec = baseline(method)
    if spec and spec.hyperparameter:
        tried = [run(value) for value in spec.hyperparameter.grid]
        return best(tried), tried
    decades = spec.decades if isinstance(spec, Trained) else DECADES
    tried = list(_finite(decades, run, decades[0]))
    middle = best(tried).setting or 0.0
    between = (middle / 10**0.5, middle * 10**0.5)
    tried += _finite([float(f"{rate:.0e}") for rate in between], run, decades[0])
    return best(tried), sorted(tried, key=lambda o: o.setting or 0.0)


def _finite(
    rates: Sequence[float], run: Callable[[float], ClipOutcome], smallest: float
) -> Iterator[ClipOutcome]:
    """Yield the outcome of each learning rate at which training stays finite.

    At the smallest, it must.
    """
    for rate in rates:
        try:
            yield run(rate)
        except NotFiniteError as error:
            if rate == smallest:
                raise
            progress.warn(f"skipped: {error.message}")


def best(outcomes: list[ClipOutcome]) -> ClipOutcome:
    """Return the outcome with the best trade-off; among equals, the smallest setting."""
    return min(outcomes, key=lambda o: (-trade_off(o), o.setting or 0.0))


def trade_off(outcome: ClipOutcome) -> float:
    """Return the balance of an outcome on the validation rows."""
    return balance(outcome.chosen_by or Figures(outcome.forget, outcome.utility))


def balance(figures: Figures) -> float:
    """Return the mean of 100 - FA@1 and the mean TA@1."""
    return (100 - figures.forget.top1 + mean_top1(figures.utility)) / 2
