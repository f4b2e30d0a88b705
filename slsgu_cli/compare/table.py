"""The rows of a comparison: means over concepts, the best setting, who beats ours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slsgu_cli.errors import UsageError
from slsgu_cli.records.method import Accuracy
from slsgu_cli.records.studies import Method, Outcome

LABELS = {
    Method.ORIGINAL: "Original",
    Method.FT: "FT",
    Method.GA: "GA",
    Method.GAFT: "GAFT",
    Method.SALUN: "SalUn",
    Method.SSD: "SSD",
    Method.OURS: "Ours",
    Method.ESD: "ESD-x",
}


@dataclass(frozen=True, slots=True)
class TableRow:
    """A method at one setting: its mean figures over `concepts`."""

    method: Method
    setting: float | None
    epoch: float | None
    forget: Accuracy
    utility: dict[str, Accuracy]
    seconds: float
    forget_passes: float
    retain_passes: float
    concepts: int
    chosen: bool

    @property
    def kept(self) -> float:
        """The mean TA@1 over the evaluation sets."""
        return sum(figure.top1 for figure in self.utility.values()) / len(self.utility)

    @property
    def words(self) -> str:
        """The setting as a person reads it."""
        if self.setting is None:
            return ""
        return f"{'alpha' if self.method is Method.SSD else 'lr'} {self.setting:g}"


def mean_rows(
    concepts: dict[str, tuple[Outcome, ...]], chosen: dict[Method, float] | None
) -> list[TableRow]:
    """Return a row for each method and setting that every concept has, in their order.

    Raises UsageError where the concepts have no evaluation set in common.
    """
    by_key = [{(o.method, o.setting): o for o in outcomes} for outcomes in concepts.values()]
    sets = set.intersection(*(set(o.utility) for each in by_key for o in each.values()))
    if not sets:
        raise UsageError(
            f"{', '.join(concepts)} have no evaluation set in common",
            hint="build them with the same --eval names",
        )
    rows = []
    for method, setting in by_key[0]:
        outcomes = [each[method, setting] for each in by_key if (method, setting) in each]
        if len(outcomes) == len(by_key):
            marked = chosen is not None and chosen.get(method) == setting
            rows.append(_row(outcomes, sorted(sets), chosen=marked))
    return rows


def _row(outcomes: Sequence[Outcome], sets: Sequence[str], *, chosen: bool) -> TableRow:
    def mean(value: Callable[[Outcome], float]) -> float:
        return sum(map(value, outcomes)) / len(outcomes)

    first = outcomes[0]
    return TableRow(
        method=first.method,
        setting=first.setting,
        epoch=None if first.epoch is None else mean(lambda o: o.epoch or 0),
        forget=_mean([o.forget for o in outcomes]),
        utility={name: _mean([o.utility[name] for o in outcomes]) for name in sets},
        seconds=mean(lambda o: o.seconds),
        forget_passes=mean(lambda o: o.forget_passes),
        retain_passes=mean(lambda o: o.retain_passes),
        concepts=len(outcomes),
        chosen=chosen,
    )


def _mean(figures: Sequence[Accuracy]) -> Accuracy:
    return Accuracy(
        sum(figure.top1 for figure in figures) / len(figures),
        sum(figure.top5 for figure in figures) / len(figures),
        sum(figure.rows for figure in figures),
    )


def better(rows: Sequence[TableRow]) -> list[TableRow]:
    """Return the baselines that beat ours: no worse on FA@1 and mean TA@1, better on one."""
    beating = []
    for ours in (row for row in rows if row.method is Method.OURS):
        for row in rows:
            gains = (ours.forget.top1 - row.forget.top1, row.kept - ours.kept)
            if row.method is not Method.OURS and min(gains) >= 0 and max(gains) > 0:
                beating.append(row)
    return beating


DECADES = (1e-6, 1e-5, 1e-4)

# SSD has no learning rate: its alpha decides how many weights are dampened.
ALPHAS = (1.0, 10.0, 100.0, 1000.0)


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


def best(outcomes: list[Outcome]) -> Outcome:
    """Return the outcome of the best trade-off; of equals the one with the least setting."""
    return min(outcomes, key=lambda o: (-trade_off(o), o.setting or 0.0))


def trade_off(outcome: Outcome) -> float:
    """Return the mean of what is forgotten (100 - FA@1) and what is kept (mean TA@1)."""
    kept = [figure.top1 for figure in outcome.utility.values()]
    return (100 - outcome.forget.top1 + sum(kept) / len(kept)) / 2


def _rounded(rate: float) -> float:
    return float(f"{rate:.0e}")
