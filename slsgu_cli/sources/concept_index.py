"""Indices of the patterns of many concepts: which concepts is a caption about?"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from slsgu_cli.records.sets import Concept
from slsgu_cli.sources.matching import folded, matcher, words

if TYPE_CHECKING:
    import pyarrow as pa


class ConceptIndex:
    """Find the concepts of a caption; with `regex`, all their patterns are expressions."""

    def __init__(self, concepts: Sequence[Concept], regex: bool = False) -> None:
        self.concepts = concepts
        self._matches = [matcher(concept.patterns, regex=regex) for concept in concepts]
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
        """Return the numbers of the concepts whose patterns the caption matches, in order."""
        candidates = set(self._always)
        if self._by_word:
            for word in words(folded(caption)):
                candidates.update(self._by_word.get(word, ()))
        return [number for number in sorted(candidates) if self._matches[number](caption)]

    def excluded(self, number: int, caption: str) -> bool:
        """Return whether a concept excludes the caption."""
        return self._excluded[number](caption)

    def mentions_any(self, caption: str) -> bool:
        """Return whether the caption is about any concept, or excluded by any."""
        return bool(self.about(caption)) or any(test(caption) for test in self._excluded)


def _anchor(pattern: str) -> str | None:
    """Return the longest word of a pattern, which every matching caption contains."""
    return max(words(folded(pattern)), key=lambda word: (len(word), word), default=None)


# RE2 runs out of its memory limit for expressions with more names.
GROUP = 400
ENTITY = "&[A-Za-z#]"
GAP = r"[\x00-\x20\x7f]+"
Flags = npt.NDArray[np.bool_]


class Prefilter:
    """Select the captions that may match any of `patterns`; None selects every caption.

    Captions with other than ASCII characters are always selected: only the exact test folds them.
    """

    def __init__(self, patterns: Sequence[str] | None) -> None:
        self._all = patterns is None
        names = sorted({folded(pattern) for pattern in patterns or ()})
        self._expressions = _expressions([name for name in names if name.isascii()])

    def candidates(self, captions: "pa.Array") -> npt.NDArray[np.int64]:
        """Return the positions of the captions that may match, in order."""
        if self._all:
            return np.arange(len(captions))
        import pyarrow.compute as pc

        may_match = ~_flags(pc.string_is_ascii(captions), True)
        for expression in self._expressions:
            matches = pc.match_substring_regex(captions, expression, ignore_case=True)
            may_match |= _flags(matches, False)
        return np.flatnonzero(may_match)


def _expressions(names: Sequence[str]) -> list[str]:
    expressions = [GAP.join(map(re.escape, name.split())) for name in names]
    groups = [
        expressions[start : start + GROUP] for start in range(0, len(expressions), GROUP)
    ] or [[]]
    return ["|".join([*group, ENTITY]) for group in groups]


def _flags(values: "pa.Array", missing: bool) -> Flags:
    import pyarrow.compute as pc

    flags: Flags = pc.fill_null(values, missing).to_numpy(zero_copy_only=False)
    return flags
