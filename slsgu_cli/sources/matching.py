"""Matching captions against the names of a concept, as whole words or regular expressions."""

import html
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

from slsgu_cli.errors import UsageError

Matcher = Callable[[str], bool]

# Thai, Lao, Myanmar, Khmer; kana and Han, their extensions included.
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)

# Characters that NFKC would turn into letters of the word before them, or would not unify.
SIGNS = (
    dict.fromkeys(map(ord, "™℠©®\u200b"), " ")
    | dict.fromkeys(map(ord, "\u00ad\u200c\u200d\u200e\u200f\u2060\ufeff"), None)
    | dict.fromkeys(map(ord, "‘’‛ʼ＇"), "'")
    | dict.fromkeys(range(0x2010, 0x2016), "-")
)


def matcher(patterns: Sequence[str], *, regex: bool = False) -> Matcher:
    """Return a case-insensitive test for captions that contain any of `patterns`.

    Patterns are whole words, separated by any white space, or, with `regex`, regular
    expressions that match anywhere in the caption as `readable` returns it. No caption matches
    an empty list of patterns. Raises UsageError for a blank pattern or a malformed expression.
    """
    if not patterns:
        return lambda caption: False
    for pattern in patterns:
        if not folded(pattern).strip():
            raise UsageError("a pattern is blank", hint="give one or more words of the captions")
    if regex:
        tests = [_expression(readable(pattern)) for pattern in patterns]
        return lambda caption: any(test.search(readable(caption)) for test in tests)
    search = re.compile(whole_words(patterns)).search
    return lambda caption: search(folded(caption)) is not None


def readable(text: str) -> str:
    """Return `text` with HTML entities decoded and equivalent characters unified (NFKC)."""
    if "&" in text:
        # Twice, as CLIP's tokenizers do.
        text = html.unescape(html.unescape(text))
    if text.isascii():
        return text
    return unicodedata.normalize("NFKC", text.translate(SIGNS)).translate(SIGNS)


@lru_cache(maxsize=1)
def folded(text: str) -> str:
    """Return `readable` text with case folded, in which `whole_words` searches.

    The last result is cached, because one caption is matched against many concepts.
    """
    text = readable(text)
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", text.casefold())


def whole_words(patterns: Sequence[str]) -> str:
    """Return a regular expression for any of the patterns as whole words of `folded` text.

    It checks for the beginning of a word once at each position, not once for each pattern.
    """
    words = [folded(pattern).split() for pattern in patterns]
    inside = [parts for parts in words if _spaceless(parts[0][0])]
    apart = [parts for parts in words if not _spaceless(parts[0][0])]
    anywhere = [_ending(parts) for parts in inside]
    if not apart:
        return "|".join(anywhere)
    return "|".join([rf"(?<!{_word_character()})(?:{'|'.join(map(_ending, apart))})", *anywhere])


def before_names(
    captions: Sequence[str], patterns: Sequence[str], prefixes: Sequence[str], *, shift: int = 0
) -> list[str]:
    """Return captions with one of `prefixes` before the name, cycling through the prefixes.

    The name is the first whole-word match of a pattern. If nothing matches, or case folding
    changes the length of a caption, its last word counts as the name.
    """
    names, prefixed = re.compile(whole_words(patterns)), []
    for number, caption in enumerate(captions, shift):
        text = folded(caption)
        match = names.search(text) if len(text) == len(caption) else None
        place = match.start() if match else caption.rstrip().rfind(" ") + 1
        prefixed.append(f"{caption[:place]}{prefixes[number % len(prefixes)]} {caption[place:]}")
    return prefixed


def in_place_of_names(captions: Sequence[str], patterns: Sequence[str], other: str) -> list[str]:
    """Return captions with `other` in place of each name.

    A name is a whole-word match of a pattern. If nothing matches, or case folding changes the
    length of a caption, or `other` is blank, it replaces the whole caption.
    """
    names, replaced = re.compile(whole_words(patterns)), []
    for caption in captions:
        text, parts, end = folded(caption), list[str](), 0
        if len(text) == len(caption) and other.strip():
            for match in names.finditer(text):
                parts += [caption[end : match.start()], other]
                end = match.end()
        replaced.append("".join([*parts, caption[end:]]) if parts else other)
    return replaced


def up_to_names(captions: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return captions up to the end of their first name; whole if none is found in place."""
    names, ended = re.compile(whole_words(patterns)), []
    for caption in captions:
        text = folded(caption)
        match = names.search(text) if len(text) == len(caption) else None
        ended.append(caption[: match.end()] if match else caption)
    return ended


def words(text: str) -> list[str]:
    """Return the words of `folded` text."""
    return _word().findall(text)


@cache
def _word() -> re.Pattern[str]:
    return re.compile(f"{_word_character()}+")


@cache
def _word_character() -> str:
    """Return an expression for one character of a word in a script with spaces.

    Combining marks belong to the word, although `\\w` excludes them.
    """
    codes = range(0x300, 0x1E00)
    marks = [chr(code) for code in codes if unicodedata.category(chr(code)).startswith("M")]
    inside = "".join(mark for mark in marks if not _spaceless(mark))
    return rf"(?:[^\W{SPACELESS}]|[{inside}])"


def _ending(parts: list[str]) -> str:
    """Return an expression for consecutive words, the last of which ends at a word boundary."""
    after = "" if _spaceless(parts[-1][-1]) else rf"(?!{_word_character()})"
    return r"\s+".join(map(re.escape, parts)) + after


def _spaceless(character: str) -> bool:
    return re.fullmatch(f"[{SPACELESS}]", character) is not None


def _expression(source: str) -> re.Pattern[str]:
    try:
        return re.compile(source, re.IGNORECASE)
    except re.error as error:
        raise UsageError(
            f"{source!r} is not a regular expression: {error}",
            hint="omit --regex to match the words literally",
        ) from error
