"""`generate` and `ask`, search on a target, and their results as tables."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli import options as opt
from slsgu_cli.cli.app import Session, app, command
from slsgu_cli.errors import UsageError
from slsgu_cli.figures.html import roughly
from slsgu_cli.records.method import Effect
from slsgu_cli.records.targets import (
    Answers,
    AnswerSet,
    Budget,
    Generation,
    Protocol,
    TargetTrial,
    TargetTrials,
)

if TYPE_CHECKING:
    from slsgu_cli.cli.console import Console
    from slsgu_cli.downstream.generate import OutputFolder
    from slsgu_cli.downstream.search import SteerResult
    from slsgu_cli.store.store import Store


def _change(value: float) -> str:
    return f"{value:+.1f}"


def show_generation(console: "Console", found: Generation, album: "OutputFolder") -> None:
    """Print which prompts still give what they ask for, and the figures of a judge."""
    from slsgu_cli.cli.console import Column

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
        Column("original", shown=roughly),
        Column("unlearned", shown=roughly),
    )
    title = "images taken for the class" if found.judge else "generated"
    if console.as_json:
        console.table("generation", columns, rows, data=found)
    else:
        console.table("prompts", columns, rows, title=title)
    if found.before and found.after:
        show_effects(console, found.before, found.after)
    console.paths("sheets", [album.where("sheet.png"), album.where("sheet.html")])


def show_effects(console: "Console", before: Effect, after: Effect) -> None:
    """Print unlearning and retained accuracy before and after."""
    from slsgu_cli.cli.console import Column

    rows = []
    for name, first, second, of in (
        ("UA", before.ua, after.ua, before.concept.total),
        ("IRA", before.ira, after.ira, before.others.total),
    ):
        change = None if first is None or second is None else second - first
        rows.append((name, first, second, change, of))
    columns = (
        "figure",
        Column("original", shown=roughly),
        Column("unlearned", shown=roughly),
        Column("change", shown=_change),
        "of",
    )
    title = "UA: images of the concept not taken for it. IRA: others taken for what they are"
    console.table("effect", columns, rows, title=title)


def show_steered(console: "Console", store: "Store", result: "SteerResult") -> None:
    """Print each layer's shortest sufficient step (else its last), and what was chosen.

    Where all that was tried was measured in full, it is every trial: the frontier of what
    is forgotten against what is kept.
    """
    from slsgu_cli.cli.console import Column
    from slsgu_cli.store.artifacts import Artifact

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
    many = f"{len(trials.trials)} trials on {trials.target}"
    title = many if full else f"the best of {many}, by layer"
    data = {"trials": trials, "chosen": chosen, "forgotten": result.forgotten, "edit": result.edit}
    if console.as_json:
        console.table("search", columns, rows, data=data)
    else:
        console.table("trials", columns, rows, title=title)
    if trials.before is not None and chosen.others is not None:
        show_effects(console, trials.before, Effect(chosen.concept, chosen.others))
    console.paths("edit", [store.where(Artifact.EDIT.path(result.edit))])
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


def show_answer_set(console: "Console", found: AnswerSet) -> None:
    """Print the figures of an UnlearnCanvas answer set."""
    from slsgu_cli.cli.console import Column

    figures = (("UA", found.ua), ("IRA", found.ira), ("CRA", found.cra))
    rows = [(name, share.percent, share.total) for name, share in figures if share]
    columns = ("figure", Column("unlearned", shown=roughly), "of")
    title = f"{found.images} images; forgetting the {found.domain} {found.concept}"
    console.table("answer set", columns, rows, title=title, data=found)


def show_answers(console: "Console", found: Answers, album: "OutputFolder") -> None:
    """Print what was said about each image."""
    from slsgu_cli.cli.console import Column

    rows = [(a.image, a.question, a.before, a.after) for a in found.answers]
    columns = ("image", "question", Column("original"), Column("unlearned"))
    console.table("answers", columns, rows, data=found)
    console.paths("pictures", [album.where("answers.png"), album.where("answers.html")])


def search_on_target(
    session: Session,
    names: Sequence[str],
    target: Path | None,
    *,
    budget: Budget,
    judge: tuple[str | None, str | None],
    **options: Any,
) -> None:
    """Search each set on the target and print what is found; `options` are SteerOptions'.

    Raises NotForgottenError, after all of them, for the first that misses its goal.
    """
    from slsgu_cli.downstream.generate import judge_spec
    from slsgu_cli.downstream.search import SteerOptions, require_reached, search_target

    if target is None:
        raise UsageError(
            "--target and --steer-target go together",
            hint="`slsgu rank NAME --target` first, and no --target here, steers on CLIP",
        )
    results = []
    for name in names:
        chosen = judge_spec(session.store, name, *judge)
        steer = SteerOptions(target=target, budget=budget, judge=chosen, **options)
        results.append(search_target(session.store, name, options=steer))
        show_steered(session.console, session.store, results[-1])
    for result in results:
        require_reached(result)


Names = Annotated[list[str], typer.Argument(metavar="NAME|EDIT...", help="Sets, or edit files.")]
TargetFolder = Annotated[
    Path, typer.Option("--target", "-t", help="Folder of the model that is built on CLIP.")
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder for the results. Default: the store.")
]


@command(app, "generate")
def generate(
    session: Session,
    names: Names,
    target: TargetFolder,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What to generate; repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="File of prompts, one a line, or prompt<TAB>class."),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", help="Seeds of the noise: 0-3, or 188,288. Default: 0-3."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", "--denoise", min=1, help="Denoising steps. Default: 25."),
    ] = None,
    guidance: opt.Guidance = None,
    judge: opt.Judge = None,
    judge_pretrained: opt.JudgePretrained = None,
    classes: Annotated[
        str | None,
        typer.Option("--classes", help="File of class names. Default: the set's own classes."),
    ] = None,
    templates: Annotated[
        str | None, typer.Option("--templates", help="File of prompts for these classes.")
    ] = None,
    protocol: Annotated[
        Protocol, typer.Option("--protocol", help="Own prompts, or a benchmark's answer set.")
    ] = Protocol.PROMPTS,
    themes: Annotated[
        str | None, typer.Option("--themes", help="File of themes, for unlearncanvas.")
    ] = None,
    objects: Annotated[
        str | None, typer.Option("--objects", help="File of objects, for unlearncanvas.")
    ] = None,
    out: Out = None,
    device: opt.Device = "auto",
) -> None:
    """Generate images before and after an edit.

    Both from the same prompts and seeds.

    Example: slsgu generate facebook --target stable-diffusion --prompt 'the facebook logo'
    """
    from slsgu_cli.downstream.generate import GenerateRequest, judge_spec
    from slsgu_cli.downstream.generate import generate as run
    from slsgu_cli.errors import UsageError
    from slsgu_cli.records.targets import PaintOptions

    numbers = None if seeds is None else opt.numbers("--seeds", seeds)
    judged = judge_spec(session.store, names[0], judge, judge_pretrained)
    if protocol is Protocol.UNLEARNCANVAS:
        from slsgu_cli.downstream.image_sets import PAINT, CanvasRequest, answer_set

        if out is None or themes is None or objects is None or prompt or prompts:
            raise UsageError(
                "--protocol unlearncanvas makes its own prompts and needs a place for the answers",
                hint="--themes FILE --objects FILE --out FOLDER, and no --prompt",
            )
        paint = replace(PAINT, **opt.given(steps=steps, guidance=guidance))
        canvas = CanvasRequest(
            names=names,
            target=target,
            out=out,
            themes=themes,
            objects=objects,
            judge=judged,
            paint=paint,
            device=device,
            **opt.given(seeds=numbers),
        )
        show_answer_set(session.console, answer_set(session.store, canvas))
        return
    record, album = run(
        session.store,
        GenerateRequest(
            names=names,
            target=target,
            prompts=prompt or (),
            prompt_file=prompts,
            paint=PaintOptions(**opt.given(steps=steps, guidance=guidance)),
            judge=judged,
            classes=classes,
            templates=templates,
            out=out,
            device=device,
            **opt.given(seeds=numbers),
        ),
    )
    show_generation(session.console, record, album)


@command(app, "ask")
def ask(
    session: Session,
    names: Names,
    target: TargetFolder,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="Image to ask about; repeatable. Default: from the set."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Images of the concept, without --image.")
    ] = 3,
    question: Annotated[
        list[str] | None, typer.Option("--question", help="What to ask; repeatable.")
    ] = None,
    out: Out = None,
    device: opt.Device = "auto",
) -> None:
    """Ask a LLaVA about images before and after an edit.

    Example: slsgu ask facebook --target llava-1.5-7b-hf --image logo.png --question 'What is it?'
    """
    from slsgu_cli.downstream.ask import QUESTIONS, AskRequest
    from slsgu_cli.downstream.ask import ask as run

    record, album = run(
        session.store,
        AskRequest(
            names=names,
            target=target,
            images=image or (),
            samples=samples,
            questions=question or QUESTIONS,
            out=out,
            device=device,
        ),
    )
    show_answers(session.console, record, album)
