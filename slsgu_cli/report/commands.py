"""The commands that lead from a set's sources to its edit, written from the records."""

import shlex
from collections import Counter

from slsgu_cli.cases import SearchOptions
from slsgu_cli.ranking import RankOptions
from slsgu_cli.records import GradientPointer, PassOptions, Ranking, Steer, Trials
from slsgu_cli.report.gather import Dossier

# What the commands do without a word.
PASS, RANK, SEARCH = PassOptions(), RankOptions(), SearchOptions()


def commands(dossier: Dossier) -> list[str]:
    """Return a command line for each step that the store has a good record of."""
    name = dossier.name
    lines: list[list[str]] = []
    if manifest := dossier.manifest.record:
        lines.append(list(manifest.command))
    if pointer := dossier.pointer.record:
        lines.append(_grad(pointer))
    if ranking := dossier.ranking.record:
        lines.append(_rank(ranking))
    if (trials := dossier.trials.record) and ranking:
        lines.append(_search(trials, ranking))
    if edit := dossier.edit.record:
        names = edit.joint.names if edit.joint else (name,)
        if edit.joint:
            lines.append(["slsgu", "search", *names, "--joint", "--steer", str(edit.steer)])
        lines.append(["slsgu", "apply", *names, "--out", f"without-{name}"])
        lines.append(["slsgu", "eval", *names, "--model", f"local-dir:without-{name}"])
    return [shlex.join(words) for words in lines if words]


def _grad(pointer: GradientPointer) -> list[str]:
    words = ["slsgu", "grad", pointer.name]
    words += _unless(PASS.batch_size, "--batch-size", pointer.batch_size)
    return words + _unless(PASS.precision, "--precision", pointer.precision)


def _rank(ranking: Ranking) -> list[str]:
    words = ["slsgu", "rank", ranking.name]
    words += _unless(RANK.alignment, "--alignment", ranking.alignment)
    words += _unless(RANK.direction, "--direction", ranking.direction)
    words += _unless(RANK.ridge, "--ridge", ranking.ridge)
    return words + _unless(RANK.qkv, "--qkv", ranking.qkv)


def _search(trials: Trials, ranking: Ranking) -> list[str]:
    words = ["slsgu", "search", trials.name, "--steer", str(trials.steer)]
    if trials.steer is Steer.MARGIN:
        words += ["--margin", f"{trials.margin:g}"]
    tried = Counter((trial.layer, trial.ridge) for trial in trials.trials)
    layers = dict.fromkeys(layer for layer, _ in tried)
    if set(layers) != {score.layer for score in ranking.scores if score.front}:
        words += [word for layer in layers for word in ("--layer", layer)]
    words += _unless(ranking.direction, "--direction", trials.direction)
    ridges = dict.fromkeys(ridge for _, ridge in tried)
    if list(ridges) != [ranking.ridge]:
        words += [word for ridge in ridges for word in _unless(None, "--ridge", ridge)]
    words += _unless(SEARCH.steps, "--steps", max(tried.values(), default=SEARCH.steps))
    return words + _unless(SEARCH.precision, "--precision", trials.precision)


def _unless(usual: object, option: str, value: float | str | None) -> list[str]:
    """Return an option and its value, nothing where it is as usual or there is none."""
    if value is None or value == usual:
        return []
    return [option, f"{value:g}" if isinstance(value, float) else str(value)]
