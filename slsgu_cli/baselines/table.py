"""The rows of a comparison over one concept or the mean over several, as Table 1 has them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slsgu_cli.baselines.records import Method, Outcome
from slsgu_cli.errors import UsageError
from slsgu_cli.records import Accuracy


@dataclass(frozen=True, slots=True)
class Row:
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
        return sum(found.top1 for found in self.utility.values()) / len(self.utility)

    @property
    def words(self) -> str:
        """The setting as a person reads it."""
        if self.setting is None:
            return ""
        return f"{'alpha' if self.method is Method.SSD else 'lr'} {self.setting:g}"


def mean_rows(
    concepts: dict[str, tuple[Outcome, ...]], chosen: dict[Method, float] | None
) -> list[Row]:
    """Return a row for each method and setting that every concept has, in their order.

    Raises UsageError where the concepts have no evaluation set in common.
    """
    every = [{(o.method, o.setting): o for o in outcomes} for outcomes in concepts.values()]
    sets = set.intersection(*(set(o.utility) for found in every for o in found.values()))
    if not sets:
        raise UsageError(
            f"{', '.join(concepts)} have no evaluation set in common",
            hint="build them with the same --eval names",
        )
    rows = []
    for key in every[0]:
        if all(key in found for found in every):
            own = [found[key] for found in every]
            marked = chosen is not None and chosen.get(key[0]) == key[1]
            rows.append(_row(own, sorted(sets), chosen=marked))
    return rows


def better(rows: Sequence[Row]) -> list[Row]:
    """Return the baselines that beat ours: no worse on FA@1 and mean TA@1, better on one."""
    found = []
    for ours in (row for row in rows if row.method is Method.OURS):
        for row in rows:
            gains = (ours.forget.top1 - row.forget.top1, row.kept - ours.kept)
            if row.method is not Method.OURS and min(gains) >= 0 and max(gains) > 0:
                found.append(row)
    return found


def _row(own: Sequence[Outcome], sets: Sequence[str], *, chosen: bool) -> Row:
    def mean(value: Callable[[Outcome], float]) -> float:
        return sum(map(value, own)) / len(own)

    first = own[0]
    return Row(
        method=first.method,
        setting=first.setting,
        epoch=None if first.epoch is None else mean(lambda o: o.epoch or 0),
        forget=_mean([o.forget for o in own]),
        utility={name: _mean([o.utility[name] for o in own]) for name in sets},
        seconds=mean(lambda o: o.seconds),
        forget_passes=mean(lambda o: o.forget_passes),
        retain_passes=mean(lambda o: o.retain_passes),
        concepts=len(own),
        chosen=chosen,
    )


def _mean(figures: Sequence[Accuracy]) -> Accuracy:
    return Accuracy(
        sum(figure.top1 for figure in figures) / len(figures),
        sum(figure.top5 for figure in figures) / len(figures),
        sum(figure.rows for figure in figures),
    )
