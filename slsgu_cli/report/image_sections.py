"""Sections on example images: the model's guesses and cosine similarities."""

import io
from typing import TYPE_CHECKING, Any

from PIL import Image

from slsgu_cli.figures.numbers import cosine, count
from slsgu_cli.report.sections import Section, absent, fill

if TYPE_CHECKING:
    from slsgu_cli.engine.examples import BeforeAfter
    from slsgu_cli.figures.pictures import Images, Matrix

IMAGES, COSINES = "Example images", "Cosine similarities"
# Twice the size at which they are shown, for screens and printers of high density.
THUMBNAIL, PICTURE = 64, 192


def no_images(trouble: str, run: str) -> list[Section]:
    """Return notices in place of both sections."""
    return [absent(title, trouble, run) for title in (IMAGES, COSINES)]


def _picture(image: "Images", size: int) -> dict[str, Any]:
    """Return an image as PNG, with sides of at most `size` pixels."""
    small = Image.fromarray(image)
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return {"png": buffer.getvalue(), "width": small.width, "height": small.height}


def examples(guesses: "BeforeAfter") -> Section:
    """Show images with the model's guesses before and after the edit."""
    cards = [(each, _picture(each.image, PICTURE)) for each in guesses.examples]
    return Section(IMAGES, fill("examples.html", concept=guesses.names[0], cards=cards))


def cosines(guesses: "BeforeAfter") -> Section:
    """Show the cosine similarity of images and names before and after the edit."""
    low = float(min(guesses.before.min(), guesses.after.min()))
    high = float(max(guesses.before.max(), guesses.after.max()))
    few, many = count(min(guesses.images)), count(max(guesses.images))
    content = fill(
        "cosines.html",
        names=guesses.names,
        thumbnails=[_picture(image, THUMBNAIL) for image in guesses.thumbnails],
        before=cosine(float(guesses.before[0, 0])),
        after=cosine(float(guesses.after[0, 0])),
        images=few if few == many else f"{few} to {many}",
        maps=[
            ("Before", _tinted(guesses.before, low, high)),
            ("After", _tinted(guesses.after, low, high)),
        ],
    )
    return Section(COSINES, content)


def _tinted(values: "Matrix", low: float, high: float) -> list[list[tuple[str, str]]]:
    """Return each cosine as text with its place between `low` and `high` in percent."""
    width = high - low or 1.0
    return [
        [(cosine(float(value)), f"{100 * (float(value) - low) / width:.0f}") for value in row]
        for row in values
    ]
