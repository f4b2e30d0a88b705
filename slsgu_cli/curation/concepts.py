"""Many concepts at once: which of them a caption speaks of, without asking each in turn.

Every stretch of word characters in a pattern is a word of each caption that the pattern
matches. So a concept comes into question only where its pattern's longest word is among
the caption's words; then its own matcher decides.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slsgu_cli.curation.records import Concept
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.layout import check_name
from slsgu_cli.matching import Matcher, folded, matcher, words

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
        asked = set(self._always)
        if self._by_word:
            for word in words(folded(caption)):
                asked.update(self._by_word.get(word, ()))
        return [number for number in sorted(asked) if self._about[number](caption)]

    def excluded(self, number: int, caption: str) -> bool:
        """Return whether the caption is ruled out for a concept."""
        return self._excluded[number](caption)

    def touched(self, caption: str) -> bool:
        """Return whether the caption is about any concept, or ruled out for any."""
        return bool(self.about(caption)) or any(test(caption) for test in self._excluded)

    def _anchor(self, pattern: str) -> str | None:
        found = [] if self.regex else words(folded(pattern))
        return max(found, key=lambda word: (len(word), word), default=None)


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
