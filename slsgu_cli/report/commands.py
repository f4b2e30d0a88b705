"""The commands that repeat what the records describe."""

import shlex
from collections import Counter
from collections.abc import Iterable

from slsgu_cli.records.directions import DAMPING, Direction, DirectionSpec
from slsgu_cli.records.method import Criterion, EditHeader, Precision, Ranking, Trials
from slsgu_cli.records.option_fields import command_line
from slsgu_cli.records.options import MARGIN, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import LOCAL
from slsgu_cli.report.gather import SetRecords


def commands(records: SetRecords) -> list[str]:
    """Return a command line for each step with a valid record."""
    name = records.name
    edit = records.edit.record
    lines: list[list[str]] = []
    if manifest := records.manifest.record:
        lines.append(list(manifest.command))
    if pointer := records.pointer.record:
        passes = PassOptions(
            batch_size=pointer.batch_size,
            precision=Precision(pointer.precision),
            prefixes=pointer.prefixes,
            anchor=pointer.anchor,
        )
        lines.append(["slsgu", "grad", pointer.name, *command_line(passes)])
    if ranking := records.ranking.record:
        lines.append(_rank(ranking))
    if (trials := records.trials.record) and ranking:
        lines.append(_search(trials, ranking, edit))
    if edit:
        names = edit.joint.names if edit.joint else (*edit.after, name)
        if edit.joint:
            lines.append(["slsgu", "search", *names, "--joint", "--criterion", str(edit.criterion)])
        lines.append(["slsgu", "apply", *names, "--out", f"without-{name}"])
        lines.append(["slsgu", "eval", *names, "--model", f"{LOCAL}without-{name}"])
    return [shlex.join(words) for words in lines if words]


def _rank(ranking: Ranking) -> list[str]:
    options = RankOptions(
        alignment=ranking.alignment,
        direction=Direction.of([each.kind for each in ranking.directions]),
        damping=_damping(ranking.directions),
        qkv=ranking.qkv,
    )
    return ["slsgu", "rank", ranking.name, *command_line(options)]


# The options of a search, in the order in which they are printed.
SHOWN = ("criterion", "margin", "layers", "direction", "damping", "steps", "precision", "after")


def _damping(directions: Iterable[DirectionSpec]) -> float | None:
    """Return the damping of directions that is not the default, if there is one."""
    given = {each.parameters.get("damping", DAMPING) for each in directions} - {DAMPING}
    return next(iter(given), None)


def _search(trials: Trials, ranking: Ranking, edit: EditHeader | None) -> list[str]:
    steps = Counter(trial.move for trial in trials.trials)
    layers = tuple(dict.fromkeys(layer for layer, _ in steps))
    fronts = {score.layer for score in ranking.scores if score.front}
    same = set(trials.directions) == {each.kind for each in ranking.directions}
    ranked = {each.parameters.get("damping") for each in ranking.directions}
    damping = edit.direction.parameters.get("damping") if edit else None
    options = SearchOptions(
        criterion=trials.criterion,
        margin=MARGIN if trials.margin is None else trials.margin,
        layers=() if set(layers) == fronts else layers,
        direction=None if same else Direction.of(trials.directions),
        damping=None if damping in ranked else damping,
        steps=max(steps.values(), default=SearchOptions().steps),
        precision=trials.precision,
        after=tuple(trials.after),
    )
    also = ("criterion", "margin") if trials.criterion is Criterion.MARGIN else ("criterion",)
    words = command_line(options, fields=SHOWN, also=also)
    return ["slsgu", "search", trials.name, *words]
