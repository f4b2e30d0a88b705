"""Texts as sources contain them: fields, labels as words, captions that can be tokenized."""

import re
from typing import Any

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


def as_text(value: Any) -> str | None:
    """Return a field as stripped text; None if it is missing or blank.

    Of a list of captions, only the first is used.
    """
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return (str(value).strip() or None) if value is not None else None


def label_words(label: str) -> str:
    """Return a label as words: folder names often have underscores instead of spaces."""
    return " ".join(label.replace("_", " ").split())


def tokenizable(text: str) -> str:
    """Return `text` with NULs, other control characters and lone surrogates as spaces.

    Tokenizers would treat them as letters or fail. Line breaks stay, because they are white space.
    """
    return _UNPRINTABLE.sub(" ", text).strip()
