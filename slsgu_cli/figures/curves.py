"""Plots of Pareto fronts, step sizes, trajectories and relearning."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.errors import InputError
from slsgu_cli.figures.style import (
    FAINT,
    INK,
    MARKERS,
    MUTED,
    ORANGE,
    SERIES,
    TITLE,
    VERMILION,
    blank,
    dress,
    plain,
    png,
)
from slsgu_cli.records.method import LayerScore, Move, Tower, Trial, Trials
from slsgu_cli.records.studies import JointSearch
from slsgu_cli.records.verification import NEW, Check, VerifiedModel


def pareto_plot(scores: Sequence[LayerScore], *, tower: Tower, title: str) -> bytes:
    """Draw importance against alignment for the layers of `tower` (the paper's Figure 2 a, b).

    The best layers are at the top left. Raises InputError if no score belongs to `tower`.
    """
    ours = sorted((s for s in scores if s.tower == tower), key=lambda s: -s.importance)
    if not ours:
        raise InputError(f"the ranking has no layer of the {tower} tower")
    figure = blank(8.0, 4.8, layout="constrained")
    axes = figure.add_subplot()
    dress(axes)
    draw_layers(axes, ours)
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


def step_plot(trials: Trials, *, move: Move, chosen: float | None = None) -> bytes:
    """Draw forget accuracy and utility against the step size for one layer (Figure 2 c, d).

    The second axis gives the step in percent of the layer's norm; step 0 is the original model.
    Raises InputError if the search did not try the layer.
    """
    layer, direction = move
    figure = blank(8.0, 4.8)
    axes = figure.add_subplot()
    tried = draw_steps(axes, trials, move, chosen=chosen)
    axes.set_ylabel("accuracy, %", color=INK)
    along = f", {direction}"
    name = plain(known_as(layer))
    title = f"{name} ({tried[0].tower}{along}): forgetting {plain(trials.name)}"
    axes.set_title(title, loc="left", **TITLE)
    labels = len(axes.get_legend_handles_labels()[1])
    figure.legend(loc="lower center", ncols=5, frameon=False, fontsize=9.5)
    # A search draws dozens of these, and a layout that looks for margins takes as long again.
    bottom = 0.14 + 0.06 * math.ceil(labels / 5)
    figure.subplots_adjust(left=0.09, right=0.97, top=0.82, bottom=bottom)
    return png(figure)


def draw_layers(axes: Axes, scores: Sequence[LayerScore]) -> list[tuple[float, float]]:
    """Draw the front in colours and the other layers as crosses; return the front's points.

    Both axes are logarithmic, and symmetric if a value is 0 or negative.
    """
    dress(axes)
    axes.set_xlabel("alignment: cosine of forget and retain gradient (less is better)", color=INK)
    axes.set_ylabel("importance: forget gradient / weights (more is better)", color=INK)
    x = [score.alignment for score in scores]
    y = [score.importance for score in scores]
    axes.set_xscale(**_symmetric_scale(x) if min(x) <= 0 else {"value": "log"})
    axes.set_yscale(**_symmetric_scale(y) if min(y) <= 0 else {"value": "log"})
    if min(x) < 0:
        axes.axvline(0, color=FAINT, linewidth=2, zorder=1)
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
            label=plain(known_as(scores[i].layer), 34),
        )
    if others:
        axes.scatter(
            [x[i] for i in others],
            [y[i] for i in others],
            marker="x",
            s=22,
            linewidths=0.9,
            color=INK,
            alpha=0.65,
            zorder=2,
            label=f"{len(others)} other layers",
        )
    return [(x[i], y[i]) for i in front]


def draw_steps(
    axes: Axes, trials: Trials, move: Move, *, chosen: float | None = None, size: float = 6
) -> list[Trial]:
    """Draw all accuracies against the step along one move; return its trials by step.

    `chosen` is a step to mark, `size` that of the markers. Raises InputError if no trial is
    along the move.
    """
    tried = sorted((t for t in trials.trials if t.move == move), key=lambda t: t.step)
    if not tried:
        raise InputError(f"the search of {trials.name} did not try the layer {move[0]}")
    dress(axes)
    _draw_accuracies(axes, trials, tried, size=size)
    _scale_steps(axes, tried)
    if chosen is not None:
        axes.axvline(chosen, color=INK, linewidth=1.2, label=f"chosen step {chosen:.4g}")
    axes.set_ylim(0, 103)
    return tried


def _draw_accuracies(axes: Axes, trials: Trials, tried: Sequence[Trial], *, size: float) -> None:
    """Draw one line per accuracy, starting at step 0, the original model."""
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


def _scale_steps(axes: Axes, tried: Sequence[Trial]) -> None:
    """Scale the step axis, and add an axis in percent of the layer's norm above it."""
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


def _symmetric_scale(values: Sequence[float]) -> dict[str, Any]:
    """Return the arguments of a logarithmic scale with a linear part around 0."""
    magnitudes = [abs(value) for value in values if value] or [1e-3]
    least = max(min(magnitudes), max(magnitudes) / 1000)
    return {"value": "symlog", "linthresh": 10 ** math.floor(math.log10(least))}


ACROSS = 3


def trajectories_plot(trials: Trials, moves: Sequence[Move]) -> bytes:
    """Draw a small panel for each move: accuracies against the step (Figure 14)."""
    across = min(ACROSS, len(moves))
    down = -(-len(moves) // across)
    figure = blank(1.0 + 3.6 * across, 1.1 + 3.1 * down, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).reshape(-1)
    for axes in panels[len(moves) :]:
        axes.set_visible(False)
    for place, (axes, move) in enumerate(zip(panels, moves, strict=False)):
        draw_steps(axes, trials, move, size=3)
        if place % across == 0:
            axes.set_ylabel("accuracy, %", color=INK)
        axes.set_title(
            f"{plain(known_as(move[0]), 34)}, {move[1]}", loc="left", **TITLE | {"fontsize": 10}
        )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9.5)
    figure.suptitle(f"forgetting {plain(trials.name)}", x=0.01, ha="left", **TITLE)
    return png(figure)


def several_plot(joint: JointSearch) -> bytes:
    """Draw accuracies against the number of concepts forgotten together."""
    figure = blank(8.0, 4.8, layout="constrained")
    axes = figure.add_subplot()
    dress(axes)
    counts = [0, *(len(stage.moves) for stage in joint.stages)]
    for index, (name, before) in enumerate(sorted(joint.baseline_utility.items())):
        after = [(stage.utility or {}).get(name, before).top1 for stage in joint.stages]
        colour = SERIES[index % 4]
        axes.axhline(before.top1, color=colour, linewidth=0.9, linestyle=":", alpha=0.8)
        axes.plot(
            counts,
            [before.top1, *after],
            f"{MARKERS[2 + index % 9]}-",
            color=colour,
            linewidth=2,
            clip_on=False,
            label=f"TA@1 {plain(name, 30)}",
        )
    worst = [max(figure.top1 for figure in stage.forget.values()) for stage in joint.stages]
    axes.plot(
        counts[1:], worst, "o-", color=VERMILION, clip_on=False, label="FA@1, the highest of all"
    )
    labels = [f"{count}\n+ {plain(joint.names[count - 1], 14)}" for count in counts[1:]]
    if counts[-1] > len(joint.stages):
        axes.set_xscale("symlog", linthresh=1)
        labels = list(map(str, counts[1:]))
    axes.set_xticks(counts, ["original", *labels])
    axes.minorticks_off()
    axes.set_ylim(0, 103)
    axes.set_xlim(0, counts[-1])
    axes.set_xlabel("concepts forgotten together", color=INK)
    axes.set_ylabel("accuracy, %", color=INK)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9.5)
    return png(figure)


# The original, the first edit, then other models.
COLOURS = (INK, VERMILION, *SERIES)
PANELS = {
    Check.FINETUNE: "trained on the retain set",
    Check.RELEARN: "trained on images of the concept too",
}


def relearning_plot(models: Sequence[VerifiedModel], *, concept: str) -> bytes:
    """Draw FA@1 against training steps, one line per model; the original comes first."""
    ran = {finding.check for model in models for finding in model.findings}
    panels = [check for check in PANELS if check in ran]
    figure = blank(5.2 * len(panels), 4.4, layout="constrained")
    for place, check in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        draw_training(axes, models, check)
        axes.set_title(PANELS[check], loc="left", **TITLE)
        if place == 0:
            axes.set_ylabel(f"FA@1, {plain(concept, 30)}, %", color=INK)
    # The last panel has all lines.
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    return png(figure)


def draw_training(axes: Axes, models: Sequence[VerifiedModel], check: Check) -> None:
    """Draw every curve of a check: dashed for the original, grey for a new name."""
    dress(axes)
    axes.set_xlabel("training steps", color=INK)
    axes.set_ylim(-2, 103)
    for place, model in enumerate(models):
        finding = model.finding(check)
        for curve in finding.curves if finding else ():
            new = curve.name == NEW
            axes.plot(
                [point.step for point in curve.points],
                [point.forget.top1 for point in curve.points],
                f"{MARKERS[place % len(MARKERS)]}{'-' if place else '--'}",
                color=MUTED if new else COLOURS[place % len(COLOURS)],
                linewidth=2,
                markersize=5,
                clip_on=False,
                label=plain(f"{model.label}, a new name" if new else model.label, 40),
            )
