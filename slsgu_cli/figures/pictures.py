"""Matplotlib figures with images: cosine matrices, and guesses before and after an edit.

Axes are laid out in inches, so that cells and thumbnails line up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from slsgu_cli.figures.style import BLUE, FAINT, INK, PALE, VERMILION, blank, plain, png

Images = npt.NDArray[np.uint8]
Matrix = npt.NDArray[np.floating[Any]]
Guesses = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Example:
    """An image with its true label and the most probable names before and after an edit.

    `image` is uint8 (H, W, 3) or (H, W); `before` and `after` are (name, probability),
    the most probable first.
    """

    image: Images
    label: str
    before: Guesses
    after: Guesses


@dataclass(frozen=True, slots=True)
class CosineMap:
    """A cosine matrix, (classes, classes), its title, and the names that were forgotten."""

    title: str
    values: Matrix
    forgotten: Sequence[str]


def cosine_plot(
    before: Matrix,
    after: Matrix | None,
    names: Sequence[str],
    *,
    forgotten: Sequence[str],
    thumbnails: Images | None = None,
) -> bytes:
    """Draw the cosine of every class's images with every name, before and after (Figure 3).

    `before` and `after` are (classes, classes): rows images, columns names. `thumbnails`
    is uint8 (classes, H, W, 3), one image a row. Without `after` there is one map.
    """
    maps = [CosineMap("cosine similarity" if after is None else "before", before, forgotten)]
    if after is not None:
        maps.append(CosineMap("after", after, forgotten))
    return cosine_maps(maps, names, thumbnails=thumbnails)


def cosine_maps(
    maps: Sequence[CosineMap], names: Sequence[str], *, thumbnails: Images | None = None
) -> bytes:
    """Draw cosine matrices of the same classes side by side, on one scale (Figures 3, 7, 8).

    Up to three stand in a row.
    """
    across = min(len(maps), 3)
    low, high = min(m.values.min() for m in maps), max(m.values.max() for m in maps)
    count = len(names)
    cell = 0.56 if count <= 16 else max(0.12, 9 / count)
    side, gap = cell * count, 0.35 + cell * (thumbnails is not None)
    rows = -(-len(maps) // across)
    below = side + (1.6 if rows > 1 else 0)
    width, height = across * (side + gap) + 0.6, below * (rows - 1) + side + 0.4
    figure = blank(width, height)
    for index, each in enumerate(maps):
        left = gap + index % across * (side + gap)
        bottom = below * (rows - 1 - index // across)
        axes = _place(figure, left, bottom, side, side)
        image = axes.imshow(each.values, cmap="Blues", vmin=low, vmax=high, aspect="auto")
        _name_axes(axes, names, each.forgotten, cell=cell, rows=index % across == 0)
        _mark(axes, each.values, [names.index(n) for n in each.forgotten if n in names])
        if count <= 16:
            _annotate(axes, each.values, (low + high) / 2)
        if thumbnails is not None:
            _draw_thumbnails(figure, thumbnails, left - cell, bottom + side, cell)
            axes.tick_params(axis="y", pad=72 * cell + 4)
        axes.set_title(plain(each.title, 40), fontsize=12, fontweight="bold", color=INK, pad=8)
    bar = figure.colorbar(image, cax=_place(figure, width - 0.5, height - 0.4 - side, 0.16, side))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, color=PALE)
    bar.set_label("cosine similarity of image and name", color=INK, fontsize=10)
    return png(figure, bbox_inches="tight", pad_inches=0.12)


def before_after_plot(examples: Sequence[Example], *, concept: str) -> bytes:
    """Draw the model's guesses for each image before and after forgetting `concept`."""
    row, top = 1.5, 0.98
    width, height = 9.9, top + row * len(examples)
    figure = blank(width, height)
    style: dict[str, Any] = {"fontsize": 13, "fontweight": "bold", "color": INK}
    figure.text(0.25 / width, 1 - 0.36 / height, f"Forgetting {plain(concept, 60)}", **style)
    for attribute, left in (("before", 2.9), ("after", 7.05)):
        figure.text(left / width, 1 - 0.82 / height, attribute, **style | {"fontsize": 11})
        for index, example in enumerate(examples):
            bottom = height - top - row * (index + 1) + 0.2
            axes = _place(figure, left, bottom, 2.1, row - 0.32)
            colour = VERMILION if example.label == concept else BLUE
            _bars(axes, getattr(example, attribute), example.label, colour)
    for index, example in enumerate(examples):
        bottom = height - top - row * (index + 1)
        frame, ink = (VERMILION, VERMILION) if example.label == concept else (PALE, INK)
        _thumbnail(_place(figure, 0.25, bottom + 0.44, 0.95, 0.95), example.image, frame)
        place = ((0.25 + 0.475) / width, (bottom + 0.18) / height)
        text = plain(example.label, 17)
        figure.text(*place, text, ha="center", color=ink, fontsize=10, fontweight="bold")
        if index:
            edge = 1 - (top + row * index - 0.02) / height
            line = Rectangle((0.25 / width, edge), 1 - 0.5 / width, 0.012 / height, color=FAINT)
            figure.add_artist(line)
    return png(figure)


def _place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place given in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def _bars(axes: Axes, guesses: Guesses, label: str, colour: str) -> None:
    """Draw one bar per guess on a pale track, the true label in colour."""
    axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(4.6, -0.6))
    axes.spines[:].set_visible(False)
    for place, (name, probability) in enumerate(guesses[:5]):
        true = name == label
        weight = "bold" if true else "normal"
        style: dict[str, Any] = {"va": "center", "fontsize": 9.5, "fontweight": weight}
        axes.barh(place, 1, height=0.62, color=FAINT)
        axes.barh(place, probability, height=0.62, color=colour if true else "#a3acb5")
        ink = colour if true else INK
        axes.text(-0.03, place, plain(name, 15 if true else 17), ha="right", color=ink, **style)
        axes.text(1.03, place, f"{100 * probability:.1f}%", color=ink, **style)


FRAME: dict[str, Any] = {"fill": False, "clip_on": False}
# Images without colours are shown in greys.
SHOWN: dict[str, Any] = {
    "cmap": "gray",
    "vmin": 0,
    "vmax": 255,
    "aspect": "auto",
    "interpolation": "antialiased",
}


def _thumbnail(axes: Axes, image: Images, frame: str) -> None:
    axes.imshow(image, **SHOWN)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=frame, linewidth=1.8)


def _draw_thumbnails(figure: Figure, images: Images, left: float, top: float, cell: float) -> None:
    """Put one thumbnail left of each row of a map that ends at `top`."""
    axes = _place(figure, left, top - cell * len(images), cell, cell * len(images))
    axes.set(xlim=(0, 1), ylim=(len(images), 0))
    axes.set_axis_off()
    for row, image in enumerate(images):
        extent = (0.04, 0.92, row + 0.95, row + 0.05)
        axes.imshow(image, extent=extent, **SHOWN)
        corner = (0.04, row + 0.05)
        axes.add_patch(Rectangle(corner, 0.88, 0.9, edgecolor=PALE, linewidth=1.8, **FRAME))


def _name_axes(
    axes: Axes, names: Sequence[str], forgotten: Sequence[str], *, cell: float, rows: bool
) -> None:
    """Label the columns, and the rows if asked; forgotten names stand out."""
    places, texts = range(len(names)), [plain(name, 22) for name in names]
    size = min(10.0, 72 * cell * 0.8)
    axes.set_xticks(places, texts, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticks(places, texts if rows else [""] * len(names), fontsize=size)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label, name in zip(labels, names, strict=True):
            if name in forgotten:
                label.set(color=VERMILION, fontweight="bold")


def _mark(axes: Axes, values: Matrix, places: Sequence[int]) -> None:
    """Frame the cell where a forgotten concept's images meet its name."""
    thick = 2.6 if len(values) <= 16 else 1.4
    for place in places:
        corner = (place - 0.5, place - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, edgecolor=VERMILION, linewidth=thick, **FRAME))


def _annotate(axes: Axes, values: Matrix, middle: float) -> None:
    for row, column in np.ndindex(*values.shape):
        value = float(values[row, column])
        ink = "white" if value > middle else INK
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
