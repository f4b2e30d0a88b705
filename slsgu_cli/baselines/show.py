"""How a comparison is printed and drawn."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from slsgu_cli.baselines.records import Method
from slsgu_cli.baselines.table import Row, better
from slsgu_cli.canvas import INK, MARKERS, MUTED, SERIES, blank, dress, plain, png
from slsgu_cli.console import Console
from slsgu_cli.plots import TITLE
from slsgu_cli.tables import Column

LABELS = {
    Method.ORIGINAL: "Original",
    Method.FT: "FT",
    Method.GA: "GA",
    Method.GAFT: "GAFT",
    Method.SALUN: "SalUn",
    Method.SSD: "SSD",
    Method.OURS: "Ours",
}


def comparison(console: Console, rows: Sequence[Row], names: Sequence[str], plot: str) -> None:
    """Print a row for each method and setting, and say which baselines beat ours."""
    sets = sorted(rows[0].utility)

    def figure(name: str, label: str) -> Column:
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


def comparison_plot(rows: Sequence[Row], *, title: str) -> bytes:
    """Draw utility against forgetting, a mark for each method and setting.

    The best methods stand at the top right.
    """
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


def _mark(axes: Axes, row: Row) -> None:
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
