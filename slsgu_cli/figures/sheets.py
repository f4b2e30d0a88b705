"""Contact sheets of images, as PNG and as HTML pages."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps

from slsgu_cli.figures.pictures import Images
from slsgu_cli.figures.style import INK, MUTED, PALE, VERMILION, fitted
from slsgu_cli.figures.templates import render
from slsgu_cli.records.targets import Answer

# Sizes in pixels: a thumbnail, gaps and edges, the labels left of rows, a heading.
SIDE = 96
GAP, EDGE, LABEL, HEAD = 6, 18, 92, 34


@dataclass(frozen=True, slots=True)
class Tile:
    """One image of a sheet, as PNG, with the judge's verdict."""

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
    """Return the sheet as one self-contained HTML page."""
    return render("slsgu_cli.figures", "sheet.html", title=title, notes=notes, strips=strips)


@dataclass(frozen=True, slots=True)
class AnsweredImage:
    """An image as PNG, whether it shows the forgotten concept, and the answers about it."""

    image: bytes
    forgotten: bool
    answers: Sequence[Answer]


def answers_png(title: str, groups: Sequence[AnsweredImage]) -> bytes:
    """Draw images, each next to its questions and both answers. Return PNG bytes."""
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
    """Return the answers as one self-contained HTML page, a row for each question."""
    return render("slsgu_cli.figures", "answers.html", title=title, groups=groups)


# In a contact sheet: images per row, their side, the height of the two lines below, letters.
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
        # Keys of one source begin alike, so the end of a long one says more.
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
    """Return matplotlib's font, which covers more scripts than Pillow's."""
    name = "DejaVuSans-Bold" if bold else "DejaVuSans"
    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)
