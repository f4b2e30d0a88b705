"""A contact sheet: many small images with their keys and captions, on one page."""

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from slsgu_cli.canvas import INK, MUTED, blank, plain, png

Images = npt.NDArray[np.uint8]
COLUMNS = 8
SIDE, GAP, TEXT = 1.0, 0.12, 0.34
TOP = 0.42
LETTERS = 22


def contact_sheet(images: Images, labels: Sequence[tuple[str, str]], *, title: str) -> bytes:
    """Draw images, uint8 (N, H, W, 3), each above its (key, caption). Return PNG bytes."""
    columns = min(COLUMNS, max(len(images), 4))
    rows = -(-len(images) // columns)
    width = columns * (SIDE + GAP) + GAP
    height = TOP + rows * (SIDE + TEXT + GAP)
    figure = blank(width, height)
    figure.text(
        GAP / width,
        1 - TOP / 2 / height,
        plain(title),
        color=INK,
        fontsize=11,
        fontweight="bold",
        va="center",
    )
    for index, (image, (key, caption)) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(index, columns)
        left = GAP + column * (SIDE + GAP)
        bottom = height - TOP - row * (SIDE + TEXT + GAP) - SIDE
        axes = figure.add_axes((left / width, bottom / height, SIDE / width, SIDE / height))
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
    side = round(SIDE * 160)
    small = Image.fromarray(image)
    small.thumbnail((side, side))
    return np.asarray(small)
