"""Texts about images: which captions are about a concept; class names, and prompts of them.

Class names and prompt templates of an evaluation set are built in, or come from a file or from
labels. Built in are ImageNet's names and templates (those of open_clip) and CelebA's template,
the bare name and a full stop. CelebA's release numbers its people and names none, so
CelebA's class names are the labels or folder names of the source.
"""

import html
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.sets import Concept
from slsgu_cli.sources.rows import label_words
from slsgu_cli.text import listed

if TYPE_CHECKING:
    import pyarrow as pa

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


@lru_cache(maxsize=1)
def folded(text: str) -> str:
    """Return `readable` text with cases folded: what whole words are looked for in.

    Patterns of many concepts are looked for in one caption after another.
    """
    text = readable(text)
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", text.casefold())


def whole_words(patterns: Sequence[str]) -> str:
    """Return a regular expression for any of the patterns as whole words of `folded` text.

    Where a word can begin is asked once at each place, not for each of many patterns.
    """
    words = [folded(pattern).split() for pattern in patterns]
    inside = [parts for parts in words if _spaceless(parts[0][0])]
    apart = [parts for parts in words if not _spaceless(parts[0][0])]
    anywhere = [_ending(parts) for parts in inside]
    if not apart:
        return "|".join(anywhere)
    return "|".join([rf"(?<!{_touching()})(?:{'|'.join(map(_ending, apart))})", *anywhere])


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
    """Return an expression for one character of a word, whose neighbour begins no other.

    Combining marks belong to the word, which `\\w` denies.
    """
    codes = range(0x300, 0x1E00)
    marks = [chr(code) for code in codes if unicodedata.category(chr(code)).startswith("M")]
    inside = "".join(mark for mark in marks if not _spaceless(mark))
    return rf"(?:[^\W{SPACELESS}]|[{inside}])"


def _ending(parts: list[str]) -> str:
    """Return an expression for words in a row, the last of which ends where a word can."""
    after = "" if _spaceless(parts[-1][-1]) else rf"(?!{_touching()})"
    return r"\s+".join(map(re.escape, parts)) + after


def _spaceless(character: str) -> bool:
    return re.fullmatch(f"[{SPACELESS}]", character) is not None


def _expression(source: str) -> re.Pattern[str]:
    try:
        return re.compile(source, re.IGNORECASE)
    except re.error as error:
        raise UsageError(
            f"{source!r} is not a regular expression: {error}",
            hint="leave --regex out to match the words as they are written",
        ) from error


class ConceptIndex:
    """Finds the concepts of a caption; `regex` makes all their patterns expressions."""

    def __init__(self, concepts: Sequence[Concept], regex: bool = False) -> None:
        self.concepts = concepts
        self._about = [matcher(concept.patterns, regex=regex) for concept in concepts]
        self._excluded = [matcher(concept.excluded, regex=regex) for concept in concepts]
        self._by_word: dict[str, list[int]] = {}
        self._always: list[int] = []
        for number, concept in enumerate(concepts):
            anchors = {None if regex else _anchor(pattern) for pattern in concept.patterns}
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


def _anchor(pattern: str) -> str | None:
    """Return the longest word of a pattern, without which no caption matches it."""
    return max(words(folded(pattern)), key=lambda word: (len(word), word), default=None)


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

    def candidates(self, captions: "pa.Array") -> npt.NDArray[np.int64]:
        """Return the places of the captions that may match, in order."""
        if self._all:
            return np.arange(len(captions))
        import pyarrow.compute as pc

        may_match = ~_flags(pc.string_is_ascii(captions), True)
        for expression in self._expressions:
            matches = pc.match_substring_regex(captions, expression, ignore_case=True)
            may_match |= _flags(matches, False)
        return np.flatnonzero(may_match)


def _expressions(names: Sequence[str]) -> list[str]:
    spelled = [GAP.join(map(re.escape, name.split())) for name in names]
    groups = [spelled[start : start + GROUP] for start in range(0, len(spelled), GROUP)] or [[]]
    return ["|".join([*group, ENTITY]) for group in groups]


def _flags(values: "pa.Array", missing: bool) -> Flags:
    import pyarrow.compute as pc

    flags: Flags = pc.fill_null(values, missing).to_numpy(zero_copy_only=False)
    return flags


DEFAULT_TEMPLATES = "imagenet-simple"
TEMPLATE_NAMES = ("imagenet", "imagenet-simple", "celeba")
FROM_LABELS = ("labels", "celeba")
CLASS_NAMES = ("imagenet", *FROM_LABELS)
WNID = re.compile(r"n\d{8}")
SLOT = "{}"


@dataclass(frozen=True, slots=True)
class ClassList:
    """Class names in order, and the label that stands for each where it is not the name."""

    names: tuple[str, ...]
    labels: dict[str, int] | None
    origin: str


def builtin_classes(name: str) -> ClassList | None:
    """Return a built-in list of classes; None where the labels themselves are the names."""
    if name in FROM_LABELS:
        return None
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return ClassList(tuple(IMAGENET_CLASSNAMES), None, name)


def parse_classes(text: str, origin: str) -> ClassList:
    """Read one class name a line, or `label<TAB>name`. Raises InputError naming the line."""
    names: dict[str, int] = {}
    labels: dict[str, int] = {}
    filled = _filled_lines(text)
    tabbed = sum("\t" in line for _, line in filled)
    if not filled or tabbed not in (0, len(filled)):
        content = f"{tabbed} of {len(filled)} lines have a tab" if filled else "it is empty"
        raise InputError(
            f"{origin} is not a list of classes: {content}",
            hint="one class name a line, or label<TAB>name on every line",
        )
    for number, line in filled:
        label, _, name = (part.strip() for part in line.rpartition("\t"))
        if (label in labels) if tabbed else (name in names):
            raise InputError(f"{origin}, line {number}: {line!r} stands there a second time")
        labels[label] = names.setdefault(name, len(names))
    return ClassList(tuple(names), labels if tabbed else None, origin)


def class_indices(
    classes: ClassList | None, labels: Collection[str]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the class names and the class index of every label that has one.

    Without a list, the labels are the names. With one, labels are those of its file, its
    names, or (if none is a name) indices into it; for ImageNet also the 1000 folder names.
    Raises InputError if no label belongs to a class.
    """
    if classes is None:
        names = sorted({_plain(label) for label in labels})
        index = {name: place for place, name in enumerate(names)}
        return tuple(names), {label: index[_plain(label)] for label in sorted(labels)}
    known = _by_label(classes, labels) or _by_index(classes, labels) or _by_wnid(classes, labels)
    if not known:
        raise InputError(
            f"no label is a class of {classes.origin}: labels are {_some(sorted(labels))}; "
            f"classes are {_some(classes.names)}",
            hint="give a file of label<TAB>name lines with --classes",
        )
    return classes.names, known


def find_class(names: Sequence[str], concept: str) -> int | None:
    """Return the index of the class that is the concept, whatever the case; None if none is."""
    wanted = _same(concept)
    return next((index for index, name in enumerate(names) if _same(name) == wanted), None)


def builtin_templates(name: str) -> tuple[str, ...]:
    """Return built-in templates as texts with one `{}` each."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    if name == "celeba":
        return ("{}.",)
    source = OPENAI_IMAGENET_TEMPLATES if name == "imagenet" else SIMPLE_IMAGENET_TEMPLATES
    return tuple(str(template(SLOT)) for template in source)


def parse_templates(text: str, origin: str) -> tuple[str, ...]:
    """Read one template a line, each with exactly one `{}`. Raises InputError naming the line."""
    templates = _filled_lines(text)
    for number, line in templates:
        if line.count(SLOT) != 1:
            raise InputError(
                f"{origin}, line {number}: {line!r} has {line.count(SLOT)} times {SLOT}",
                hint="write each template with one {} where the class name goes",
            )
    if not templates:
        raise InputError(f"{origin} holds no templates")
    return tuple(line for _, line in templates)


def _filled_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank, stripped, with their numbers from 1."""
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return [(number, line) for number, line in lines if line]


def parse_names(text: str, origin: str) -> tuple[tuple[str, str], ...]:
    """Read other names of one thing, one a line, each with its kind. Raises InputError.

    A line that begins with # says of which kind those below it are, such as `# German`.
    """
    kind, names = "name", []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#"):
            kind = " ".join(line.lstrip("#").replace(":", " ").split()) or kind
        elif line:
            names.append((kind, line))
    if not names:
        raise InputError(f"{origin} holds no names", hint="write one a line")
    return tuple(dict.fromkeys(names))


def _by_label(classes: ClassList, labels: Iterable[str]) -> dict[str, int]:
    table: dict[str, int] = {}
    for name, index in (classes.labels or {}).items():
        table.setdefault(_same(name), index)
    for index, name in enumerate(classes.names):
        # ImageNet has two names twice; the first of each stands for both.
        table.setdefault(_same(name), index)
    return {label: table[_same(label)] for label in labels if _same(label) in table}


def _by_index(classes: ClassList, labels: Collection[str]) -> dict[str, int]:
    if classes.labels is not None or not all(label.isdecimal() for label in labels):
        return {}
    return {label: int(label) for label in labels if int(label) < len(classes.names)}


def _by_wnid(classes: ClassList, labels: Collection[str]) -> dict[str, int]:
    if classes.origin != "imagenet" or not all(WNID.fullmatch(label) for label in labels):
        return {}
    if len(labels) != len(classes.names):
        raise InputError(
            f"{len(labels)} of ImageNet's {len(classes.names)} folder names are there; "
            "their classes can only be told when all of them are",
            hint="give a file of folder<TAB>name lines with --classes",
        )
    return {label: index for index, label in enumerate(sorted(labels))}


def _plain(label: str) -> str:
    return label_words(label) or label


def _same(name: str) -> str:
    return _plain(name).casefold()


def _some(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names], 4)
