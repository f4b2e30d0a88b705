"""`export`, `generate`, `ask`, search and comparison on a target; their results as tables."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import NEEDED, Session, command
from slsgu_cli.cli.usage import Asked
from slsgu_cli.errors import NotForgottenError, UsageError
from slsgu_cli.figures.numbers import interval, roughly
from slsgu_cli.records.comparison import PipelineCompareOptions, PipelineComparison
from slsgu_cli.records.figures import JudgeFigures, meets
from slsgu_cli.records.options import ExportRequest
from slsgu_cli.records.targets import (
    Answers,
    AnswerSet,
    AskRequest,
    CanvasRequest,
    GenerateRequest,
    Generation,
    Protocol,
    TargetSearchOptions,
    TargetTrial,
    TargetTrials,
)
from slsgu_cli.records.words import GENERATION, Option

if TYPE_CHECKING:
    from slsgu_cli.cli.console import Console
    from slsgu_cli.engine.export import ExportResult
    from slsgu_cli.store.store import Store
    from slsgu_cli.targets.output_folder import OutputFolder
    from slsgu_cli.targets.search import TargetSearchResult


# What each row of an effect has in JSON.
EFFECT = ("figure", "judge", "original", "unlearned", "change", "of", "95% interval")


def _change(value: float) -> str:
    return f"{value:+.1f}"


def show_generation(console: "Console", record: Generation, output: "OutputFolder") -> None:
    """Print which prompts still give what they ask for, and the figures of a judge."""
    from slsgu_cli.cli.console import Column

    rows = [
        (
            prompt.prompt,
            prompt.label,
            len(record.seeds),
            prompt.before.percent if prompt.before else None,
            prompt.after.percent if prompt.after else None,
        )
        for prompt in record.prompts
    ]
    columns = (
        "prompt",
        Column("class"),
        "images",
        Column("original", shown=roughly),
        Column("unlearned", shown=roughly),
    )
    title = "images taken for the class" if record.judge else "generated"
    if console.as_json:
        console.table("generation", columns, rows, data=record)
    else:
        console.table("prompts", columns, rows, title=title)
    show_effects(console, record.by_judge)
    console.paths("sheets", [output.where("sheet.png"), output.where("sheet.html")])


def show_effects(console: "Console", judged: Sequence[JudgeFigures]) -> None:
    """Print unlearning and retained accuracy before and after, by each judge."""
    from slsgu_cli.cli.console import Column

    rows: list[tuple[str | float | None, ...]] = []
    data: list[dict[str, object]] = []
    for by in judged:
        before, after = by.before, by.after
        for name, first, second, share in (
            ("UA", before.ua, after.ua, after.unlearned),
            ("IRA", before.ira, after.ira, after.others),
        ):
            change = None if first is None or second is None else second - first
            likely = interval(share) if share.total else None
            judge = (by.judge,) if len(judged) > 1 else ()
            cells = (first, second, change, share.total, likely)
            rows.append((name, *judge, *cells))
            data.append(dict(zip(EFFECT, (name, by.judge, *cells), strict=True)))
    columns: tuple[str | Column, ...] = (
        "figure",
        *([Column("judge")] if len(judged) > 1 else []),
        Column("original", shown=roughly),
        Column("unlearned", shown=roughly),
        Column("change", shown=_change),
        "of",
        Column("95% interval"),
    )
    title = "UA: images of the concept not taken for it. IRA: others taken for what they are"
    if rows:
        console.table("effect", columns, rows, title=title, data=data)


def show_exported(console: "Console", result: "ExportResult") -> None:
    """Print the ranks of the edits in a LoRA, and what it does at each strength."""
    from slsgu_cli.cli.console import Column

    edits = [(one.name, one.layer, one.rank, one.full_rank) for one in result.edits]
    columns = ("edit", Column("layer", shown=known_as), "rank", "of")
    console.table("edits", columns, edits, title="directions of each edit")
    rows = [(one.strength, one.name, one.forget.top1, one.forget.top5) for one in result.figures]
    figures = (Column("FA@1", shown=roughly), Column("FA@5", shown=roughly))
    console.table(
        "strengths",
        ("strength", "set", *figures),
        rows,
        title="at each strength, on images that chose nothing",
    )
    console.paths("files", list(result.files))


@command("export")
def export(session: Session, request: ExportRequest) -> None:
    """Example: slsgu export facebook --out facebook-lora.safetensors"""
    from slsgu_cli.engine.export import export as run

    show_exported(session.console, run(session.store, request))


def show_target_search(console: "Console", store: "Store", result: "TargetSearchResult") -> None:
    """Print what was chosen, and its figures on what nothing was chosen by.

    Trials are shown as well where they are not for a person to read, or with -v.
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
    things = "unseen images" if figures.unseen else "images, which the edit was chosen by"
    for by in figures.by_judge:
        judge = f"by {by.judge}, " if figures.further else ""
        console.note(f"{judge}{trials.name} is recognised in {by.after.concept.in_words(things)}")
    if figures.beside:
        console.note(f"all of it with {', '.join(figures.beside)} in place, the original too")
    console.paths("edit", [store.where(Artifact.EDIT.path(result.edit))])
    if result.reused:
        console.note(f"{result.reused} recorded trials were used again")


def _show_trials(console: "Console", result: "TargetSearchResult") -> None:
    """Print each layer's best trial, or where all were measured in full every trial."""
    from slsgu_cli.cli.console import Column

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
        Column("UA", shown=roughly),
        Column("IRA", shown=roughly),
        "chosen",
    )
    title = f"trials on {trials.target}, on the images to choose by"
    title = title if full else f"the best {title}, by layer"
    data = {"trials": trials, "chosen": chosen, "forgotten": result.forgotten, "edit": result.edit}
    if console.as_json:
        console.table("search", columns, rows, data=data | {"figures": result.figures})
    else:
        console.table("trials", columns, rows, title=title)


def _best(trials: TargetTrials, chosen: TargetTrial) -> list[TargetTrial]:
    best: dict[str, TargetTrial] = {}
    for trial in trials.trials:
        known = best.get(trial.layer)
        if known is None or _order(trial, chosen, trials.goal) < _order(known, chosen, trials.goal):
            best[trial.layer] = trial
    return list(best.values())


def _order(trial: TargetTrial, chosen: TargetTrial, goal: float) -> tuple[bool, bool, float]:
    enough = meets(goal, trial.concept)
    return trial != chosen, not enough, trial.step if enough else trial.concept.percent or 0.0


def show_answer_set(console: "Console", answer_set: AnswerSet) -> None:
    """Print the figures of an UnlearnCanvas answer set."""
    from slsgu_cli.cli.console import Column

    figures = (("UA", answer_set.ua), ("IRA", answer_set.ira), ("CRA", answer_set.cra))
    rows = [(name, share.percent, share.total) for name, share in figures if share]
    columns = ("figure", Column("unlearned", shown=roughly), "of")
    title = f"{answer_set.images} images; forgetting the {answer_set.domain} {answer_set.concept}"
    console.table("answer set", columns, rows, title=title, data=answer_set)


def show_answers(console: "Console", record: Answers, output: "OutputFolder") -> None:
    """Print what was said about each image."""
    from slsgu_cli.cli.console import Column

    rows = [(a.image, a.question, a.before, a.after) for a in record.answers]
    columns = ("image", "question", Column("original"), Column("unlearned"))
    console.table("answers", columns, rows, data=record)
    console.paths("pictures", [output.where("answers.png"), output.where("answers.html")])


def search_on_target(session: Session, names: Sequence[str], options: TargetSearchOptions) -> None:
    """Search each set on the target and print what is found.

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
    """Raise NotForgottenError where no step reached the goal."""
    if result.forgotten:
        return
    left = result.chosen.concept
    raise NotForgottenError(
        f"no step reaches the goal of {result.trials.goal:g}% on {result.trials.target} and costs "
        f"others at most {result.max_loss:g} points: the best leaves the concept recognised in "
        f"{left.count} of the {left.total} searched by",
        hint="the trials and this edit are kept; try more --steps, --top, another --layer or a "
        "larger --max-loss",
    )


@command("generate")
def generate(
    session: Session,
    request: Annotated[Asked[GenerateRequest], NEEDED],
    answer_set: Asked[CanvasRequest],
    protocol: Annotated[
        Protocol, Option(("--protocol",), "Own prompts, or a benchmark's answer set.", GENERATION)
    ] = Protocol.PROMPTS,
) -> None:
    """Both from the same prompts and seeds.

    Example: slsgu generate facebook --target stable-diffusion --prompt 'the facebook logo'
    """
    if protocol is Protocol.UNLEARNCANVAS:
        from slsgu_cli.targets import unlearn_canvas

        hint = "--themes FILE --objects FILE --out FOLDER, and no --prompt"
        request.refuse("for prompts of one's own", hint=hint, beside=[answer_set])
        if not all(field in answer_set for field in ("out", "themes", "objects")):
            raise UsageError(
                "--protocol unlearncanvas makes its own prompts and needs a place for the answers",
                hint=hint,
            )
        canvas = unlearn_canvas.answer_set(session.store, answer_set.record())
        show_answer_set(session.console, canvas)
        return
    from slsgu_cli.targets.generate import generate as run

    answer_set.refuse("for an answer set", hint="--protocol unlearncanvas", beside=[request])
    record, output = run(session.store, request.record())
    show_generation(session.console, record, output)


@command("ask")
def ask(session: Session, request: AskRequest) -> None:
    """Example: slsgu ask facebook --target llava-1.5-7b --image a.png --question 'What is it?'"""
    from slsgu_cli.targets.ask import ask as run

    record, output = run(session.store, request)
    show_answers(session.console, record, output)


def show_pipeline_comparison(
    console: "Console", comparison: PipelineComparison, sheet: str
) -> None:
    """Print a row for each method and learning rate."""
    from slsgu_cli.cli.console import Column
    from slsgu_cli.compare.registry import label_of

    columns: list[str | Column] = [
        Column("method", shown=label_of),
        Column("lr", shown=lambda rate: f"{rate:g}"),
        Column("iterations", on_terminal=False),
        Column("UA", shown=roughly),
        Column("IRA", shown=roughly),
        Column("distance", shown=lambda value: f"{value:.3f}"),
        Column("seconds", shown=lambda value: f"{value:.0f}", label="s"),
    ]
    rows = [
        (
            row.method,
            row.plan.rate if row.plan else None,
            row.plan.iterations if row.plan else None,
            row.effect.ua,
            row.effect.ira,
            row.distance,
            row.seconds,
        )
        for row in comparison.outcomes
    ]
    title = (
        f"forgetting {comparison.concept} on {comparison.target}: "
        f"{comparison.budget.concept} pictures of it, {comparison.budget.others} of other classes"
    )
    console.table("comparison", columns, rows, title=title, data=comparison)
    console.paths("sheets", [sheet])


def compare_on_pipeline(
    session: Session, names: Sequence[str], options: PipelineCompareOptions
) -> None:
    """Compare on one set by a pipeline's pictures, and print. Raises UsageError for several."""
    from slsgu_cli.compare.on_pipeline import compare_on_pipeline as run
    from slsgu_cli.compare.on_pipeline import sheet_path

    if len(names) > 1:
        raise UsageError("a pipeline is compared on one set at a time", hint="name one set")
    compared = run(session.store, names[0], options=options)
    sheet = session.store.where(sheet_path(names[0], options.target))
    show_pipeline_comparison(session.console, compared, sheet)
