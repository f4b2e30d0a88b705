"""Contact sheets as PNG and HTML."""

import base64
import html
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from slsgu_cli.figures.curves import FAINT, INK, MUTED, PALE, VERMILION, blank, plain, png
from slsgu_cli.records.targets import Answer

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
        draw.text((EDGE, top + 8), fitted(strip.title, 60), fill=colour, font=_font(15))
        for number, (label, tiles) in enumerate(strip.rows.items()):
            y = top + HEAD + number * row
            draw.text((EDGE, y + SIDE // 2 - 8), label, fill=MUTED, font=_font(14))
            for place, tile in enumerate(tiles):
                _paste(sheet, draw, tile, EDGE + LABEL + place * (SIDE + GAP), y)
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def sheet_html(title: str, notes: Sequence[str], strips: Sequence[Strip], table: str = "") -> str:
    """Return the same as one HTML page that holds its images and needs nothing else."""
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes)]
    parts.append(table)
    for strip in strips:
        kind = ' class="forgotten"' if strip.forgotten else ""
        parts.append(f"<h2{kind}>{html.escape(strip.title)}</h2>")
        for label, tiles in strip.rows.items():
            images = "".join(_figure(tile, f"{strip.title}, {label}") for tile in tiles)
            parts.append(f'<div class="row"><b>{html.escape(label)}</b>{images}</div>')
    return page(title, "\n".join(parts))


def answers_png(title: str, groups: Sequence[tuple[bytes, bool, Sequence[Answer]]]) -> bytes:
    """Return a picture of answers: an image, and beside it each question and both answers.

    A group is an image as PNG, whether it shows what is forgotten, and its answers.
    """
    line, least = 22, SIDE + 2 * GAP
    heights = [max(least, 3 * line * len(answers) + GAP) for _, _, answers in groups]
    sheet = Image.new("RGB", (760, 2 * EDGE + 30 + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((EDGE, EDGE), title, fill=INK, font=_font(19))
    top = EDGE + 34
    for (image, forgotten, answers), height in zip(groups, heights, strict=True):
        _paste(sheet, draw, Tile(image), EDGE, top)
        for number, answer in enumerate(answers):
            y, left = top + number * 3 * line, EDGE + SIDE + 3 * GAP
            draw.text((left, y), fitted(answer.question, 80), fill=MUTED, font=_font(13))
            colour = VERMILION if forgotten else INK
            for place, (label, text) in enumerate(
                (("original", answer.before), ("unlearned", answer.after)), start=1
            ):
                draw.text((left, y + place * line), label, fill=MUTED, font=_font(14))
                draw.text(
                    (left + 84, y + place * line), fitted(text, 64), fill=colour, font=_font(14)
                )
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def page(title: str, body: str) -> str:
    """Return a whole HTML page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def data_url(image: bytes) -> str:
    """Return PNG bytes as a URL that holds them."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def fitted(text: str, limit: int) -> str:
    """Return a text on one line, cut to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _figure(tile: Tile, about: str) -> str:
    caption = f"<figcaption>{html.escape(tile.verdict)}</figcaption>" if tile.verdict else ""
    alt = html.escape(about, quote=True)
    return f'<figure><img alt="{alt}" src="{data_url(tile.image)}">{caption}</figure>'


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, x: int, y: int) -> None:
    with Image.open(io.BytesIO(tile.image)) as opened:
        small = opened.convert("RGB")
    small = ImageOps.contain(small, (SIDE, SIDE), Image.Resampling.BICUBIC)
    sheet.paste(small, (x + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))
    draw.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline=PALE)
    if tile.verdict:
        text = fitted(tile.verdict, 15)
        draw.text((x + SIDE // 2, y + SIDE + 9), text, fill=MUTED, font=_font(11), anchor="mm")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


Images = npt.NDArray[np.uint8]
COLUMNS = 8
IMAGE_INCH, GAP_INCH, TEXT_INCH = 1.0, 0.12, 0.34
HEAD_INCH = 0.42
LETTERS = 22


def contact_sheet(images: Images, labels: Sequence[tuple[str, str]], *, title: str) -> bytes:
    """Draw images, uint8 (N, H, W, 3), each above its (key, caption). Return PNG bytes."""
    columns = min(COLUMNS, max(len(images), 4))
    rows = -(-len(images) // columns)
    width = columns * (IMAGE_INCH + GAP_INCH) + GAP_INCH
    height = HEAD_INCH + rows * (IMAGE_INCH + TEXT_INCH + GAP_INCH)
    figure = blank(width, height)
    figure.text(
        GAP_INCH / width,
        1 - HEAD_INCH / 2 / height,
        plain(title),
        color=INK,
        fontsize=11,
        fontweight="bold",
        va="center",
    )
    for index, (image, (key, caption)) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(index, columns)
        left = GAP_INCH + column * (IMAGE_INCH + GAP_INCH)
        bottom = height - HEAD_INCH - row * (IMAGE_INCH + TEXT_INCH + GAP_INCH) - IMAGE_INCH
        axes = figure.add_axes(
            (left / width, bottom / height, IMAGE_INCH / width, IMAGE_INCH / height)
        )
        axes.imshow(_thumbnail(image), interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        for line, (text, colour) in enumerate(((key, MUTED), (caption, INK))):
            place = (bottom - 0.06 - 0.12 * line) / height
            label = plain(_end(text) if line == 0 else text, LETTERS)
            figure.text(left / width, place, label, color=colour, fontsize=5.6, va="top")
    with warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box; the captions are printed as well.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        return png(figure)


def _end(key: str) -> str:
    """Return the end of a long key: keys of one source begin alike."""
    return key if len(key) <= LETTERS else f"…{key[1 - LETTERS :]}"


def _thumbnail(image: Images) -> Images:
    side = round(IMAGE_INCH * 160)
    small = Image.fromarray(image)
    small.thumbnail((side, side))
    return np.asarray(small)
