"""Class names, templates and other names that options give: built-in ones, or files."""

from collections.abc import Sequence

import fsspec

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.sources.prompts import (
    CLASS_NAMES,
    TEMPLATE_NAMES,
    ClassList,
    builtin_classes,
    builtin_templates,
    parse_classes,
    parse_names,
    parse_templates,
)


def read_classes(name: str) -> ClassList | None:
    """Return a built-in list of classes or that of a file; None if labels are the names."""
    if name in CLASS_NAMES:
        return builtin_classes(name)
    return parse_classes(_text(name, "--classes", CLASS_NAMES), name)


def read_templates(name: str) -> tuple[str, ...]:
    """Return built-in templates, or those of a file."""
    if name in TEMPLATE_NAMES:
        return builtin_templates(name)
    return parse_templates(_text(name, "--templates", TEMPLATE_NAMES), name)


def read_names(path: str) -> tuple[tuple[str, str], ...]:
    """Return the other names of a concept in a file, each with its kind."""
    return parse_names(_text(path, "--spellings", ()), path)


def _text(path: str, option: str, names: Sequence[str]) -> str:
    hint = f"give {option} a file" + (f", or one of: {', '.join(names)}" if names else "")
    try:
        with fsspec.open(path, "r", encoding="utf-8-sig") as file:
            return str(file.read())
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path}", hint=hint) from error
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot read {path}: {error}", hint=hint) from error
