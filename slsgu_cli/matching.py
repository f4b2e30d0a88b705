"""Which captions speak of the concept: whole words, or regular expressions.

A whole word is one that no word character touches. Look-arounds say so rather than `\\b`,
because names such as `c++` and `.net` begin or end with characters that are no letters.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

from slsgu_cli.errors import UsageError

Matcher = Callable[[str], bool]


def matcher(patterns: Sequence[str], *, regex: bool = False) -> Matcher:
    """Return a test for captions that contain any of `patterns`, whatever the case.

    Patterns are whole words (white space in them stands for any run of it) or, with
    `regex`, regular expressions found anywhere. Without patterns nothing matches.
    Raises UsageError for a blank pattern or a malformed expression.
    """
    if not patterns:
        return lambda caption: False
    for pattern in patterns:
        if not pattern.strip():
            raise UsageError("a pattern to match captions by is blank")
    sources = [_nfc(p) for p in patterns] if regex else [_whole_words(patterns)]
    tests = [_compile(source) for source in sources]
    return lambda caption: any(test.search(_nfc(caption)) for test in tests)


def _whole_words(patterns: Sequence[str]) -> str:
    words = (r"\s+".join(re.escape(word) for word in _nfc(p).split()) for p in patterns)
    return rf"(?<!\w)(?:{'|'.join(words)})(?!\w)"


def _compile(source: str) -> re.Pattern[str]:
    try:
        return re.compile(source, re.IGNORECASE)
    except re.error as error:
        raise UsageError(
            f"{source!r} is not a regular expression: {error}",
            hint="leave --regex out to match the words as they are written",
        ) from error


def _nfc(text: str) -> str:
    """Compose accents, so that one name written in two ways is one name."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)
