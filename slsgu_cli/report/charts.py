"""The charts of a report as inline SVG: Pareto fronts, and accuracies against the step."""

from collections.abc import Sequence
from dataclasses import dataclass

from slsgu_cli.naming import known_as
from slsgu_cli.records import LayerScore, Tower, Trials
from slsgu_cli.report.axes import (
    BOTTOM,
    HEIGHT,
    TOP,
    WIDTH,
    chart,
    coordinate,
    linear,
    logarithmic,
    x_scale,
    y_scale,
)
from slsgu_cli.report.markup import Html, element


@dataclass(frozen=True, slots=True)
class Series:
    """Points (step, percent) of one accuracy, and the style class they are drawn in."""

    label: str
    points: tuple[tuple[float, float], ...]
    style: str


def front_chart(scores: Sequence[LayerScore], tower: Tower) -> Html:
    """Draw importance against alignment; the front is numbered, every point tells its layer."""
    own = [score for score in scores if score.tower is tower]
    signed = any(score.alignment < 0 for score in own)
    alignments = [score.alignment for score in own]
    if signed:
        most = 1.1 * max(map(abs, alignments))
        x = x_scale(linear, -most, most)
    else:
        x = x_scale(logarithmic, alignments)
    y = y_scale(logarithmic, [score.importance for score in own])
    numbers = {s.layer: n for n, s in enumerate((s for s in own if s.front), start=1)}
    marks = [
        _point(score, x.place(score.alignment), y.place(score.importance), numbers.get(score.layer))
        for score in sorted(own, key=lambda score: score.front)
    ]
    told = (
        f"Importance against alignment of the {len(own)} layers of the {tower} tower. "
        f"On the Pareto front, as in the table: "
        + ", ".join(f"{number} {known_as(layer)}" for layer, number in numbers.items())
    )
    return chart(x, y, marks, names=("alignment (less is better)", "importance"), told=told)


def _point(score: LayerScore, x: float, y: float, number: int | None) -> Html:
    at = {"cx": coordinate(x), "cy": coordinate(y)}
    name = known_as(score.layer)
    figures = f"importance {score.importance:.3g}, alignment {score.alignment:.3g}"
    inner = element("circle", **at, r=10 if number else 4)
    if number:
        inner = Html(
            inner
            + element("text", str(number), x=at["cx"], y=at["cy"], dy="0.35em", class_="number")
        )
    # The label stands beside the point, on the side that has room for it.
    ends = x > WIDTH / 2
    label = element(
        "text",
        name,
        x=coordinate(x - 15 if ends else x + 15),
        y=coordinate(max(y, TOP + 12)),
        dy="0.35em",
        text_anchor="end" if ends else "start",
        class_="hint",
    )
    title = element("title", f"{name}: {figures}")
    return element("g", title, inner, label, class_="point front" if number else "point")


def step_series(trials: Trials, layer: str, ridge: float | None) -> list[Series]:
    """Return the accuracies of a layer's trials with a ridge, from the original model on."""
    own = [trial for trial in trials.trials if (trial.layer, trial.ridge) == (layer, ridge)]
    tried = sorted(own, key=lambda trial: trial.step)
    series = []
    for k, attribute, style in ((1, "top1", "fa1"), (5, "top5", "fa5")):
        start = (0.0, getattr(trials.baseline_forget, attribute))
        rest = ((trial.share, getattr(trial.forget, attribute)) for trial in tried)
        series.append(Series(f"FA@{k}", (start, *rest), style))
    for index, (name, base) in enumerate(sorted(trials.baseline_utility.items())):
        points = [(t.share, t.utility[name].top1) for t in tried if t.utility and name in t.utility]
        style = f"ta{index % 3}"
        series.append(Series(f"TA@1 {name}", ((0.0, base.top1), *points), style))
    return series


def step_chart(series: Sequence[Series], *, chosen: float | None, told: str) -> Html:
    """Draw accuracies against the size of the step in percent of the layer's norm."""
    scaled = [
        Series(one.label, tuple((100 * share, value) for share, value in one.points), one.style)
        for one in series
    ]
    mark = None if chosen is None else 100 * chosen
    return line_chart(scaled, "step, % of the layer's norm", chosen=mark, told=told)


def line_chart(
    series: Sequence[Series], along: str, *, told: str, chosen: float | None = None
) -> Html:
    """Draw accuracies in percent along an axis called `along`, with a line at `chosen`."""
    met = sorted({x for one in series for x, _ in one.points})
    # A search that only doubled spans three decades, one that bisected less than one.
    wide = len(met) > 1 and met[-1] > 40 * met[1]
    x = x_scale(logarithmic, met) if wide else x_scale(linear, 0.0, 1.04 * met[-1] or 1.0)
    y = y_scale(linear, 0.0, 100.0)
    marks = []
    if chosen is not None:
        at = coordinate(x.place(chosen))
        marks.append(element("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="chosen"))
    # The first series is drawn last, above the rest.
    for one in reversed(series):
        places = [(x.place(met_at), y.place(value)) for met_at, value in one.points]
        path = "M" + "L".join(f"{coordinate(a)} {coordinate(b)}" for a, b in places)
        marks.append(element("path", d=path, class_=f"line {one.style}"))
        for (a, b), (met_at, value) in zip(places, one.points, strict=True):
            title = element("title", f"{one.label} {value:.2f}% at {met_at:.3g}")
            spot = {"cx": coordinate(a), "cy": coordinate(b)}
            marks.append(element("circle", title, **spot, r=3.4, class_=f"dot {one.style}"))
    return chart(x, y, marks, names=(along, "accuracy, %"), told=told)


def legend(series: Sequence[Series]) -> Html:
    """Return what the lines of step charts stand for."""
    entries = []
    for one in series:
        sample = element(
            "svg",
            element("path", d="M1 7H33", class_=f"line {one.style}"),
            element("circle", cx=17, cy=7, r=3.4, class_=f"dot {one.style}"),
            viewBox="0 0 34 14",
            aria_hidden="true",
        )
        entries.append(element("li", sample, one.label))
    return element("ul", *entries, class_="legend")
