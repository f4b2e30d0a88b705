"""The figures of trajectories and of several concepts: records in, PNG bytes out."""

from collections.abc import Sequence

from slsgu_cli.canvas import INK, MARKERS, SERIES, VERMILION, blank, dress, plain, png
from slsgu_cli.naming import known_as
from slsgu_cli.plots import TITLE, draw_accuracies, step_axes
from slsgu_cli.records import Trials
from slsgu_cli.several.records import JointSearch

ACROSS = 3


def trajectories_plot(trials: Trials, lines: Sequence[tuple[str, float | None]]) -> bytes:
    """Draw a small panel for each layer and ridge: accuracies against the step (Figure 14)."""
    across = min(ACROSS, len(lines))
    down = -(-len(lines) // across)
    figure = blank(1.0 + 3.6 * across, 1.1 + 3.1 * down, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).reshape(-1)
    for axes in panels[len(lines) :]:
        axes.set_visible(False)
    for place, (axes, line) in enumerate(zip(panels, lines, strict=False)):
        tried = [t for t in trials.trials if (t.layer, t.ridge) == line]
        tried.sort(key=lambda t: t.step)
        dress(axes)
        draw_accuracies(axes, trials, tried, size=3)
        step_axes(axes, tried)
        axes.set_ylim(0, 103)
        if place % across == 0:
            axes.set_ylabel("accuracy, %", color=INK)
        ridge = "" if line[1] is None else f", ridge {line[1]:g}"
        axes.set_title(plain(known_as(line[0]), 34) + ridge, loc="left", **TITLE | {"fontsize": 10})
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9.5)
    figure.suptitle(f"forgetting {plain(trials.name)}", x=0.01, ha="left", **TITLE)
    return png(figure)


def several_plot(found: JointSearch) -> bytes:
    """Draw accuracies against the number of concepts that are forgotten together."""
    figure = blank(8.0, 4.8, layout="constrained")
    axes = figure.add_subplot()
    dress(axes)
    counts = range(len(found.stages) + 1)
    for index, (name, before) in enumerate(sorted(found.baseline_utility.items())):
        kept = [(stage.utility or {}).get(name, before).top1 for stage in found.stages]
        colour = SERIES[index % 4]
        axes.axhline(before.top1, color=colour, linewidth=0.9, linestyle=":", alpha=0.8)
        axes.plot(
            counts,
            [before.top1, *kept],
            f"{MARKERS[2 + index % 9]}-",
            color=colour,
            linewidth=2,
            clip_on=False,
            label=f"TA@1 {plain(name, 30)}",
        )
    worst = [max(found.top1 for found in stage.forget.values()) for stage in found.stages]
    axes.plot(
        counts[1:], worst, "o-", color=VERMILION, clip_on=False, label="FA@1, the highest of all"
    )
    labels = ["original", *(f"{k}\n+ {plain(n, 14)}" for k, n in enumerate(found.names, start=1))]
    axes.set_xticks(counts, labels)
    axes.set_ylim(0, 103)
    axes.set_xlim(0, len(found.stages))
    axes.set_xlabel("concepts forgotten together", color=INK)
    axes.set_ylabel("accuracy, %", color=INK)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9.5)
    return png(figure)
