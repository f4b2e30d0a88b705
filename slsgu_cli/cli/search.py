"""The command `search`."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Annotated

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import Names, Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.evaluate import Figures, recognised, show_before_after
from slsgu_cli.cli.formats import SIGNED, STEP, direction_format
from slsgu_cli.cli.usage import ParsedOptions
from slsgu_cli.errors import NotForgottenError, UsageError
from slsgu_cli.figures.numbers import percent, roughly
from slsgu_cli.records.figures import Report
from slsgu_cli.records.method import Trial
from slsgu_cli.records.option_fields import SEARCH, Option
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.targets import TargetSearchOptions

if TYPE_CHECKING:
    from slsgu_cli.engine.search import SearchResult
    from slsgu_cli.store.store import Store


# Warn if an edit costs more points of accuracy than this on an evaluation set.
COSTLY = 5.0
# Number of harmed classes, and of classes with near names, on a terminal without -v.
HARM_SHOWN = 5


@command("search")
def search(
    session: Session,
    names: Names,
    options: ParsedOptions[SearchOptions],
    on_target: ParsedOptions[TargetSearchOptions],
    joint: Annotated[
        bool, Option(("--joint",), "Search for edits that forget all sets jointly.", SEARCH)
    ] = False,
) -> None:
    """Several sets are searched one after another, or jointly with --joint. With --target, trials
    are measured on the images or answers of a model built on CLIP.

    Example: slsgu search facebook --criterion fa5
    """
    if "target" in on_target:
        from slsgu_cli.cli.search_on_target import search_on_target
        from slsgu_cli.processes import refuse_several

        refuse_several("search --target")
        if joint:
            raise UsageError("--joint is for a search on CLIP", hint="remove --target")
        options.refuse("for a search on CLIP", hint="remove --target", shared=[on_target])
        search_on_target(session, names, on_target.record())
        return
    from slsgu_cli.cli.search_jointly import search_jointly

    on_target.refuse(
        "for a search on a model built on CLIP",
        hint="slsgu search NAME --target FOLDER",
        shared=[options],
    )
    run = search_jointly if joint else search_sets
    run(session, names, options.record())


def search_sets(session: Session, names: Sequence[str], options: SearchOptions) -> None:
    """Search sets one after another, then raise NotForgottenError if any was not forgotten."""
    from slsgu_cli.engine.plots import draw_steps
    from slsgu_cli.engine.search import require_forgotten, search_each

    store, console = session.store, session.console
    several = len(names) > 1
    failed: list[NotForgottenError] = []
    for result in search_each(store, names, options=options):
        name = result.trials.name
        draw_steps(store, result)
        with console.part("sets") if several else nullcontext():
            if several:
                console.value("set", f"set\t{name}", data=name, shown=f"\n{name}")
            show_search(console, store, result)
        try:
            require_forgotten(result)
        except NotForgottenError as error:
            failed.append(error)
    if failed:
        message = "; ".join(error.message for error in failed)
        raise NotForgottenError(message, hint=failed[0].hint)


def show_search(
    console: Console, store: "Store", result: "SearchResult", *, brief: bool = False
) -> None:
    """Print the chosen trial, its accuracy on the test split, and the harmed classes.

    Trials are printed too, except on a terminal without -v. If `brief`, print the choice only.
    """
    from slsgu_cli.store.artifacts import Artifact

    trials, chosen = result.trials, result.chosen
    sets = sorted(trials.baseline_utility)
    along = {trial.direction for trial in trials.trials}
    columns = (
        Column("layer", shown=known_as),
        Column("direction", shown=direction_format(along), on_terminal=len(along) > 1),
        Column("step", shown=STEP),
        Column("% of norm", lambda trial: 100 * trial.share, shown=roughly, label="move"),
        Column("FA@1", "forget.top1", shown=roughly),
        Column("FA@5", "forget.top5", shown=roughly),
        *(
            Column(f"TA@1 {name}", partial(_utility, name), shown=roughly, label=f"TA@1\n{name}")
            for name in sets
        ),
        Column("chosen", lambda trial: trial == chosen),
    )
    rows = sorted(
        trials.trials, key=lambda t: (t.tower != "vision", t.layer, t.direction.order, t.step)
    )
    title = f"trials for {trials.name}, on the validation split"
    if console.as_json or not (brief or console.brief):
        console.table("trials", columns, rows, title=title, data=trials)
    console.value(
        "chosen",
        f"chosen\t{chosen.layer}\t{chosen.step:.10g}",
        data=chosen,
        shown=f"\nchosen of {len(trials.trials)} trials: {chosen.layer} at step "
        f"{STEP(chosen.step)}, a move by {100 * chosen.share:.1f}% of the layer's norm "
        f"along {chosen.direction.words}",
    )
    if not brief:
        show_before_after(console, chosen_figures(result))
        show_earlier(console, result.report)
        show_harm(console, result.report)
    files = (Artifact.EDIT, Artifact.TRIALS)
    console.paths("files", [store.where(kind.path(trials.name)) for kind in files])
    if result.reused:
        console.note(f"{result.reused} recorded trials were reused")
    before, after, base_edits = result.report.before, result.report.after, result.report.base_edits
    if before.forget.top1 < 20:
        console.warn(
            f"the original model recognises {trials.name} in only "
            f"{before.forget.top1:.0f}% of its {before.forget.measured_on}: there is little to "
            "forget"
        )
    for name, was in sorted((base_edits.figures if base_edits else before).utility.items()):
        lost = was.top1 - after.utility[name].top1
        if lost > COSTLY:
            console.warn(
                f"the edit costs {lost:.1f} points of top-1 accuracy on {name}: "
                "try other layers, or --criterion fa1"
            )


def _utility(name: str, trial: Trial) -> float | None:
    return trial.utility[name].top1 if trial.utility else None


def chosen_figures(result: "SearchResult") -> Figures:
    """Return test accuracy of the original model, of earlier edits if any, and of the edit."""
    report = result.report
    models = {"original": report.before, "edited": report.after}
    if report.base_edits is not None:
        models = {
            "original": report.before,
            "before": report.base_edits.figures,
            "after": report.after,
        }
    return {label: ({"": figures.forget}, figures.utility) for label, figures in models.items()}


def show_earlier(console: Console, report: Report) -> None:
    """Print how well the concepts of earlier edits are recognised, if there are any."""
    if report.base_edits is None:
        return
    figures = [(k, when) for k in (1, 5) for when in ("original", "before", "after")]
    rows = [
        (name, *(getattr(getattr(edit, when), f"top{k}") for k, when in figures))
        for name, edit in report.base_edits.edits.items()
    ]
    columns = (
        Column("edit"),
        *(Column(f"FA@{k} {when}", shown=percent, label=f"FA@{k}\n{when}") for k, when in figures),
    )
    title = "concepts of earlier edits"
    console.table("earlier", columns, rows, title=title, data=report.base_edits)
    for name, edit in report.base_edits.edits.items():
        console.note(recognised(name, edit.after))


def show_harm(console: Console, report: Report) -> None:
    """Print the most harmed classes, and the classes with the nearest names."""
    columns = (
        Column("class", "name"),
        Column("images", "rows"),
        Column("original", "before", shown=percent),
        Column("edited", "after", shown=percent),
        Column("change", lambda loss: 0.0 - loss.lost, shown=SIGNED),
    )
    for key, losses, title in (
        ("words", report.words, "words of the concept, FA@1"),
        ("harmed", report.harmed, "most harmed classes, TA@1"),
        ("nearest", report.nearest, "classes with the nearest names, TA@1"),
    ):
        if key == "words" and not losses:
            continue
        shown = losses[:HARM_SHOWN] if console.brief else losses
        console.table(key, columns, shown, title=title, data=list(losses))
