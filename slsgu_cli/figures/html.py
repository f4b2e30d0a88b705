"""Elements, tables and figures as text in which everything foreign is escaped."""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slsgu_cli.progress import terminal_safe
from slsgu_cli.records.figures import Share

VOID = frozenset({"br", "col", "hr", "img", "meta"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = Html | str | None
Attribute = str | int | float | bool | None


def text(value: str) -> Html:
    """Return any text so that a browser shows it literally."""
    # A lone surrogate has no encoding; the page shows its number.
    whole = terminal_safe(value).encode("utf-8", "backslashreplace").decode()
    return Html(html.escape(whole))


def element(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """Return an element. `class_` is the attribute class; underscores become hyphens.

    Attributes that are None or False are left out, True stands alone.
    """
    head = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        known_as = key.rstrip("_").replace("_", "-")
        head += f" {known_as}" if value is True else f' {known_as}="{text(str(value))}"'
    if name in VOID:
        return Html(f"<{head}>")
    return Html(f"<{head}>{joined(children)}</{name}>")


def joined(children: Iterable[Child], between: str = "") -> Html:
    """Return children one after another; None is nothing."""
    parts = (child if isinstance(child, Html) else text(child) for child in children if child)
    return Html(text(between).join(parts))


def percent(value: float) -> str:
    """Return a percentage with two decimals."""
    return f"{value:.2f}%"


def roughly(value: float) -> str:
    """Return a percentage with one decimal."""
    return f"{value:.1f}%"


def share(value: float) -> str:
    """Return a share of a layer's norm in percent, to three digits."""
    return f"{100 * value:.3g}%"


def change(value: float) -> str:
    """Return a difference of percentages, in points, with a real minus sign."""
    shown = f"{abs(value):.2f}"
    if float(shown) == 0:
        return shown
    return f"{'−' if value < 0 else '+'}{shown}"


def number(value: float) -> str:
    """Return a number to four digits, with a real minus sign."""
    if value == 0 or not 1e-6 <= abs(value) < 1e6:
        shown = f"{value:.4g}"
    else:
        shown = f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
        shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return shown.replace("-", "−")


def cosine(value: float) -> str:
    """Return a cosine with two decimals, with a real minus sign."""
    shown = f"{value:.2f}"
    return "0.00" if float(shown) == 0 else shown.replace("-", "−")


def count(value: int) -> str:
    """Return an integer with thousands set apart."""
    return f"{value:,}"


def interval(share: Share) -> str:
    """Return the exact 95% interval of a share."""
    low, high = share.interval
    return f"{low:.1f} to {high:.1f}%"


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a column; figures stand right-aligned."""

    label: str
    figures: bool = True


def table(
    heads: Sequence[Head],
    rows: Sequence[Sequence[Child]],
    *,
    caption: str,
    marked: Sequence[int] = (),
) -> Html:
    """Return a table whose first column names its rows; rows in `marked` stand out.

    It scrolls sideways by itself where the page is too narrow for it.
    """
    top = element(
        "tr",
        *(element("th", h.label, scope="col", class_="fig" * h.figures or None) for h in heads),
    )
    body = [
        element(
            "tr",
            element("th", row[0], scope="row", class_="fig" * heads[0].figures or None),
            *(
                element("td", cell or "–", class_="fig" * head.figures or None)
                for head, cell in zip(heads[1:], row[1:], strict=True)
            ),
            class_="marked" if index in marked else None,
        )
        for index, row in enumerate(rows)
    ]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", top),
        element("tbody", *body),
    )
    return scrolled(whole, caption)


def scrolled(content: Html, label: str) -> Html:
    """Return wide content in a region that scrolls sideways, by keyboard as well."""
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def terms(pairs: Mapping[str, Child]) -> Html:
    """Return terms with what they stand for; those that stand for nothing are left out."""
    rows = [
        element("div", element("dt", term), element("dd", value))
        for term, value in pairs.items()
        if value
    ]
    return element("dl", *rows)


def figure_of(content: Html, caption: Child, class_: str | None = None) -> Html:
    """Return content with a caption."""
    return element("figure", content, element("figcaption", caption), class_=class_)


def code(value: str) -> Html:
    """Return a name, path or digest as code that may break anywhere."""
    return element("code", value)


def lines(values: Sequence[Child]) -> Html:
    """Return values, each on a line of its own."""
    return joined(element("span", value, class_="line") for value in values)


def paragraph(*children: Child, class_: str | None = None) -> Html:
    """Return a paragraph."""
    return element("p", *children, class_=class_)


def image_html(png: bytes, *, alt: str, **attributes: Attribute) -> Html:
    """Return an image, PNG bytes, inside the page."""
    data = base64.b64encode(png).decode()
    return element("img", src=f"data:image/png;base64,{data}", alt=alt, **attributes)
