"""Which captions speak of the concept: whole words, or regular expressions.

Captions and patterns are compared as a reader would: HTML entities resolved, Unicode's
compatibility forms (NFKC) and cases folded, quotes and hyphens of all shapes as one,
invisible characters gone. A whole word is one that no word character touches. Look-arounds
say so rather than `\\b`, because names such as `c++` and `.net` begin or end with
characters that are no letters. Scripts that put no space between words (Chinese, Japanese,
Thai, ...) end no word and touch none: a name is found anywhere in them.
"""

import html
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

from slsgu_cli.errors import UsageError

Matcher = Callable[[str], bool]

# Thai, Lao, Myanmar, Khmer; kana and Han, their extensions included.
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# What NFKC would spell out as letters that touch the name before them, or leave apart.
SIGNS = (
    dict.fromkeys(map(ord, "™℠©®\u200b"), " ")
    | dict.fromkeys(map(ord, "\u00ad\u200c\u200d\u200e\u200f\u2060\ufeff"), None)
    | dict.fromkeys(map(ord, "‘’‛ʼ＇"), "'")
    | dict.fromkeys(range(0x2010, 0x2016), "-")
)


def matcher(patterns: Sequence[str], *, regex: bool = False) -> Matcher:
    """Return a test for captions that contain any of `patterns`, whatever the case.

    Patterns are whole words (white space in them stands for any run of it) or, with
    `regex`, regular expressions found anywhere in the caption as `readable` returns it.
    Without patterns nothing matches. Raises UsageError for a blank pattern or a malformed
    expression.
    """
    if not patterns:
        return lambda caption: False
    for pattern in patterns:
        if not folded(pattern).strip():
            raise UsageError("a pattern to match captions by is blank")
    if regex:
        tests = [_expression(readable(pattern)) for pattern in patterns]
        return lambda caption: any(test.search(readable(caption)) for test in tests)
    found = re.compile(whole_words(patterns)).search
    return lambda caption: found(folded(caption)) is not None


def readable(text: str) -> str:
    """Return `text` without entities and signs that are written in many ways (NFKC)."""
    if "&" in text:
        # Twice, as CLIP's tokenizers do.
        text = html.unescape(html.unescape(text))
    if text.isascii():
        return text
    return unicodedata.normalize("NFKC", text.translate(SIGNS)).translate(SIGNS)


def folded(text: str) -> str:
    """Return `readable` text with cases folded: what whole words are looked for in."""
    text = readable(text)
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", text.casefold())


def whole_words(patterns: Sequence[str]) -> str:
    """Return a regular expression for any of the patterns as whole words of `folded` text."""
    return "|".join(_bounded(folded(pattern).split()) for pattern in patterns)


def words(text: str) -> list[str]:
    """Return the words of `folded` text: what lies between whole words' bounds."""
    return _word().findall(text)


@cache
def _word() -> re.Pattern[str]:
    return re.compile(f"{_touching()}+")


@cache
def _touching() -> str:
    """Return an expression for one character of a word, whose neighbour begins no other."""
    return rf"(?:[^\W{SPACELESS}]|[{_marks()}])"


def _bounded(parts: list[str]) -> str:
    touching = _touching()
    before = "" if _spaceless(parts[0][0]) else rf"(?<!{touching})"
    after = "" if _spaceless(parts[-1][-1]) else rf"(?!{touching})"
    return before + r"\s+".join(map(re.escape, parts)) + after


def _spaceless(character: str) -> bool:
    return re.fullmatch(f"[{SPACELESS}]", character) is not None


@cache
def _marks() -> str:
    """Return the combining marks as a class: they belong to the word, which `\\w` denies."""
    marks = [
        chr(code)
        for code in range(0x300, 0x1E00)
        if unicodedata.category(chr(code)).startswith("M") and not _spaceless(chr(code))
    ]
    return "".join(marks)


def _expression(source: str) -> re.Pattern[str]:
    try:
        return re.compile(source, re.IGNORECASE)
    except re.error as error:
        raise UsageError(
            f"{source!r} is not a regular expression: {error}",
            hint="leave --regex out to match the words as they are written",
        ) from error
