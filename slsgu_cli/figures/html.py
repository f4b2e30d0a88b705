"""Elements, tables, figures and charts as text in which everything foreign is escaped."""

import base64
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.progress import terminal_safe
from slsgu_cli.records.figures import Share
from slsgu_cli.records.method import LayerScore, Move, Tower, Trials

VOID = frozenset({"br", "col", "hr", "img", "meta"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = Html | str | None
Attribute = str | int | float | bool | None


def text(value: str) -> Html:
    """Return any text so that a browser shows it literally."""
    # A lone surrogate has no encoding; the page shows its number.
    whole = terminal_safe(value).encode("utf-8", "backslashreplace").decode()
    return Html(html.escape(whole))


def element(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """Return an element. `class_` is the attribute class; underscores become hyphens.

    Attributes that are None or False are left out, True stands alone.
    """
    head = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        known_as = key.rstrip("_").replace("_", "-")
        head += f" {known_as}" if value is True else f' {known_as}="{text(str(value))}"'
    if name in VOID:
        return Html(f"<{head}>")
    return Html(f"<{head}>{joined(children)}</{name}>")


def joined(children: Iterable[Child], between: str = "") -> Html:
    """Return children one after another; None is nothing."""
    parts = (child if isinstance(child, Html) else text(child) for child in children if child)
    return Html(text(between).join(parts))


def percent(value: float) -> str:
    """Return a percentage with two decimals."""
    return f"{value:.2f}%"


def roughly(value: float) -> str:
    """Return a percentage with one decimal."""
    return f"{value:.1f}%"


def share(value: float) -> str:
    """Return a share of a layer's norm in percent, to three digits."""
    return f"{100 * value:.3g}%"


def change(value: float) -> str:
    """Return a difference of percentages, in points, with a real minus sign."""
    shown = f"{abs(value):.2f}"
    if float(shown) == 0:
        return shown
    return f"{'−' if value < 0 else '+'}{shown}"


def number(value: float) -> str:
    """Return a number to four digits, with a real minus sign."""
    if value == 0 or not 1e-6 <= abs(value) < 1e6:
        shown = f"{value:.4g}"
    else:
        shown = f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
        shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return shown.replace("-", "−")


def cosine(value: float) -> str:
    """Return a cosine with two decimals, with a real minus sign."""
    shown = f"{value:.2f}"
    return "0.00" if float(shown) == 0 else shown.replace("-", "−")


def count(value: int) -> str:
    """Return an integer with thousands set apart."""
    return f"{value:,}"


def interval(share: Share) -> str:
    """Return the exact 95% interval of a share."""
    low, high = share.interval
    return f"{low:.1f} to {high:.1f}%"


class _Numeric(str):
    """The head of a column of figures, which stand right-aligned."""

    __slots__ = ()


def numeric(*labels: str) -> list[str]:
    """Return the heads of columns of figures; other heads are plain text."""
    return [_Numeric(label) for label in labels]


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Child]],
    *,
    caption: str,
    marked: Sequence[int] = (),
) -> Html:
    """Return a table whose first column names its rows; rows in `marked` stand out.

    It scrolls sideways by itself where the page is too narrow for it.
    """
    aligned = ["fig" if isinstance(head, _Numeric) else None for head in heads]
    columns = zip(heads, aligned, strict=True)
    top = element("tr", *(element("th", head, scope="col", class_=fig) for head, fig in columns))
    body = []
    for index, (name, *figures) in enumerate(rows):
        cells = [
            element("td", cell or "–", class_=fig)
            for cell, fig in zip(figures, aligned[1:], strict=True)
        ]
        first = element("th", name, scope="row", class_=aligned[0])
        body.append(element("tr", first, *cells, class_="marked" if index in marked else None))
    parts = element("caption", caption), element("thead", top), element("tbody", *body)
    return scrolled(element("table", *parts), caption)


def scrolled(content: Html, label: str) -> Html:
    """Return wide content in a region that scrolls sideways, by keyboard as well."""
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def terms(pairs: Mapping[str, Child]) -> Html:
    """Return terms with what they stand for; those that stand for nothing are left out."""
    rows = [
        element("div", element("dt", term), element("dd", value))
        for term, value in pairs.items()
        if value
    ]
    return element("dl", *rows)


def figure_of(content: Html, caption: Child, class_: str | None = None) -> Html:
    """Return content with a caption."""
    return element("figure", content, element("figcaption", caption), class_=class_)


def code(value: str) -> Html:
    """Return a name, path or digest as code that may break anywhere."""
    return element("code", value)


def lines(values: Sequence[Child]) -> Html:
    """Return values, each on a line of its own."""
    return joined(element("span", value, class_="line") for value in values)


def paragraph(*children: Child, class_: str | None = None) -> Html:
    """Return a paragraph."""
    return element("p", *children, class_=class_)


def image_html(png: bytes, *, alt: str, **attributes: Attribute) -> Html:
    """Return an image, PNG bytes, inside the page."""
    data = base64.b64encode(png).decode()
    return element("img", src=f"data:image/png;base64,{data}", alt=alt, **attributes)


# Fronts, steps and curves as inline SVG: its size, and the margins around what is drawn.
WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 70, 12, 14, 50


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to pixels: `ticks` are the values that get a line and a label."""

    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]


def logarithmic(values: Sequence[float], *, start: float, end: float) -> Scale:
    """Return a logarithmic scale from `start` to `end` pixels; zeros lie at its low edge."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.log10(min(positive)), math.log10(max(positive))
    margin = max(0.15, (1 - (high - low)) / 2)
    low, high = low - margin, high + margin
    if any(value <= 0 for value in values):
        low -= 0.3
    decades = range(math.floor(low), math.ceil(high) + 1)
    marks = (1, 2, 5) if len(decades) < 5 else (1,)
    wanted = [m * 10.0**e for e in decades[:: 1 + len(decades) // 8] for m in marks]
    ticks = [value for value in wanted if low <= math.log10(value) <= high]
    if any(value <= 0 for value in values):
        ticks.insert(0, 0.0)

    def place(value: float) -> float:
        at = low if value <= 0 else math.log10(value)
        return start + (end - start) * (at - low) / (high - low)

    return Scale(place, tuple((value, f"{value:.10g}") for value in ticks))


def linear(low: float, high: float, *, start: float, end: float, unit: str = "") -> Scale:
    """Return a linear scale from `start` to `end` pixels with about five round ticks."""
    high = high if high > low else low + 1
    span = high - low
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    ticks = [number * gap for number in range(first, last + 1)]

    def place(value: float) -> float:
        return start + (end - start) * (value - low) / span

    return Scale(place, tuple((value, f"{value:.10g}{unit}") for value in ticks))


def x_scale(kind: Callable[..., Scale], *arguments: float | Sequence[float]) -> Scale:
    """Return a scale along the width of a chart."""
    return kind(*arguments, start=LEFT, end=WIDTH - RIGHT)


def y_scale(kind: Callable[..., Scale], *arguments: float | Sequence[float]) -> Scale:
    """Return a scale along the height of a chart."""
    return kind(*arguments, start=HEIGHT - BOTTOM, end=TOP)


def chart(
    x: Scale, y: Scale, marks: Sequence[Html], *, names: tuple[str, str], description: str
) -> Html:
    """Return an SVG with axes called `names`; `description` says in words what it shows."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value, label in x.ticks:
        at = coordinate(x.place(value))
        parts.append(element("line", x1=at, x2=at, y1=TOP, y2=bottom, class_="grid"))
        parts.append(
            element("text", label, x=at, y=bottom + 18, text_anchor="middle", class_="tick")
        )
    for value, label in y.ticks:
        at = coordinate(y.place(value))
        parts.append(element("line", x1=LEFT, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(
            element("text", label, x=LEFT - 7, y=at, dy="0.34em", text_anchor="end", class_="tick")
        )
    axis = f"M{LEFT} {TOP}V{bottom}H{right}"
    parts.append(element("path", d=axis, class_="axis"))
    middle = (LEFT + right) / 2
    parts.append(
        element("text", names[0], x=middle, y=HEIGHT - 10, text_anchor="middle", class_="name")
    )
    turned = f"translate(13 {(TOP + bottom) / 2:g}) rotate(-90)"
    parts.append(element("text", names[1], transform=turned, text_anchor="middle", class_="name"))
    box = f"0 0 {WIDTH} {HEIGHT}"
    return element(
        "svg", joined(parts), joined(marks), viewBox=box, role="img", aria_label=description
    )


def coordinate(value: float) -> str:
    """Return a pixel position with one decimal."""
    return f"{value:.1f}"


@dataclass(frozen=True, slots=True)
class Series:
    """Points (step, percent) of one accuracy, and the style class they are drawn in."""

    label: str
    points: tuple[tuple[float, float], ...]
    style: str


def front_chart(scores: Sequence[LayerScore], tower: Tower) -> Html:
    """Draw importance against alignment; the front is numbered, every point tells its layer."""
    layers = [score for score in scores if score.tower is tower]
    signed = any(score.alignment < 0 for score in layers)
    alignments = [score.alignment for score in layers]
    if signed:
        most = 1.1 * max(map(abs, alignments))
        x = x_scale(linear, -most, most)
    else:
        x = x_scale(logarithmic, alignments)
    y = y_scale(logarithmic, [score.importance for score in layers])
    numbers = {s.layer: n for n, s in enumerate((s for s in layers if s.front), start=1)}
    marks = [
        _point(score, x.place(score.alignment), y.place(score.importance), numbers.get(score.layer))
        for score in sorted(layers, key=lambda score: score.front)
    ]
    description = (
        f"Importance against alignment of the {len(layers)} layers of the {tower} tower. "
        f"On the Pareto front, as in the table: "
        + ", ".join(f"{number} {known_as(layer)}" for layer, number in numbers.items())
    )
    return chart(
        x, y, marks, names=("alignment (less is better)", "importance"), description=description
    )


def _point(score: LayerScore, x: float, y: float, number: int | None) -> Html:
    at = {"cx": coordinate(x), "cy": coordinate(y)}
    name = known_as(score.layer)
    figures = f"importance {score.importance:.3g}, alignment {score.alignment:.3g}"
    dot = element("circle", **at, r=10 if number else 4)
    inside = None
    if number:
        place = {"x": at["cx"], "y": at["cy"], "dy": "0.35em"}
        inside = element("text", str(number), **place, class_="number")
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
    return element("g", title, dot, inside, label, class_="point front" if number else "point")


def step_series(trials: Trials, move: Move) -> list[Series]:
    """Return the accuracies of the trials of a move, from the original model on.

    They are by the size of the step in percent of the layer's norm.
    """
    of_layer = [t for t in trials.trials if t.move == move]
    steps = sorted(of_layer, key=lambda trial: trial.step)
    series = []
    for k, attribute, style in ((1, "top1", "fa1"), (5, "top5", "fa5")):
        start = (0.0, getattr(trials.baseline_forget, attribute))
        rest = ((100 * trial.share, getattr(trial.forget, attribute)) for trial in steps)
        series.append(Series(f"FA@{k}", (start, *rest), style))
    for index, (name, base) in enumerate(sorted(trials.baseline_utility.items())):
        points = [
            (100 * t.share, t.utility[name].top1) for t in steps if t.utility and name in t.utility
        ]
        series.append(Series(f"TA@1 {name}", ((0.0, base.top1), *points), f"ta{index % 3}"))
    return series


def line_chart(
    series: Sequence[Series], along: str, *, description: str, chosen: float | None = None
) -> Html:
    """Draw accuracies in percent along an axis called `along`, with a line at `chosen`."""
    values = sorted({x for one in series for x, _ in one.points})
    # A search that only doubled spans three decades, one that bisected less than one.
    wide = len(values) > 1 and values[-1] > 40 * values[1]
    x = x_scale(logarithmic, values) if wide else x_scale(linear, 0.0, 1.04 * values[-1] or 1.0)
    y = y_scale(linear, 0.0, 100.0)
    marks = []
    if chosen is not None:
        at = coordinate(x.place(chosen))
        marks.append(element("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="chosen"))
    # The first series is drawn last, above the rest.
    for one in reversed(series):
        places = [(x.place(step), y.place(value)) for step, value in one.points]
        path = "M" + "L".join(f"{coordinate(a)} {coordinate(b)}" for a, b in places)
        marks.append(element("path", d=path, class_=f"line {one.style}"))
        for (a, b), (step, value) in zip(places, one.points, strict=True):
            title = element("title", f"{one.label} {value:.2f}% at {step:.3g}")
            spot = {"cx": coordinate(a), "cy": coordinate(b)}
            marks.append(element("circle", title, **spot, r=3.4, class_=f"dot {one.style}"))
    return chart(x, y, marks, names=(along, "accuracy, %"), description=description)


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
