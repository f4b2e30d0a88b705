"""The commands `generate` and `ask`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from slsgu_cli.cli.app import NEEDED, Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.usage import ParsedOptions
from slsgu_cli.figures.numbers import interval, roughly
from slsgu_cli.records.figures import JudgeFigures
from slsgu_cli.records.option_fields import GENERATION, Option
from slsgu_cli.records.targets import (
    Answers,
    AnswerSet,
    AskRequest,
    CanvasRequest,
    GenerateRequest,
    Generation,
    Protocol,
)

if TYPE_CHECKING:
    from slsgu_cli.targets.output_folder import OutputFolder


# The keys of a row of an effect in JSON.
EFFECT = ("figure", "judge", "original", "unlearned", "change", "of", "95% interval")


@command("generate")
def generate(
    session: Session,
    request: Annotated[ParsedOptions[GenerateRequest], NEEDED],
    answer_set: ParsedOptions[CanvasRequest],
    protocol: Annotated[
        Protocol,
        Option(
            ("--protocol",),
            "Use your own prompts, or generate the answer set of a benchmark.",
            GENERATION,
        ),
    ] = Protocol.PROMPTS,
) -> None:
    """Both models use the same prompts and seeds.

    Example: slsgu generate facebook --target stable-diffusion --prompt 'the facebook logo'
    """
    if protocol is Protocol.UNLEARNCANVAS:
        from slsgu_cli.targets import unlearn_canvas

        hint = "--themes FILE --objects FILE --out FOLDER, and no --prompt"
        request.refuse("for --protocol prompts", hint=hint, shared=[answer_set])
        canvas = unlearn_canvas.answer_set(session.store, answer_set.record())
        show_answer_set(session.console, canvas)
        return
    from slsgu_cli.targets.generate import generate as run

    answer_set.refuse("for an answer set", hint="--protocol unlearncanvas", shared=[request])
    record, output = run(session.store, request.record())
    show_generation(session.console, record, output)


def show_generation(console: Console, record: Generation, output: "OutputFolder") -> None:
    """Print which prompts still generate their class, and the figures of each judge."""
    columns = (
        "prompt",
        Column("class", "label"),
        Column("images", lambda _: len(record.seeds)),
        Column("original", lambda each: each.before and each.before.percent, shown=roughly),
        Column("unlearned", lambda each: each.after and each.after.percent, shown=roughly),
    )
    title = "images classified as the class" if record.judge else "generated"
    if console.as_json:
        console.table("generation", columns, record.prompts, data=record)
    else:
        console.table("prompts", columns, record.prompts, title=title)
    show_effects(console, record.by_judge)
    console.paths("sheets", [output.where("sheet.png"), output.where("sheet.html")])


def show_effects(console: Console, judged: Sequence[JudgeFigures]) -> None:
    """Print unlearning and retained accuracy before and after, for each judge."""
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
        Column("change", shown=lambda value: f"{value:+.1f}"),
        "of",
        Column("95% interval"),
    )
    title = "UA: images of the concept not recognised as it. IRA: other images recognised"
    if rows:
        console.table("effect", columns, rows, title=title, data=data)


def show_answer_set(console: Console, answer_set: AnswerSet) -> None:
    """Print the figures of an UnlearnCanvas answer set."""
    figures = (("UA", answer_set.ua), ("IRA", answer_set.ira), ("CRA", answer_set.cra))
    rows = [(name, share.percent, share.total) for name, share in figures if share]
    columns = ("figure", Column("unlearned", shown=roughly), "of")
    title = f"{answer_set.images} images; forgetting the {answer_set.domain} {answer_set.concept}"
    console.table("answer set", columns, rows, title=title, data=answer_set)


@command("ask")
def ask(session: Session, request: AskRequest) -> None:
    """Example: slsgu ask facebook --target llava-1.5-7b --image a.png --question 'What is it?'"""
    from slsgu_cli.targets.ask import ask as run

    record, output = run(session.store, request)
    show_answers(session.console, record, output)


def show_answers(console: Console, record: Answers, output: "OutputFolder") -> None:
    """Print the answers about each image."""
    columns = ("image", "question", Column("original", "before"), Column("unlearned", "after"))
    console.table("answers", columns, record.answers, data=record)
    console.paths("pictures", [output.where("answers.png"), output.where("answers.html")])
