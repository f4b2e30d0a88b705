"""Tables, terms with what they stand for, and figures with captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slsgu_cli.report.markup import Child, Html, element, joined


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
    told = [
        element("div", element("dt", term), element("dd", value))
        for term, value in pairs.items()
        if value
    ]
    return element("dl", *told)


def figure(content: Html, caption: Child, class_: str | None = None) -> Html:
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
