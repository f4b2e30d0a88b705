"""Images inside the page: thumbnails as data, guesses as bars, cosines as tinted tables."""

import base64
import io
from collections.abc import Sequence

from PIL import Image

from slsgu_cli.pictures import Example, Guesses, Images, Matrix
from slsgu_cli.report.figures import cosine
from slsgu_cli.report.grids import scrolled
from slsgu_cli.report.markup import Html, element

# Twice the size at which they are shown, for screens and printers of high density.
THUMBNAIL, PICTURE = 64, 192


def picture(image: Images, *, alt: str, size: int, class_: str) -> Html:
    """Return an image of at most `size` pixels a side, inside the page as PNG data."""
    small = Image.fromarray(image)
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return element(
        "img",
        src=f"data:image/png;base64,{data}",
        alt=alt,
        width=small.width,
        height=small.height,
        class_=class_,
    )


def example_card(example: Example, *, concept: str, number: int) -> Html:
    """Return an image with its most probable names before and after."""
    forgotten = example.label == concept
    shown = picture(
        example.image, alt=f"image {number}, of {example.label}", size=PICTURE, class_="picture"
    )
    head = element("h4", example.label, class_="forgotten" if forgotten else None)
    before = _guesses("before", example.before, example.label)
    after = _guesses("after", example.after, example.label)
    return element("article", element("div", shown, head, class_="subject"), before, after,
                   class_="example")  # fmt: skip


def _guesses(when: str, guesses: Guesses, label: str) -> Html:
    rows = []
    for name, probability in guesses:
        share = f"{100 * probability:.1f}"
        bar = element(
            "span", element("i", style=f"width:{share}%"), class_="bar", aria_hidden="true"
        )
        rows.append(
            element(
                "tr",
                element("th", name, scope="row"),
                element("td", bar, class_="bars", aria_hidden="true"),
                element("td", f"{share}%", class_="fig"),
                class_="true" if name == label else None,
            )
        )
    return element("table", element("caption", when), element("tbody", *rows), class_="guesses")


def cosine_table(
    values: Matrix,
    names: Sequence[str],
    thumbnails: Images,
    *,
    span: tuple[float, float],
    caption: str,
) -> Html:
    """Return mean cosines of images (rows) with names (columns), tinted between `span`."""
    low, high = span
    corner = element("th", element("span", "images of", class_="quiet"), scope="col")
    columns = [
        element("th", element("span", name), scope="col", class_="turned" + " own" * (i == 0))
        for i, name in enumerate(names)
    ]
    rows = []
    for i, name in enumerate(names):
        small = picture(thumbnails[i], alt="", size=THUMBNAIL, class_="thumbnail")
        cells = []
        for j in range(len(names)):
            value = float(values[i, j])
            tint = (value - low) / (high - low) if high > low else 0.0
            own = "fig own" if i == j == 0 else "fig"
            cells.append(
                element("td", cosine(value), class_=own, style=f"--tint:{100 * tint:.0f}%")
            )
        head = element("th", element("span", small, element("span", name)), scope="row",
                       class_="own" if i == 0 else None)  # fmt: skip
        rows.append(element("tr", head, *cells))
    table = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", corner, *columns)),
        element("tbody", *rows),
        class_="cosines",
    )
    return scrolled(table, caption)
