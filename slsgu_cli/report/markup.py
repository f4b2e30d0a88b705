"""Building blocks of a page: elements as text in which everything foreign is escaped.

Names, captions and paths may hold anything. Text becomes part of a page through `text`
alone, and `element` passes all that is not `Html` through it.
"""

import html
from collections.abc import Iterable

from slsgu_cli.tables import printable

VOID = frozenset({"br", "col", "hr", "img", "meta"})
# Characters that reorder what follows them, so that a name could pass for another.
_REORDERING = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = Html | str | None
Attribute = str | int | float | bool | None


def text(value: str) -> Html:
    """Return any text so that a browser shows it literally."""
    readable = printable(value).translate(_REORDERING)
    # A lone surrogate has no encoding; the page shows its number.
    whole = readable.encode("utf-8", "backslashreplace").decode()
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
