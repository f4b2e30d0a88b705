"""The table of a comparison: mean figures over concepts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slsgu_cli.compare.registry import baseline
from slsgu_cli.engine.choice import mean_top1
from slsgu_cli.errors import UsageError
from slsgu_cli.records.comparison import ClipOutcome, Method
from slsgu_cli.records.figures import Accuracy


@dataclass(frozen=True, slots=True)
class TableRow:
    """A method at one setting: its mean figures over concepts."""

    method: Method
    setting: float | None
    layer: str | None
    epoch: float | None
    forget: Accuracy
    utility: dict[str, Accuracy]
    seconds: float
    forget_passes: float
    retain_passes: float
    chosen: bool

    @property
    def mean_utility(self) -> float:
        """The mean TA@1 over the evaluation sets."""
        return mean_top1(self.utility)

    @property
    def words(self) -> str:
        """The name and the value of the setting, empty without one."""
        if self.setting is None:
            return ""
        return f"{hyperparameter_of(self.method) or 'lr'} {self.setting:g}"


def mean_rows(
    concepts: dict[str, tuple[ClipOutcome, ...]], chosen: dict[Method, float] | None
) -> list[TableRow]:
    """Return a row for each method and setting that every concept has, in order.

    Raises UsageError if the concepts have no evaluation set in common.
    """
    by_key = [{(o.method, o.setting, o.layer): o for o in each} for each in concepts.values()]
    sets = set.intersection(*(set(o.utility) for each in by_key for o in each.values()))
    if not sets:
        raise UsageError(
            f"{', '.join(concepts)} have no evaluation set in common",
            hint="build them with the same --eval names",
        )
    rows = []
    for key in by_key[0]:
        outcomes = [each[key] for each in by_key if key in each]
        if len(outcomes) == len(by_key):
            marked = chosen is not None and key[1] is not None and chosen.get(key[0]) == key[1]
            rows.append(_row(outcomes, sorted(sets), chosen=marked))
    return rows


def _row(outcomes: Sequence[ClipOutcome], sets: Sequence[str], *, chosen: bool) -> TableRow:
    def mean(value: Callable[[ClipOutcome], float]) -> float:
        return sum(map(value, outcomes)) / len(outcomes)

    first = outcomes[0]
    return TableRow(
        method=first.method,
        setting=first.setting,
        layer=first.layer,
        epoch=None if first.epoch is None else mean(lambda o: o.epoch or 0),
        forget=_mean([o.forget for o in outcomes]),
        utility={name: _mean([o.utility[name] for o in outcomes]) for name in sets},
        seconds=mean(lambda o: o.seconds),
        forget_passes=mean(lambda o: o.forget_passes),
        retain_passes=mean(lambda o: o.retain_passes),
        chosen=chosen,
    )


def _mean(figures: Sequence[Accuracy]) -> Accuracy:
    return Accuracy(
        sum(figure.top1 for figure in figures) / len(figures),
        sum(figure.top5 for figure in figures) / len(figures),
        sum(figure.rows for figure in figures),
    )


def better(rows: Sequence[TableRow]) -> list[TableRow]:
    """Return the baselines that beat ours: no worse on FA@1 and mean TA@1, and better on one."""
    beating = []
    for ours in (row for row in rows if row.method is Method.OURS):
        for row in rows:
            gains = (ours.forget.top1 - row.forget.top1, row.mean_utility - ours.mean_utility)
            if row.method is not Method.OURS and min(gains) >= 0 and max(gains) > 0:
                beating.append(row)
    return beating


def hyperparameter_of(method: Method) -> str | None:
    """Return the name of the hyperparameter of a method, None if it is the learning rate."""
    spec = baseline(method)
    return spec.hyperparameter.name if spec and spec.hyperparameter else None
