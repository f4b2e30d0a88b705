"""The figures of a ranking and of a search: records in, PNG bytes out.

`cosine_plot` and `before_after_plot` are drawn in `pictures` and offered here as well.
"""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from slsgu_cli.canvas import (
    FAINT,
    INK,
    MARKERS,
    MUTED,
    ORANGE,
    SERIES,
    VERMILION,
    blank,
    dress,
    plain,
    png,
)
from slsgu_cli.errors import InputError
from slsgu_cli.naming import short
from slsgu_cli.pictures import Example, before_after_plot, cosine_plot
from slsgu_cli.records import LayerScore, Tower, Trial, Trials

__all__ = ["Example", "before_after_plot", "cosine_plot", "pareto_plot", "step_plot"]


TITLE: dict[str, Any] = {"color": INK, "fontsize": 12, "fontweight": "bold"}


def pareto_plot(scores: Sequence[LayerScore], *, tower: Tower, title: str) -> bytes:
    """Draw importance against alignment for the layers of `tower` (the paper's Figure 2 a, b).

    Both axes are logarithmic; signed alignments get a symmetric logarithmic axis. Zeros
    are drawn at the edge, with a note. The best layers stand at the top left. Raises
    InputError where no score is of `tower`.
    """
    ours = sorted((s for s in scores if s.tower == tower), key=lambda s: -s.importance)
    if not ours:
        raise InputError(f"the ranking has no layer of the {tower} tower")
    figure = blank(8.0, 4.8, layout="constrained")
    axes = figure.add_subplot()
    dress(axes)
    _draw_layers(axes, ours)
    axes.set_xlabel("alignment: cosine of forget and retain gradient (less is better)", color=INK)
    axes.set_ylabel("importance: forget gradient / weights (more is better)", color=INK)
    axes.set_title(plain(title), loc="left", **TITLE)
    front = sum(score.front for score in ours)
    figure.legend(
        loc="outside right upper",
        title="Pareto front",
        alignment="left",
        frameon=False,
        ncols=1 if front <= 18 else 2,
        fontsize=9 if front <= 14 else 7.5,
    )
    return png(figure)


def step_plot(
    trials: Trials, *, layer: str, ridge: float | None = None, chosen: float | None = None
) -> bytes:
    """Draw forget accuracy and utility against the step size for one layer (Figure 2 c, d).

    `ridge` is that of the whitened direction, None for the gradient. The second axis gives
    the step in percent of the layer's norm; step 0 is the original model. Utility is drawn
    where it was measured. Raises InputError where the search did not try `layer`.
    """
    line = (layer, ridge)
    tried = sorted((t for t in trials.trials if (t.layer, t.ridge) == line), key=lambda t: t.step)
    if not tried:
        raise InputError(f"the search of {trials.name} did not try the layer {layer}")
    figure = blank(8.0, 4.8, layout="constrained")
    axes = figure.add_subplot()
    dress(axes)
    draw_accuracies(axes, trials, tried)
    step_axes(axes, tried)
    if chosen is not None:
        axes.axvline(chosen, color=INK, linewidth=1.2, label=f"chosen step {chosen:.4g}")
    axes.set_ylim(0, 103)
    axes.set_ylabel("accuracy, %", color=INK)
    along = "" if ridge is None else f", ridge {ridge:g}"
    title = f"{plain(short(layer))} ({tried[0].tower}{along}): forgetting {plain(trials.name)}"
    axes.set_title(title, loc="left", **TITLE)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9.5)
    return png(figure)


def _draw_layers(axes: Axes, scores: Sequence[LayerScore]) -> None:
    """Draw the front in colours, each layer named, and the other layers as crosses."""
    x = _scaled(axes, "x", [score.alignment for score in scores])
    y = _scaled(axes, "y", [score.importance for score in scores])
    others = [i for i, score in enumerate(scores) if not score.front]
    front = [i for i, score in enumerate(scores) if score.front]
    for rank, i in enumerate(front):
        axes.scatter(
            x[i],
            y[i],
            marker=MARKERS[rank // len(SERIES) % len(MARKERS)],
            s=80,
            color=SERIES[rank % len(SERIES)],
            edgecolor="white",
            linewidths=0.8,
            zorder=3,
            label=plain(short(scores[i].layer), 34),
        )
    if others:
        axes.scatter(
            [x[i] for i in others],
            [y[i] for i in others],
            marker="x",
            s=22,
            linewidths=0.9,
            color="black",
            alpha=0.65,
            zorder=2,
            label=f"{len(others)} other layers",
        )


def draw_accuracies(axes: Axes, trials: Trials, tried: Sequence[Trial], *, size: float = 6) -> None:
    """Draw a line a figure, from the original model at step 0 on, with markers of a size."""
    line: dict[str, Any] = {"linewidth": size / 3, "markersize": size, "clip_on": False}
    steps = [0.0, *(t.step for t in tried)]
    top1 = [trials.baseline_forget.top1, *(t.forget.top1 for t in tried)]
    top5 = [trials.baseline_forget.top5, *(t.forget.top5 for t in tried)]
    axes.plot(steps, top1, "o-", color=VERMILION, label="FA@1", zorder=4, **line)
    axes.plot(steps, top5, "s--", color=ORANGE, label="FA@5", zorder=3, **line)
    for index, (name, baseline) in enumerate(sorted(trials.baseline_utility.items())):
        colour = SERIES[index % 4]
        measured = [
            (t.step, t.utility[name].top1) for t in tried if t.utility and name in t.utility
        ]
        axes.plot(
            *zip((0.0, baseline.top1), *measured, strict=True),
            f"{MARKERS[2 + index % 9]}-",
            color=colour,
            label=f"TA@1 {plain(name, 30)}",
            zorder=3,
            **line,
        )
        axes.axhline(baseline.top1, color=colour, linewidth=0.9, linestyle=":", alpha=0.8)


def step_axes(axes: Axes, tried: Sequence[Trial]) -> None:
    """Scale the step axis and put the share of the layer's norm above it."""
    first, last = tried[0].step, tried[-1].step
    percent = 100 * tried[-1].share / last
    above = axes.twiny()
    dress(above)
    above.grid(False)
    # A search that only doubled spans three decades, one that bisected less than one.
    wide = last / first > 40
    for each, factor in ((axes, 1.0), (above, percent)):
        if wide:
            each.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(first)) * factor)
            each.xaxis.set_major_formatter("{x:g}")
        each.set_xlim(0, last * 1.04 * factor)
    above.spines[:].set_visible(False)
    axes.set_xlabel("step size", color=INK)
    above.set_xlabel("step in % of the layer's norm", color=MUTED, fontsize=9)
    above.tick_params(labelsize=9, labelcolor=MUTED)


def _scaled(axes: Axes, which: str, values: Sequence[float]) -> list[float]:
    """Set a logarithmic scale that fits `values`; return them with zeros moved to its edge."""
    magnitudes = [abs(value) for value in values if value != 0]
    least, most = min(magnitudes, default=1e-3), max(magnitudes, default=1e-3)
    set_scale = axes.set_xscale if which == "x" else axes.set_yscale
    if any(value < 0 for value in values):
        set_scale("symlog", linthresh=10 ** math.floor(math.log10(max(least, most / 1000))))
        axes.axvline(0, color=FAINT, linewidth=2, zorder=1)
        return list(values)
    set_scale("log")
    zeros = sum(value == 0 for value in values)
    if zeros:
        what, edge, place = {
            "x": ("alignment", "left", (0.01, 0.02)),
            "y": ("importance", "lower", (0.01, 0.06)),
        }[which]
        note = f"{zeros} with {what} 0, drawn at the {edge} edge"
        axes.text(*place, note, transform=axes.transAxes, color=MUTED, fontsize=8)
    return [value or least / 3 for value in values]
