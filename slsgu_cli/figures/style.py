"""The shared look of all figures: colours, fonts and axes, and figures as PNG or SVG."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

from slsgu_cli import progress

INK = "#1f2328"
MUTED = "#6e7781"
PALE = "#d0d7de"
FAINT = "#eceff2"

# Okabe and Ito's palette is safe for colour-blind readers. Markers differ as well.
VERMILION = "#D55E00"
BLUE = "#0072B2"
ORANGE = "#E69F00"
SERIES = (BLUE, "#009E73", "#CC79A7", "#56B4E9", ORANGE, "#7F5AA2", VERMILION)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")


# Chinese, Japanese and Korean characters, and fonts that common systems have for them.
CJK = re.compile("[\u2e80-\uffef]")
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
)


def blank(width: float, height: float, **options: Any) -> Figure:
    """Return an empty white figure of `width` x `height` inches."""
    figure = Figure(figsize=(width, height), facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, **options: Any) -> bytes:
    """Return the figure as PNG bytes, 160 pixels to the inch, without a software stamp."""
    buffer = io.BytesIO()
    with _drawable(figure):
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None}, **options)
    return buffer.getvalue()


def svg(figure: Figure) -> str:
    """Return the figure as an SVG document that is the same each time. Texts stay texts."""
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _drawable(figure), rc_context({"svg.hashsalt": "slsgu", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return buffer.getvalue().decode()


@contextmanager
def _drawable(figure: Figure) -> Iterator[None]:
    """Choose fonts for the texts of a figure; warn of missing ones in our own words."""
    for text in figure.findobj(Text):
        if CJK.search(text.get_text()):
            text.set_fontfamily(["sans-serif", *_cjk_fonts()])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@cache
def _cjk_fonts() -> list[str]:
    """Return the installed fonts among `CJK_FONTS`; warn once if there are none."""
    installed = set(fontManager.get_font_names())
    fonts = [name for name in CJK_FONTS if name in installed]
    if not fonts:
        progress.warn(
            "figures show boxes in place of Chinese, Japanese and Korean characters, because "
            "no installed font has them: install Noto Sans CJK (fonts-noto-cjk)"
        )
    return fonts


def fitted(text: str, limit: int | None = None) -> str:
    """Return a text on one line, cut to `limit` characters."""
    text = " ".join(text.split())
    if limit is None or len(text) <= limit:
        return text
    return text[: limit - 1].rstrip() + "…"


def plain(text: str, limit: int | None = None) -> str:
    """Return `text` without markup for matplotlib, on one line, cut to `limit` characters."""
    return fitted(text, limit).replace("$", r"\$")


def dress(axes: Axes) -> None:
    """Give axes a light frame and grid."""
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=10, which="both")
    for side, spine in axes.spines.items():
        spine.set_color(PALE)
        spine.set_visible(side in ("left", "bottom"))


TITLE: dict[str, Any] = {"color": INK, "fontsize": 12, "fontweight": "bold"}
