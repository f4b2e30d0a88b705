"""The command `compare`."""

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from slsgu_cli import options as opt
from slsgu_cli.app import app
from slsgu_cli.baselines.records import Method
from slsgu_cli.errors import UsageError
from slsgu_cli.session import Session, command

AUTO = "auto"
ON_PIPELINE = "On a diffusion pipeline"
Chosen = TypeVar("Chosen", bound=StrEnum)


@command(app, "compare")
def compare(
    session: Session,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Sets to compare on.")],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            help="Of ft, ga, gaft, salun, ssd, ours; on a pipeline esd, salun, ours. Default: all.",
        ),
    ] = None,
    rates: Annotated[
        list[str] | None,
        typer.Option(
            "--lr",
            help="Learning rates, or auto. Default: the papers': 1e-6,1e-7; on a pipeline 1e-5.",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Epochs of a baseline. Default: 10.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=2, help="Pairs in a mini-batch. Default: 32."),
    ] = None,
    retain_rows: Annotated[
        int | None,
        typer.Option("--retain-rows", min=2, help="Train on this many retain rows at most."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            help="Of the order of retain rows (default 0); of a pipeline's pictures (1000).",
        ),
    ] = None,
    device: opt.Device = "auto",
    target: Annotated[
        Path | None,
        typer.Option(
            "--target",
            "-t",
            help="Folder of a diffusion pipeline to compare on.",
            rich_help_panel=ON_PIPELINE,
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations",
            min=1,
            help="Updates of a trained method. Default: 1000.",
            rich_help_panel=ON_PIPELINE,
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            min=1,
            help="Pictures of the concept. Default: 20.",
            rich_help_panel=ON_PIPELINE,
        ),
    ] = None,
    others: Annotated[
        int | None,
        typer.Option(
            "--others",
            min=2,
            help="Pictures of other classes. Default: 40.",
            rich_help_panel=ON_PIPELINE,
        ),
    ] = None,
    denoise: Annotated[
        int | None,
        typer.Option(
            "--denoise",
            min=1,
            help="Denoising steps of a picture. Default: 20.",
            rich_help_panel=ON_PIPELINE,
        ),
    ] = None,
    guidance: opt.Guidance = None,
    judge: opt.Judge = None,
    judge_pretrained: opt.JudgePretrained = None,
) -> None:
    """Compare with other unlearning methods (the paper's Table 1).

    With --target, ESD-x, SalUn and the edit that was steered on that pipeline are compared
    by the pictures it makes (its Figure 4).

    Example: slsgu compare facebook --lr auto --retain-rows 256
    """
    of_table = opt.given(epochs=epochs, batch_size=batch_size, retain_rows=retain_rows)
    of_pipeline = {
        "--iterations": iterations, "--images": images, "--others": others, "--denoise": denoise,
        "--guidance": guidance, "--judge": judge, "--judge-pretrained": judge_pretrained,
    }  # fmt: skip
    if target is not None:
        if of_table:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in of_table)
            raise UsageError(f"{given} is for comparing without --target", hint="--iterations N")
        _on_pipeline(
            session, names, target, methods, rates, iterations=iterations, device=device,
            budget=opt.given(concept=images, others=others, seed=seed),
            paint=opt.given(steps=denoise, guidance=guidance), judge=(judge, judge_pretrained),
        )  # fmt: skip
        return
    if meant := [option for option, value in of_pipeline.items() if value is not None]:
        raise UsageError(f"{', '.join(meant)} is for a diffusion pipeline", hint="--target FOLDER")
    from slsgu_cli.baselines import show
    from slsgu_cli.baselines.compare import PAPER_RATES, CompareOptions
    from slsgu_cli.baselines.compare import compare as run
    from slsgu_cli.baselines.table import mean_rows
    from slsgu_cli.layout import joint_label, plot_path

    names = list(dict.fromkeys(names))
    options = CompareOptions(
        methods=_methods(methods, Method),
        rates=_rates(rates) if rates else PAPER_RATES,
        device=device,
        **of_table,
        **opt.given(seed=seed),
    )
    compared = run(session.store, names, options=options)
    rows = mean_rows(compared.concepts, compared.chosen)
    path = plot_path(joint_label(names), "comparison")
    title = f"forgetting {', '.join(names)}"
    session.store.write_bytes(path, show.comparison_plot(rows, title=title))
    show.comparison(session.console, rows, names, session.store.where(path))


def _on_pipeline(
    session: Session,
    names: Sequence[str],
    target: Path,
    methods: list[str] | None,
    rates: list[str] | None,
    *,
    iterations: int | None,
    budget: dict[str, Any],
    paint: dict[str, Any],
    judge: tuple[str | None, str | None],
    device: str,
) -> None:
    """Compare on one set by a pipeline's pictures, and print. Raises UsageError for several."""
    from slsgu_cli.erasing import show
    from slsgu_cli.erasing.compare import PAPER_RATES, SEED, CompareOptions, compare, sheet_path
    from slsgu_cli.erasing.records import Method
    from slsgu_cli.generation.generate import judge_spec
    from slsgu_cli.generation.records import Budget, PaintOptions

    if len(set(names)) > 1:
        raise UsageError("a pipeline is compared on one set at a time", hint="name one set")
    found = _rates(rates) if rates else PAPER_RATES
    if found is None:
        raise UsageError("--lr auto is for comparing without --target", hint="--lr 1e-5,1e-4")
    options = CompareOptions(
        target=target,
        methods=_methods(methods, Method),
        rates=found,
        budget=Budget(**{"seed": SEED, **budget}, paint=PaintOptions(**{"steps": 20, **paint})),
        judge=judge_spec(session.store, names[0], *judge),
        device=device,
        **opt.given(iterations=iterations),
    )
    compared = compare(session.store, names[0], options=options)
    show.comparison(session.console, compared, session.store.where(sheet_path(names[0], target)))


def _methods(values: list[str] | None, kinds: type[Chosen]) -> list[Chosen]:
    """Return the methods named, with the original model. Raises UsageError."""
    every = list(kinds)
    if not values:
        return every
    known = {str(method): method for method in every}
    named = _listed(values)
    for name in named:
        if name not in known:
            raise UsageError(
                f"--methods {name} is no method", hint=f"one or more of {', '.join(known)}"
            )
    return [known[Method.ORIGINAL], *(known[name] for name in named)]


def _rates(values: list[str]) -> list[float] | None:
    """Return the learning rates given, None for `auto`. Raises UsageError."""
    words = _listed(values)
    if words == [AUTO]:
        return None
    rates = []
    for word in words:
        try:
            rate = float(word)
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            raise UsageError(
                f"--lr {word} is no learning rate", hint="--lr 1e-6,1e-7, or --lr auto alone"
            )
        rates.append(rate)
    return list(dict.fromkeys(rates))


def _listed(values: list[str]) -> list[str]:
    """Return the words of a repeatable option that also takes commas."""
    return [word.strip().lower() for text in values for word in text.split(",") if word.strip()]
