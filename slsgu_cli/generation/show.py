"""How the results of generating and asking are printed."""

from typing import TYPE_CHECKING

from slsgu_cli.console import Console
from slsgu_cli.generation.records import Answers, AnswerSet, Generation, TargetTrial, TargetTrials
from slsgu_cli.layout import edit_path
from slsgu_cli.naming import known_as
from slsgu_cli.records import Effect
from slsgu_cli.store import Store
from slsgu_cli.tables import Column

if TYPE_CHECKING:
    from slsgu_cli.generation.albums import Album
    from slsgu_cli.generation.steering import SteerResult


def _percent(value: float) -> str:
    return f"{value:.1f}%"


def _change(value: float) -> str:
    return f"{value:+.1f}"


def generation(console: Console, found: Generation, album: "Album") -> None:
    """Print which prompts still give what they ask for, and the figures of a judge."""
    rows = [
        (
            prompt.prompt,
            prompt.label,
            len(found.seeds),
            prompt.before.percent if prompt.before else None,
            prompt.after.percent if prompt.after else None,
        )
        for prompt in found.prompts
    ]
    columns = (
        "prompt",
        Column("class"),
        "images",
        Column("original", shown=_percent),
        Column("unlearned", shown=_percent),
    )
    title = "images taken for the class" if found.judge else "generated"
    if console.as_json:
        console.table("generation", columns, rows, data=found)
    else:
        console.table("prompts", columns, rows, title=title)
    if found.before and found.after:
        effects(console, found.before, found.after)
    console.paths("sheets", [album.where("sheet.png"), album.where("sheet.html")])


def effects(console: Console, before: Effect, after: Effect) -> None:
    """Print unlearning and retained accuracy before and after."""
    rows = []
    for name, first, second, of in (
        ("UA", before.ua, after.ua, before.concept.total),
        ("IRA", before.ira, after.ira, before.others.total),
    ):
        change = None if first is None or second is None else second - first
        rows.append((name, first, second, change, of))
    columns = (
        "figure",
        Column("original", shown=_percent),
        Column("unlearned", shown=_percent),
        Column("change", shown=_change),
        "of",
    )
    title = "UA: images of the concept not taken for it. IRA: others taken for what they are"
    console.table("effect", columns, rows, title=title)


def steered(console: Console, store: Store, result: "SteerResult") -> None:
    """Print each layer's shortest sufficient step (else its last), and what was chosen.

    Where all that was tried was measured in full, it is every trial: the frontier of what
    is forgotten against what is kept.
    """
    trials, chosen = result.trials, result.chosen
    full = all(trial.others for trial in trials.trials)
    shown = trials.trials if full else _best(trials, chosen)
    rows = [
        (
            trial.layer,
            trials.importance[trial.layer],
            trial.step,
            100 * trial.share,
            100 - (trial.concept.percent or 0.0),
            trial.others.percent if trial.others else None,
            trial == chosen,
        )
        for trial in sorted(shown, key=lambda trial: (-trials.importance[trial.layer], trial.step))
    ]
    columns = (
        Column("layer", shown=known_as),
        "importance",
        "step",
        Column("move", shown=lambda share: f"{share:.3g}%"),
        Column("UA", shown=_percent),
        Column("IRA", shown=_percent),
        "chosen",
    )
    many = f"{len(trials.trials)} trials on {trials.target}"
    title = many if full else f"the best of {many}, by layer"
    data = {"trials": trials, "chosen": chosen, "forgotten": result.forgotten, "edit": result.edit}
    if console.as_json:
        console.table("search", columns, rows, data=data)
    else:
        console.table("trials", columns, rows, title=title)
    if trials.before is not None and chosen.others is not None:
        effects(console, trials.before, Effect(chosen.concept, chosen.others))
    console.paths("edit", [store.where(edit_path(result.edit))])
    if result.reused:
        console.note(f"{result.reused} recorded trials were used again")


def _best(trials: TargetTrials, chosen: TargetTrial) -> list[TargetTrial]:
    best: dict[str, TargetTrial] = {}
    for trial in trials.trials:
        own = best.get(trial.layer)
        if own is None or _order(trial, chosen, trials.goal) < _order(own, chosen, trials.goal):
            best[trial.layer] = trial
    return list(best.values())


def _order(trial: TargetTrial, chosen: TargetTrial, goal: float) -> tuple[bool, bool, float]:
    enough = 100 - (trial.concept.percent or 0.0) >= goal
    return trial != chosen, not enough, trial.step if enough else float(trial.concept.count)


def answer_set(console: Console, found: AnswerSet) -> None:
    """Print the figures of an UnlearnCanvas answer set."""
    figures = (("UA", found.ua), ("IRA", found.ira), ("CRA", found.cra))
    rows = [(name, share.percent, share.total) for name, share in figures if share]
    columns = ("figure", Column("unlearned", shown=_percent), "of")
    title = f"{found.images} images; forgetting the {found.domain} {found.concept}"
    console.table("answer set", columns, rows, title=title, data=found)


def answers(console: Console, found: Answers, album: "Album") -> None:
    """Print what was said about each image."""
    rows = [(a.image, a.question, a.before, a.after) for a in found.answers]
    columns = ("image", "question", Column("original"), Column("unlearned"))
    console.table("answers", columns, rows, data=found)
    console.paths("pictures", [album.where("answers.png"), album.where("answers.html")])
