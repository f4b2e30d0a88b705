"""Text for messages: lists of words, near names, what a library's error says."""

import difflib
import re
from collections.abc import Collection, Sequence


def reason_of(error: Exception) -> str:
    """Return what is wrong with a content that could not be read; a KeyError says what it lacks."""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def listed(words: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Return words one after another; of many the first, and how many more there are."""
    more = len(words) - most
    return separator.join(words[:most]) + (f" and {more} more" if more > 0 else "")


def enumerated(words: Sequence[str]) -> str:
    """Return words one after another, with `and` before the last."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# The share of letters in common, in their order, that a slip of the pen leaves.
CLOSE = 0.8


def near(text: str, names: Collection[str], most: int = 3) -> str | None:
    """Return which of the names were perhaps meant, as a hint; None where none is near."""
    by_letters = {re.sub(r"\W+", "", name).lower(): name for name in names}
    letters = re.sub(r"\W+", "", text).lower()
    longer = [name for name in sorted(by_letters) if len(letters) > 2 and letters in name]
    begun = [name for name in longer if name.startswith(letters)]
    close = difflib.get_close_matches(letters, by_letters, most, CLOSE)
    chosen = list(dict.fromkeys([*begun, *close, *longer]))[:most]
    return f"near: {', '.join(by_letters[each] for each in chosen)}" if chosen else None


def near_names(name: str, names: Collection[str]) -> str:
    """Return the end of a message that names what may have been meant; empty without any."""
    close = difflib.get_close_matches(name, names, n=3)
    return f"; near names: {', '.join(close)}" if close else ""


# PyTorch refuses pickled objects and advises to load them all the same, which runs their code.
_UNSAFE_ADVICE = re.compile(r"weights[ _]only", re.IGNORECASE)
_LONGEST = 300


def first_lines(error: BaseException) -> str:
    """Return the beginning of what a library's error says, on one line, without unsafe advice."""
    if _UNSAFE_ADVICE.search(str(error)):
        return "the file is corrupt or not a plain state dict. Refusing to unpickle other objects."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:_LONGEST] or type(error).__name__
