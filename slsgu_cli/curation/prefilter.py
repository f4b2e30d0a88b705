"""Which captions of a column may hold a concept's name, told in bulk by pyarrow.

The test errs on one side: it passes every caption that `matching` matches, and some more,
which are then looked at one by one. Captions in ASCII are searched as they are. Others are
normalised and lower-cased first; the few in which that is not what `matching.folded` does
pass unseen, and so do those with HTML entities.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from slsgu_cli.matching import SIGNS, folded

# An expression with more names than this outgrows the memory that RE2 is given.
GROUP = 400
ENTITY = "&[A-Za-z#]"
ASCII_GAP = r"[\x00-\x20\x7f]+"
GAP = r"[\x00-\x20\x{7f}-\x{a0}\p{Z}]+"
LAST = 0x20000
Flags = npt.NDArray[np.bool_]


class Prefilter:
    """Finds the captions that may match any of `patterns`; None of them: every caption may."""

    def __init__(self, patterns: Sequence[str] | None) -> None:
        self._all = patterns is None
        names = sorted({folded(pattern) for pattern in patterns or ()})
        self._ascii = _expressions([name for name in names if name.isascii()], ASCII_GAP)
        self._any = _expressions(names, GAP)

    def candidates(self, captions: pa.Array) -> npt.NDArray[np.int64]:
        """Return the places of the captions that may match, in order."""
        if self._all:
            return np.arange(len(captions))
        found = _search(captions, self._ascii)
        others = np.flatnonzero(~_flags(pc.string_is_ascii(captions), True))
        if others.size:
            subset = captions.take(pa.array(others))
            plain = pc.utf8_lower(pc.utf8_normalize(subset, "NFKC"))
            found[others] = _search(plain, self._any) | _search(subset, [_unlike()])
        return np.flatnonzero(found)


def _expressions(names: Sequence[str], gap: str) -> list[str]:
    spelled = [gap.join(map(re.escape, name.split())) for name in names]
    groups = [spelled[start : start + GROUP] for start in range(0, len(spelled), GROUP)] or [[]]
    return ["|".join([*group, ENTITY]) for group in groups]


def _search(captions: pa.Array, expressions: Sequence[str]) -> Flags:
    """Return which captions any of the expressions is found in, whatever the case."""
    found = np.zeros(len(captions), dtype=bool)
    for expression in expressions:
        found |= _flags(pc.match_substring_regex(captions, expression, ignore_case=True), False)
    return found


def _flags(values: pa.Array, missing: bool) -> Flags:
    flags: Flags = pc.fill_null(values, missing).to_numpy(zero_copy_only=False)
    return flags


@cache
def _unlike() -> str:
    """Return the characters that `folded` makes into something else than NFKC and lower case."""
    return f"[{_ranges([code for code in range(0x80, LAST) if _is_unlike(chr(code))])}]"


def _is_unlike(character: str) -> bool:
    lower = character.lower()
    if lower == character.casefold() and unicodedata.is_normalized("NFKC", character + lower):
        # Nearly all of them come here: what is stable need not be spelled out.
        return "\u0300" <= character < "\u0370" or ord(character) in SIGNS
    if unicodedata.category(character) == "Cs":
        return False
    return folded(character) != unicodedata.normalize("NFKC", character).lower()


def _ranges(codes: Sequence[int]) -> str:
    """Return codes, in order, as the ranges of a character class."""
    ends = [n for n, code in enumerate(codes) if codes[n + 1 : n + 2] != [code + 1]]
    spans = zip([0, *(end + 1 for end in ends)], ends, strict=False)
    return "".join(rf"\x{{{codes[first]:x}}}-\x{{{codes[last]:x}}}" for first, last in spans)
