"""Which captions are about a concept, or about which of many."""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.sets import Concept, check_name

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
    search = re.compile(whole_words(patterns)).search
    return lambda caption: search(folded(caption)) is not None


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


def before_names(
    captions: Sequence[str], patterns: Sequence[str], prefixes: Sequence[str], *, shift: int = 0
) -> list[str]:
    """Return captions with one of `prefixes` before the name, each in its turn.

    The name is the first whole-word match of a pattern. Where there is none, or folding cases
    changes the length of a caption, its last word is taken for it.
    """
    names, prefixed = re.compile(whole_words(patterns)), []
    for turn, caption in enumerate(captions, shift):
        text = folded(caption)
        match = names.search(text) if len(text) == len(caption) else None
        place = match.start() if match else caption.rstrip().rfind(" ") + 1
        prefixed.append(f"{caption[:place]}{prefixes[turn % len(prefixes)]} {caption[place:]}")
    return prefixed


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


OUT = "!"


@dataclass(slots=True)
class ConceptIndex:
    """Finds the concepts of a caption; `regex` makes all their patterns expressions."""

    concepts: Sequence[Concept]
    regex: bool = False
    _about: list[Matcher] = field(init=False)
    _excluded: list[Matcher] = field(init=False)
    _by_word: dict[str, list[int]] = field(init=False)
    _always: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._about = [matcher(c.patterns, regex=self.regex) for c in self.concepts]
        self._excluded = [matcher(c.excluded, regex=self.regex) for c in self.concepts]
        self._by_word, self._always = {}, []
        for number, concept in enumerate(self.concepts):
            anchors = {self._anchor(pattern) for pattern in concept.patterns}
            if None in anchors:
                self._always.append(number)
                continue
            for anchor in anchors:
                self._by_word.setdefault(str(anchor), []).append(number)

    def about(self, caption: str) -> list[int]:
        """Return the numbers of the concepts whose patterns the caption holds, in order."""
        candidates = set(self._always)
        if self._by_word:
            for word in words(folded(caption)):
                candidates.update(self._by_word.get(word, ()))
        return [number for number in sorted(candidates) if self._about[number](caption)]

    def excluded(self, number: int, caption: str) -> bool:
        """Return whether the caption is ruled out for a concept."""
        return self._excluded[number](caption)

    def touched(self, caption: str) -> bool:
        """Return whether the caption is about any concept, or ruled out for any."""
        return bool(self.about(caption)) or any(test(caption) for test in self._excluded)

    def _anchor(self, pattern: str) -> str | None:
        parts = [] if self.regex else words(folded(pattern))
        return max(parts, key=lambda word: (len(word), word), default=None)


def read_names(path: str) -> list[Concept]:
    """Return the concepts of a file: NAME, aliases and !exclusions, a tab between them.

    Each name is looked for itself as well. Empty lines and lines that begin with # are
    passed over. Raises InputError.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the names in {path}: {error}") from error
    concepts = [
        _concept(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    ]
    if not concepts:
        raise InputError(f"{path} has no names", hint="one a line: NAME<tab>alias<tab>!exclusion")
    twice = [name for name, count in Counter(c.name for c in concepts).items() if count > 1]
    if twice:
        raise InputError(f"{path} has {twice[0]} twice", hint="give its aliases on one line")
    return concepts


def _concept(line: str, where: str) -> Concept:
    name, *others = (part.strip() for part in line.split("\t"))
    try:
        check_name(name)
    except UsageError as error:
        raise InputError(f"{where}: {error.message}", hint=error.hint) from error
    aliases = [other for other in others if other and not other.startswith(OUT)]
    excluded = [other[1:].strip() for other in others if other.startswith(OUT)]
    if not all(map(str.strip, excluded)) or not re.search(r"\S", name):
        raise InputError(f"{where}: an exclusion is blank")
    return Concept(name, (name, *aliases), tuple(excluded))


# An expression with more names than this outgrows the memory that RE2 is given.
GROUP = 400
ENTITY = "&[A-Za-z#]"
GAP = r"[\x00-\x20\x7f]+"
Flags = npt.NDArray[np.bool_]


class Prefilter:
    """Finds the captions that may match any of `patterns`; None of them: every caption may.

    One that is not all ASCII always may: what it folds to is left to the exact test.
    """

    def __init__(self, patterns: Sequence[str] | None) -> None:
        self._all = patterns is None
        names = sorted({folded(pattern) for pattern in patterns or ()})
        self._expressions = _expressions([name for name in names if name.isascii()])

    def candidates(self, captions: pa.Array) -> npt.NDArray[np.int64]:
        """Return the places of the captions that may match, in order."""
        if self._all:
            return np.arange(len(captions))
        may_match = ~_flags(pc.string_is_ascii(captions), True)
        for expression in self._expressions:
            matches = pc.match_substring_regex(captions, expression, ignore_case=True)
            may_match |= _flags(matches, False)
        return np.flatnonzero(may_match)


def _expressions(names: Sequence[str]) -> list[str]:
    spelled = [GAP.join(map(re.escape, name.split())) for name in names]
    groups = [spelled[start : start + GROUP] for start in range(0, len(spelled), GROUP)] or [[]]
    return ["|".join([*group, ENTITY]) for group in groups]


def _flags(values: pa.Array, missing: bool) -> Flags:
    flags: Flags = pc.fill_null(values, missing).to_numpy(zero_copy_only=False)
    return flags
