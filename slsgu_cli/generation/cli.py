"""The commands that run models built on CLIP: each parses, calls one function and prints."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from slsgu_cli import options as opt
from slsgu_cli.app import app
from slsgu_cli.generation.records import Protocol
from slsgu_cli.session import Session, command

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
    from slsgu_cli.errors import UsageError
    from slsgu_cli.generation import show
    from slsgu_cli.generation.generate import GenerateRequest, judge_spec
    from slsgu_cli.generation.generate import generate as run
    from slsgu_cli.generation.records import PaintOptions

    numbers = None if seeds is None else opt.numbers("--seeds", seeds)
    judged = judge_spec(session.store, names[0], judge, judge_pretrained)
    if protocol is Protocol.UNLEARNCANVAS:
        from slsgu_cli.generation.unlearncanvas import PAINT, CanvasRequest, answer_set

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
        show.answer_set(session.console, answer_set(session.store, canvas))
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
    show.generation(session.console, record, album)


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
    from slsgu_cli.generation import show
    from slsgu_cli.generation.ask import QUESTIONS, AskRequest
    from slsgu_cli.generation.ask import ask as run

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
    show.answers(session.console, record, album)
