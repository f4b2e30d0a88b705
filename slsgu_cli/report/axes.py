"""Scales and the frame of an inline SVG chart; colours come from the page's style."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slsgu_cli.report.markup import Html, element, joined

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


def chart(x: Scale, y: Scale, marks: Sequence[Html], *, names: tuple[str, str], told: str) -> Html:
    """Return an SVG with axes called `names`; `told` says in words what it shows."""
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
    return element("svg", joined(parts), joined(marks), viewBox=box, role="img", aria_label=told)


def coordinate(value: float) -> str:
    """Return a pixel position with one decimal."""
    return f"{value:.1f}"
