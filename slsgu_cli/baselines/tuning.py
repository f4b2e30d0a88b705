"""Which setting of a baseline is its best: the grid and the criterion of `--lr auto`."""

from collections.abc import Callable

from slsgu_cli.baselines.records import Method, Outcome

DECADES = (1e-6, 1e-5, 1e-4)
# SSD has no learning rate: its alpha decides how many weights are dampened.
ALPHAS = (1.0, 10.0, 100.0, 1000.0)


def trade_off(outcome: Outcome) -> float:
    """Return the mean of what is forgotten (100 - FA@1) and what is kept (mean TA@1)."""
    kept = [found.top1 for found in outcome.utility.values()]
    return (100 - outcome.forget.top1 + sum(kept) / len(kept)) / 2


def best(outcomes: list[Outcome]) -> Outcome:
    """Return the outcome of the best trade-off; of equals the one with the least setting."""
    return min(outcomes, key=lambda o: (-trade_off(o), o.setting or 0.0))


def tune(method: Method, run: Callable[[float], Outcome]) -> tuple[Outcome, list[Outcome]]:
    """Return a baseline's best outcome and all that were tried for it.

    Learning rates: three decades, then half a decade to either side of the best of them.
    """
    if method is Method.SSD:
        tried = [run(alpha) for alpha in ALPHAS]
        return best(tried), tried
    tried = [run(rate) for rate in DECADES]
    middle = best(tried).setting or 0.0
    tried += [run(rate) for rate in (_rounded(middle / 10**0.5), _rounded(middle * 10**0.5))]
    return best(tried), sorted(tried, key=lambda o: o.setting or 0.0)


def _rounded(rate: float) -> float:
    return float(f"{rate:.0e}")
