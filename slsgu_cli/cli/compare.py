"""The command `compare`."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from slsgu_cli.cli.app import Names, Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.usage import ParsedOptions
from slsgu_cli.errors import UsageError
from slsgu_cli.figures.numbers import roughly
from slsgu_cli.records.comparison import (
    CompareOptions,
    Method,
    PipelineCompareOptions,
    PipelineComparison,
    PipelineOutcome,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from slsgu_cli.compare.tables import TableRow


@command("compare")
def compare(
    session: Session,
    names: Names,
    options: ParsedOptions[CompareOptions],
    on_pipeline: ParsedOptions[PipelineCompareOptions],
) -> None:
    """With --target, compares methods for diffusion pipelines and the edit of `search --target`
    by the images that a pipeline generates (Figure 4 of the paper).

    Example: slsgu compare facebook --lr auto --retain-rows 256
    """
    names = list(dict.fromkeys(names))
    if "target" in on_pipeline:
        options.refuse(
            "for comparing without --target", hint="--iterations N", shared=[on_pipeline]
        )
        compare_on_pipeline(session, names, on_pipeline.record())
        return
    on_pipeline.refuse("for a diffusion pipeline", hint="--target FOLDER", shared=[options])
    from slsgu_cli.compare import comparison
    from slsgu_cli.compare.tables import mean_rows
    from slsgu_cli.store.artifacts import joint_label, plot_path

    compared = comparison.compare(session.store, names, options=options.record())
    rows = mean_rows(compared.concepts, compared.chosen)
    path = plot_path(joint_label(names), "comparison")
    title = f"forgetting {', '.join(names)}"
    session.store.write_bytes(path, comparison_plot(rows, title=title))
    show_comparison(session.console, rows, names, session.store.where(path))


def show_comparison(
    console: Console, rows: "Sequence[TableRow]", names: Sequence[str], plot: str
) -> None:
    """Print a row for each method and setting, and warn about baselines that beat ours."""
    from slsgu_cli.compare.registry import label_of
    from slsgu_cli.compare.tables import better, hyperparameter_of

    sets = sorted(rows[0].utility)
    tenths = "{:.1f}".format
    single = len(names) == 1
    columns: list[str | Column] = [
        Column("method", shown=label_of),
        Column("setting", lambda row: row.words + "*" * (row.chosen and single)),
        Column(
            "lr",
            lambda row: None if hyperparameter_of(row.method) else row.setting,
            on_terminal=False,
        ),
        Column(
            "value",
            lambda row: row.setting if hyperparameter_of(row.method) else None,
            on_terminal=False,
        ),
        Column("layer", on_terminal=False),
        Column("epoch", on_terminal=False),
        Column("FA@1", "forget.top1", shown=tenths),
        Column("FA@5", "forget.top5", shown=tenths),
        *(
            Column(
                f"{ta} {name}",
                partial(_utility, name, top),
                shown=tenths,
                label=f"{ta}\n{name}",
                on_terminal=ta == "TA@1",
                of=("utility", name, ta),
            )
            for ta, top in (("TA@1", "top1"), ("TA@5", "top5"))
            for name in sets
        ),
        Column("seconds", shown="{:.0f}".format, label="s"),
        Column("forget passes", "forget_passes", shown=tenths, label="passes\nforget"),
        Column("retain passes", "retain_passes", shown=tenths, label="passes\nretain"),
        Column("chosen", on_terminal=False),
    ]
    several = f", mean of {len(names)} concepts" if len(names) > 1 else ""
    title = f"forgetting {', '.join(names)}{several}"
    console.table("comparison", columns, rows, title=title)
    if any(row.chosen for row in rows) and single:
        console.note("* the setting of the best trade-off between 100 - FA@1 and mean TA@1")
    for row in better(rows):
        console.warn(
            f"{label_of(row.method)} ({row.words}) beats ours here: FA@1 {row.forget.top1:.2f} "
            f"and mean TA@1 {row.mean_utility:.2f}"
        )
    console.paths("plots", [plot])


def _utility(name: str, top: str, row: "TableRow") -> float:
    return float(getattr(row.utility[name], top))


def comparison_plot(rows: "Sequence[TableRow]", *, title: str) -> bytes:
    """Draw utility against forgetting, with a mark for each method and setting.

    The best methods stand at the top right.
    """
    from slsgu_cli.figures.style import INK, MUTED, TITLE, blank, dress, plain, png

    figure = blank(8.0, 4.8, layout="constrained")
    axes = figure.add_subplot()
    dress(axes)
    for row in rows:
        _mark(axes, row)
        if row.method is Method.ORIGINAL:
            axes.axhline(row.mean_utility, color=MUTED, linewidth=0.9, linestyle=":")
    axes.set_xlim(-3, 103)
    axes.set_ylim(top=102)
    axes.set_xlabel("forgetting: 100 - FA@1 (more is better)", color=INK)
    axes.set_ylabel("utility: mean TA@1, % (more is better)", color=INK)
    axes.set_title(plain(title, 70), loc="left", **TITLE)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return png(figure)


def _mark(axes: "Axes", row: "TableRow") -> None:
    from slsgu_cli.compare.registry import label_of
    from slsgu_cli.figures.style import INK, MARKERS, SERIES

    index = list(Method).index(row.method)
    ours = row.method is Method.OURS
    axes.scatter(
        100 - row.forget.top1,
        row.mean_utility,
        marker="*" if ours else MARKERS[index % len(MARKERS)],
        s=220 if ours else 70,
        color=INK if row.method is Method.ORIGINAL else SERIES[index % len(SERIES)],
        edgecolor="black" if row.chosen else "white",
        linewidths=0.9,
        zorder=4 if ours else 3,
        clip_on=False,
        label=f"{label_of(row.method)} {row.words}".rstrip(),
    )


def compare_on_pipeline(
    session: Session, names: Sequence[str], options: PipelineCompareOptions
) -> None:
    """Compare methods on one set by the images of a pipeline, and print the result."""
    from slsgu_cli.compare.on_pipeline import compare_on_pipeline as run
    from slsgu_cli.compare.on_pipeline import sheet_path

    if len(names) > 1:
        raise UsageError("--target compares one set at a time", hint="name one set")
    compared = run(session.store, names[0], options=options)
    sheet = session.store.where(sheet_path(names[0], options.target))
    show_pipeline_comparison(session.console, compared, sheet)


def show_pipeline_comparison(console: Console, comparison: PipelineComparison, sheet: str) -> None:
    """Print a row for each method and setting."""
    from slsgu_cli.compare.registry import label_of, on_pipeline

    def words(row: PipelineOutcome) -> str:
        spec = on_pipeline(row.method)
        name = spec.hyperparameter.name if spec and spec.hyperparameter else "lr"
        setting = row.made_by.setting
        return "" if setting is None else f"{name} {setting:g}"

    columns: list[str | Column] = [
        Column("method", shown=label_of),
        Column("setting", words),
        Column(
            "lr", lambda row: row.plan and row.plan.rate, shown="{:g}".format, on_terminal=False
        ),
        Column("value", "setting", on_terminal=False),
        Column("iterations", lambda row: row.plan and row.plan.iterations, on_terminal=False),
        Column("UA", "effect.ua", shown=roughly),
        Column("IRA", "effect.ira", shown=roughly),
        Column("distance", shown="{:.3f}".format),
        Column("seconds", shown="{:.0f}".format, label="s"),
    ]
    title = (
        f"forgetting {comparison.concept} on {comparison.target}: "
        f"{comparison.budget.concept} images of it, {comparison.budget.others} of other classes"
    )
    console.table("comparison", columns, comparison.outcomes, title=title, data=comparison)
    console.paths("sheets", [sheet])
