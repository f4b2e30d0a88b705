"""Contact sheets: generated images, answers and the rows of a set, as PNG and HTML."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps

from slsgu_cli.figures.curves import FAINT, INK, MUTED, PALE, VERMILION
from slsgu_cli.figures.html import Html, element, image_html, paragraph
from slsgu_cli.records.targets import Answer

Images = npt.NDArray[np.uint8]

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
            images = [_tile_html(tile, f"{strip.title}, {label}") for tile in tiles]
            parts.append(element("div", element("b", label), *images, class_="row"))
    return _page(title, parts)


@dataclass(frozen=True, slots=True)
class AnsweredImage:
    """An image as PNG, whether it shows what is forgotten, and the answers about it."""

    image: bytes
    forgotten: bool
    answers: Sequence[Answer]


def answers_png(title: str, groups: Sequence[AnsweredImage]) -> bytes:
    """Return a picture of answers: an image, and beside it each question and both answers."""
    line, least = 22, SIDE + 2 * GAP
    heights = [max(least, 3 * line * len(group.answers) + GAP) for group in groups]
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
            for place, (label, text) in enumerate(
                (("original", answer.before), ("unlearned", answer.after)), start=1
            ):
                draw.text((left, y + place * line), label, fill=MUTED, font=_font(13))
                draw.text(
                    (left + 84, y + place * line), fitted(text, 64), fill=colour, font=_font(13)
                )
        top += height
    return _png(sheet)


def answers_html(title: str, groups: Sequence[AnsweredImage]) -> str:
    """Return the same as one HTML page, a row for each question."""
    heads = ("image", "question", "original", "unlearned")
    rows = [
        element("tr", *(element("td", cell) for cell in cells))
        for group in groups
        for answer in group.answers
        for cells in [
            (
                image_html(group.image, alt=answer.image),
                answer.question,
                answer.before,
                answer.after,
            )
        ]
    ]
    head = element("tr", *(element("th", text) for text in heads))
    return _page(title, [element("table", head, *rows)])


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


def _tile_html(tile: Tile, about: str) -> Html:
    caption = element("figcaption", tile.verdict) if tile.verdict else None
    return element("figure", image_html(tile.image, alt=about), caption)


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


def fitted(text: str, limit: int) -> str:
    """Return a text on one line, cut to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


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
