"""HTML from Jinja templates. Text from data is escaped; only templates make markup."""

import base64
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from slsgu_cli.progress import terminal_safe


def render(package: str, template: str, **values: Any) -> Markup:
    """Return a template from the folder `templates` of a package, filled with values."""
    return Markup(_environment(package).get_template(template).render(values))


@cache
def _environment(package: str) -> Environment:
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_literal,
    )
    environment.filters["png_url"] = _png_url
    return environment


def _literal(value: Any) -> Any:
    """Replace characters that browsers would act on, and lone surrogates, which have no bytes."""
    if isinstance(value, Markup):
        return value
    return terminal_safe(str(value)).encode("utf-8", "backslashreplace").decode()


def _png_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
