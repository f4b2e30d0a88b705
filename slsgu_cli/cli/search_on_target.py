"""The command `search --target`."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import Session
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.generate import show_effects
from slsgu_cli.errors import NotForgottenError
from slsgu_cli.figures.numbers import roughly
from slsgu_cli.records.targets import TargetSearchOptions

if TYPE_CHECKING:
    from slsgu_cli.store.store import Store
    from slsgu_cli.targets.search import TargetSearchResult


def search_on_target(session: Session, names: Sequence[str], options: TargetSearchOptions) -> None:
    """Search each set on the target and print the result.

    Raises NotForgottenError, after all of them, for the first that misses its goal.
    """
    from slsgu_cli.targets.search import search_target

    results = []
    for name in names:
        results.append(search_target(session.store, name, options=options))
        with session.console.part("sets") if len(names) > 1 else nullcontext():
            show_target_search(session.console, session.store, results[-1])
    for result in results:
        require_reached(result)


def require_reached(result: "TargetSearchResult") -> None:
    """Raise NotForgottenError if no step reached the goal."""
    if result.forgotten:
        return
    left = result.chosen.concept
    raise NotForgottenError(
        f"no step reaches the goal of {result.trials.goal:g}% on {result.trials.target} while "
        f"costing other classes at most {result.max_loss:g} points: after the best step, "
        f"{left.count} of {left.total} validation images still show the concept",
        hint="the trials and this edit are stored; try more --steps or --top, another --layer or a "
        "larger --max-loss",
    )


def show_target_search(console: Console, store: "Store", result: "TargetSearchResult") -> None:
    """Print the chosen trial and its figures on the test split.

    Trials are printed too, except on a terminal without -v.
    """
    from slsgu_cli.store.artifacts import Artifact

    trials, chosen, figures = result.trials, result.chosen, result.figures
    if console.as_json or not console.brief:
        _show_trials(console, result)
    console.value(
        "chosen",
        f"chosen\t{chosen.layer}\t{chosen.step:.10g}",
        data=chosen,
        shown=f"\nchosen of {len(trials.trials)} trials on {trials.target}: {chosen.layer} at step "
        f"{chosen.step:.4g}, a move by {100 * chosen.share:.1f}% of the layer's norm",
    )
    show_effects(console, figures.by_judge)
    things = "test images" if figures.is_test else "images, which also selected the edit"
    for by in figures.by_judge:
        judge = f"by {by.judge}, " if figures.further else ""
        console.note(f"{judge}{trials.name} is recognised in {by.after.concept.in_words(things)}")
    if figures.applied:
        console.note(
            f"all figures, also of the original, are with {', '.join(figures.applied)} applied"
        )
    console.paths("edit", [store.where(Artifact.EDIT.path(result.edit))])
    if result.reused:
        console.note(f"{result.reused} recorded trials were reused")


def _show_trials(console: Console, result: "TargetSearchResult") -> None:
    trials, chosen = result.trials, result.chosen
    rows = sorted(trials.trials, key=lambda trial: (-trials.importance[trial.layer], trial.step))
    columns = (
        Column("layer", shown=known_as),
        Column("importance", lambda trial: trials.importance[trial.layer]),
        "step",
        Column("move", lambda trial: 100 * trial.share, shown=lambda share: f"{share:.3g}%"),
        Column("UA", lambda trial: 100 - (trial.concept.percent or 0.0), shown=roughly),
        Column("IRA", lambda trial: trial.others and trial.others.percent, shown=roughly),
        Column("chosen", lambda trial: trial == chosen),
    )
    title = f"trials on {trials.target}, on the validation split"
    data = {"trials": trials, "chosen": chosen, "forgotten": result.forgotten, "edit": result.edit}
    if console.as_json:
        console.table("search", columns, rows, data=data | {"figures": result.figures})
    else:
        console.table("trials", columns, rows, title=title)
