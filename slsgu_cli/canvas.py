"""What every figure shares: colours, a blank figure, and the way it becomes PNG bytes.

Figures are made through matplotlib's objects, never through pyplot, so that drawing one
leaves no global state behind.
"""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#1f2328"
MUTED = "#6e7781"
PALE = "#d0d7de"
FAINT = "#eceff2"
# Okabe and Ito's colours, told apart by colour-blind readers; markers say it once more.
VERMILION = "#D55E00"
BLUE = "#0072B2"
ORANGE = "#E69F00"
SERIES = (BLUE, "#009E73", "#CC79A7", "#56B4E9", ORANGE, "#7F5AA2", VERMILION)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")


def blank(width: float, height: float, **options: Any) -> Figure:
    """Return an empty white figure of `width` x `height` inches."""
    figure = Figure(figsize=(width, height), facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, **options: Any) -> bytes:
    """Return the figure as PNG bytes, 160 pixels to the inch, without a software stamp."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None}, **options)
    return buffer.getvalue()


def plain(text: str, limit: int | None = None) -> str:
    """Return `text` so that it is drawn literally, on one line, cut to `limit` characters."""
    text = " ".join(text.split())
    if limit is not None and len(text) > limit:
        text = text[: limit - 1].rstrip() + "…"
    return text.replace("$", r"\$")


def dress(axes: Axes) -> None:
    """Give axes a light frame and grid."""
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=10, which="both")
    for side, spine in axes.spines.items():
        spine.set_color(PALE)
        spine.set_visible(side in ("left", "bottom"))
