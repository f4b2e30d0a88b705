"""Figures with images in them: contact sheets, cosine matrices, before and after an edit.

Those with axes are laid out in inches, sheets in pixels: cells and thumbnails must line up.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import get_data_path
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont, ImageOps

from slsgu_cli.figures.curves import (
    BLUE,
    FAINT,
    INK,
    MUTED,
    PALE,
    VERMILION,
    blank,
    fitted,
    plain,
    png,
)
from slsgu_cli.figures.html import Html, element, image_html, paragraph
from slsgu_cli.records.targets import Answer

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
    """A cosine matrix, (classes, classes), its title, and the names that were forgotten in it."""

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

    Up to two stand in a row, more of them three in a row.
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
            _beside(figure, thumbnails, left - cell, bottom + side, cell)
            axes.tick_params(axis="y", pad=72 * cell + 4)
        axes.set_title(plain(each.title, 40), fontsize=12, fontweight="bold", color=INK, pad=8)
    bar = figure.colorbar(image, cax=_place(figure, width - 0.5, height - 0.4 - side, 0.16, side))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, color=PALE)
    bar.set_label("cosine similarity of image and name", color=INK, fontsize=10)
    return png(figure, bbox_inches="tight", pad_inches=0.12)


def before_after_plot(examples: Sequence[Example], *, concept: str) -> bytes:
    """Draw what a model takes each image for, before and after forgetting `concept`."""
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
    """Draw a bar a guess on a pale track, the true label in colour."""
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
# An image is shown as it is, one without colours in greys.
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


def _beside(figure: Figure, images: Images, left: float, top: float, cell: float) -> None:
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


# Of sheets, in pixels: a thumbnail, gaps and edges, the labels left of rows, a heading.
SIDE = 96
GAP, EDGE, LABEL, HEAD = 6, 18, 92, 34
STYLE = f"""body{{font:15px/1.45 system-ui,sans-serif;color:{INK};margin:2rem auto;max-width:70rem;
padding:0 1rem}}h1{{font-size:1.3rem}}h2{{font-size:1rem;margin:1.6rem 0 .4rem}}
h2.forgotten{{color:{VERMILION}}}p{{color:{MUTED};margin:.2rem 0}}
.row{{display:flex;gap:6px;align-items:center;flex-wrap:wrap;margin:6px 0}}
.row b{{width:6rem;font-weight:500;color:{MUTED}}}
figure{{margin:0}}img{{width:112px;border:1px solid {PALE};image-rendering:auto;display:block}}
figcaption{{font-size:11px;color:{MUTED};text-align:center;max-width:112px;overflow:hidden;
text-overflow:ellipsis;white-space:nowrap}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{border-bottom:1px solid {FAINT};
padding:.25rem .8rem .25rem 0;text-align:left;vertical-align:top}}"""


@dataclass(frozen=True, slots=True)
class Tile:
    """One image of a sheet, as PNG, with what a judge took it for."""

    image: bytes
    verdict: str | None = None


@dataclass(frozen=True, slots=True)
class Strip:
    """A prompt and its images: one row for each model, in the same order of seeds."""

    title: str
    forgotten: bool
    rows: Mapping[str, Sequence[Tile]]


def sheet_png(title: str, strips: Sequence[Strip]) -> bytes:
    """Return a contact sheet: a block for each strip, a row in it for each model."""
    columns = max(len(tiles) for strip in strips for tiles in strip.rows.values())
    judged = any(tile.verdict for s in strips for tiles in s.rows.values() for tile in tiles)
    row = SIDE + GAP + (16 if judged else 0)
    heights = [HEAD + row * len(strip.rows) + GAP for strip in strips]
    width = 2 * EDGE + LABEL + columns * (SIDE + GAP)
    sheet = Image.new("RGB", (max(width, 420), 2 * EDGE + 30 + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((EDGE, EDGE), title, fill=INK, font=_font(19))
    top = EDGE + 30
    for strip, height in zip(strips, heights, strict=True):
        colour = VERMILION if strip.forgotten else INK
        draw.text((EDGE, top + 8), fitted(strip.title, 60), fill=colour, font=_font(14))
        for number, (label, tiles) in enumerate(strip.rows.items()):
            y = top + HEAD + number * row
            draw.text((EDGE, y + SIDE // 2 - 8), label, fill=MUTED, font=_font(12))
            for place, tile in enumerate(tiles):
                _paste(sheet, draw, tile, EDGE + LABEL + place * (SIDE + GAP), y)
        top += height
    return _png(sheet)


def sheet_html(title: str, notes: Sequence[str], strips: Sequence[Strip]) -> str:
    """Return the same as one HTML page that holds its images and needs nothing else."""
    parts: list[Html] = [paragraph(note) for note in notes]
    for strip in strips:
        parts.append(element("h2", strip.title, class_="forgotten" if strip.forgotten else None))
        for label, tiles in strip.rows.items():
            row = [element("b", label)]
            for tile in tiles:
                image = image_html(tile.image, alt=f"{strip.title}, {label}")
                caption = element("figcaption", tile.verdict) if tile.verdict else None
                row.append(element("figure", image, caption))
            parts.append(element("div", *row, class_="row"))
    return _page(title, parts)


@dataclass(frozen=True, slots=True)
class AnsweredImage:
    """An image as PNG, whether it shows what is forgotten, and the answers about it."""

    image: bytes
    forgotten: bool
    answers: Sequence[Answer]


def answers_png(title: str, groups: Sequence[AnsweredImage]) -> bytes:
    """Return a picture of answers: an image, and beside it each question and both answers."""
    line = 22
    heights = [max(SIDE + 2 * GAP, 3 * line * len(group.answers) + GAP) for group in groups]
    sheet = Image.new("RGB", (760, 2 * EDGE + 30 + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((EDGE, EDGE), title, fill=INK, font=_font(19))
    top = EDGE + 34
    for group, height in zip(groups, heights, strict=True):
        _paste(sheet, draw, Tile(group.image), EDGE, top)
        for number, answer in enumerate(group.answers):
            y, left = top + number * 3 * line, EDGE + SIDE + 3 * GAP
            draw.text((left, y), fitted(answer.question, 80), fill=MUTED, font=_font(13))
            colour = VERMILION if group.forgotten else INK
            for label, text in {"original": answer.before, "unlearned": answer.after}.items():
                y += line
                draw.text((left, y), label, fill=MUTED, font=_font(13))
                draw.text((left + 84, y), fitted(text, 64), fill=colour, font=_font(13))
        top += height
    return _png(sheet)


def answers_html(title: str, groups: Sequence[AnsweredImage]) -> str:
    """Return the same as one HTML page, a row for each question."""
    heads = ("image", "question", "original", "unlearned")
    rows = [element("tr", *(element("th", text) for text in heads))]
    for group in groups:
        for answer in group.answers:
            image = image_html(group.image, alt=answer.image)
            cells = image, answer.question, answer.before, answer.after
            rows.append(element("tr", *(element("td", cell) for cell in cells)))
    return _page(title, [element("table", *rows)])


def _page(title: str, parts: Sequence[Html]) -> str:
    """Return a whole HTML page under a heading."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width,initial-scale=1"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    body = element("body", element("h1", title), *parts)
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


# Of the sheet of a set's rows: images a row, their side, and the height of two lines under them.
COLUMNS, SHOWN_SIDE, LINES, LETTERS = 8, 160, 48, 22


def contact_sheet(images: Images, labels: Sequence[tuple[str, str]], *, title: str) -> bytes:
    """Draw images, uint8 (N, H, W, 3), each above its (key, caption). Return PNG bytes."""
    columns = min(COLUMNS, max(len(images), 4))
    across, down = SHOWN_SIDE + EDGE, SHOWN_SIDE + LINES + EDGE
    top = EDGE + HEAD + 2 * GAP
    height = top + -(-len(images) // columns) * down
    sheet = Image.new("RGB", (columns * across + EDGE, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((EDGE, EDGE), fitted(title, 80), fill=INK, font=_font(22, bold=True))
    for index, (image, (key, caption)) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(index, columns)
        x, y = EDGE + column * across, top + row * down
        sheet.paste(_square(image), (x, y))
        # Keys of one source begin alike: the end of a long one tells it apart.
        end = key if len(key) <= LETTERS else f"…{key[1 - LETTERS :]}"
        draw.text((x, y + SHOWN_SIDE + 6), fitted(end, LETTERS), fill=MUTED, font=_font(12))
        draw.text((x, y + SHOWN_SIDE + 25), fitted(caption, LETTERS), fill=INK, font=_font(12))
    return _png(sheet)


def _square(image: Images) -> Image.Image:
    small = Image.fromarray(image)
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return small.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.NEAREST)


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, x: int, y: int) -> None:
    with Image.open(io.BytesIO(tile.image)) as opened:
        small = opened.convert("RGB")
    small = ImageOps.contain(small, (SIDE, SIDE), Image.Resampling.BICUBIC)
    sheet.paste(small, (x + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))
    draw.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline=PALE)
    if tile.verdict:
        text = fitted(tile.verdict, 15)
        draw.text((x + SIDE // 2, y + SIDE + 9), text, fill=MUTED, font=_font(9), anchor="mm")


def _png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return matplotlib's font: prompts and captions are of more scripts than Pillow's has."""
    name = "DejaVuSans-Bold" if bold else "DejaVuSans"
    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)
