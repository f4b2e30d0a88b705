"""`compare` and its tables."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slsgu_cli.cli import options as opt
from slsgu_cli.cli.app import Session, app, command
from slsgu_cli.errors import UsageError
from slsgu_cli.figures.html import roughly
from slsgu_cli.records.studies import (
    CLIP_METHODS,
    PIPELINE_METHODS,
    Method,
    PipelineComparison,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from slsgu_cli.cli.console import Column, Console
    from slsgu_cli.compare.table import TableRow


def show_comparison(
    console: "Console", rows: "Sequence[TableRow]", names: Sequence[str], plot: str
) -> None:
    """Print a row for each method and setting, and say which baselines beat ours."""
    from slsgu_cli.cli.console import Column
    from slsgu_cli.compare.table import LABELS, better

    sets = sorted(rows[0].utility)

    def figure(name: str, label: str) -> "Column":
        return Column(name, shown=lambda value: f"{value:.1f}", label=label)

    columns: list[str | Column] = [
        Column("method", shown=lambda method: LABELS[method]),
        "setting",
        Column("lr", on_terminal=False),
        Column("alpha", on_terminal=False),
        Column("epoch", on_terminal=False),
        figure("FA@1", "FA@1"),
        figure("FA@5", "FA@5"),
        *(figure(f"TA@1 {name}", f"TA@1\n{name}") for name in sets),
        *(Column(f"TA@5 {name}", on_terminal=False) for name in sets),
        Column("seconds", shown=lambda value: f"{value:.0f}", label="s"),
        figure("forget passes", "passes\nforget"),
        figure("retain passes", "passes\nretain"),
        Column("chosen", on_terminal=False),
    ]
    table = [
        (
            row.method,
            row.words + "*" * (row.chosen and len(names) == 1),
            None if row.method is Method.SSD else row.setting,
            row.setting if row.method is Method.SSD else None,
            row.epoch,
            row.forget.top1,
            row.forget.top5,
            *(row.utility[name].top1 for name in sets),
            *(row.utility[name].top5 for name in sets),
            row.seconds,
            row.forget_passes,
            row.retain_passes,
            row.chosen,
        )
        for row in rows
    ]
    several = f", mean of {len(names)} concepts" if len(names) > 1 else ""
    title = f"forgetting {', '.join(names)}{several}"
    console.table("comparison", columns, table, title=title)
    if any(row.chosen for row in rows) and len(names) == 1:
        console.note("* the setting of the best trade-off between 100 - FA@1 and mean TA@1")
    for row in better(rows):
        console.warn(
            f"{LABELS[row.method]} ({row.words}) beats ours here: FA@1 {row.forget.top1:.2f} "
            f"and mean TA@1 {row.kept:.2f}"
        )
    console.paths("plots", [plot])


def comparison_plot(rows: "Sequence[TableRow]", *, title: str) -> bytes:
    """Draw utility against forgetting, a mark for each method and setting.

    The best methods stand at the top right.
    """
    from slsgu_cli.figures.curves import INK, MUTED, TITLE, blank, dress, plain, png

    figure = blank(8.0, 4.8, layout="constrained")
    axes = figure.add_subplot()
    dress(axes)
    for row in rows:
        _mark(axes, row)
    for row in rows:
        if row.method is Method.ORIGINAL:
            axes.axhline(row.kept, color=MUTED, linewidth=0.9, linestyle=":")
    axes.set_xlim(-3, 103)
    axes.set_ylim(top=102)
    axes.set_xlabel("forgetting: 100 - FA@1 (more is better)", color=INK)
    axes.set_ylabel("utility: mean TA@1, % (more is better)", color=INK)
    axes.set_title(plain(title, 70), loc="left", **TITLE)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return png(figure)


def _mark(axes: "Axes", row: "TableRow") -> None:
    from slsgu_cli.compare.table import LABELS
    from slsgu_cli.figures.curves import INK, MARKERS, SERIES

    index = list(Method).index(row.method)
    ours = row.method is Method.OURS
    setting = f" {row.words}" if row.words else ""
    axes.scatter(
        100 - row.forget.top1,
        row.kept,
        marker="*" if ours else MARKERS[index],
        s=220 if ours else 70,
        color=INK if row.method is Method.ORIGINAL else SERIES[index % len(SERIES)],
        edgecolor="black" if row.chosen else "white",
        linewidths=0.9,
        zorder=4 if ours else 3,
        clip_on=False,
        label=f"{LABELS[row.method]}{setting}",
    )


def show_pipeline_comparison(console: "Console", found: PipelineComparison, sheet: str) -> None:
    """Print a row for each method and learning rate."""
    from slsgu_cli.cli.console import Column
    from slsgu_cli.compare.table import LABELS

    columns: list[str | Column] = [
        Column("method", shown=lambda method: LABELS[method]),
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
        for row in found.outcomes
    ]
    title = (
        f"forgetting {found.concept} on {found.target}: {found.budget.concept} pictures of it, "
        f"{found.budget.others} of other classes"
    )
    console.table("comparison", columns, rows, title=title, data=found)
    console.paths("sheets", [sheet])


AUTO = "auto"
ON_PIPELINE = "On a diffusion pipeline"


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
    from slsgu_cli.compare.run import PAPER_RATES, CompareOptions
    from slsgu_cli.compare.run import compare as run
    from slsgu_cli.compare.table import mean_rows
    from slsgu_cli.store.artifacts import joint_label, plot_path

    names = list(dict.fromkeys(names))
    options = CompareOptions(
        methods=_methods(methods, CLIP_METHODS),
        rates=_rates(rates) if rates else PAPER_RATES,
        device=device,
        **of_table,
        **opt.given(seed=seed),
    )
    compared = run(session.store, names, options=options)
    rows = mean_rows(compared.concepts, compared.chosen)
    path = plot_path(joint_label(names), "comparison")
    title = f"forgetting {', '.join(names)}"
    session.store.write_bytes(path, comparison_plot(rows, title=title))
    show_comparison(session.console, rows, names, session.store.where(path))


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
    from slsgu_cli.compare.on_pipeline import (
        PAPER_RATES,
        SEED,
        PipelineCompareOptions,
        compare_on_pipeline,
        sheet_path,
    )
    from slsgu_cli.downstream.generate import judge_spec
    from slsgu_cli.records.targets import Budget, PaintOptions

    if len(set(names)) > 1:
        raise UsageError("a pipeline is compared on one set at a time", hint="name one set")
    found = _rates(rates) if rates else PAPER_RATES
    if found is None:
        raise UsageError("--lr auto is for comparing without --target", hint="--lr 1e-5,1e-4")
    options = PipelineCompareOptions(
        target=target,
        methods=_methods(methods, PIPELINE_METHODS),
        rates=found,
        budget=Budget(**{"seed": SEED, **budget}, paint=PaintOptions(**{"steps": 20, **paint})),
        judge=judge_spec(session.store, names[0], *judge),
        device=device,
        **opt.given(iterations=iterations),
    )
    compared = compare_on_pipeline(session.store, names[0], options=options)
    show_pipeline_comparison(
        session.console, compared, session.store.where(sheet_path(names[0], target))
    )


def _methods(values: list[str] | None, every: Sequence[Method]) -> list[Method]:
    """Return the methods named, with the original model. Raises UsageError."""
    if not values:
        return list(every)
    known = {str(method): method for method in every}
    named = _listed(values)
    for name in named:
        if name not in known:
            raise UsageError(
                f"--methods {name} is no method", hint=f"one or more of {', '.join(known)}"
            )
    return [Method.ORIGINAL, *(known[name] for name in named)]


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
