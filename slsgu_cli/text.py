"""Text for messages: lists of words, similar names, the errors of libraries."""

import difflib
import re
from collections.abc import Collection, Sequence


def reason_of(error: Exception) -> str:
    """Return why content could not be read; a KeyError names the missing part."""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def listed(words: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Join the first words, and say how many more there are."""
    more = len(words) - most
    return separator.join(words[:most]) + (f" and {more} more" if more > 0 else "")


def enumerated(words: Sequence[str]) -> str:
    """Join words, with `and` before the last."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# The fraction of letters in common, in order, that makes a name similar.
CLOSE = 0.8


def near(text: str, names: Collection[str], most: int = 3) -> str | None:
    """Return a hint with the names that are similar to `text`; None if there are none."""
    by_letters = {re.sub(r"\W+", "", name).lower(): name for name in names}
    letters = re.sub(r"\W+", "", text).lower()
    longer = [name for name in sorted(by_letters) if len(letters) > 2 and letters in name]
    begun = [name for name in longer if name.startswith(letters)]
    close = difflib.get_close_matches(letters, by_letters, most, CLOSE)
    chosen = list(dict.fromkeys([*begun, *close, *longer]))[:most]
    return f"near: {', '.join(by_letters[each] for each in chosen)}" if chosen else None


# PyTorch refuses pickled objects and suggests loading them anyway, which runs their code.
_UNSAFE_ADVICE = re.compile(r"weights[ _]only", re.IGNORECASE)
_LONGEST = 300


def first_lines(error: BaseException) -> str:
    """Return the first lines of a library's error as one line, without unsafe advice."""
    if _UNSAFE_ADVICE.search(str(error)):
        return "the file is corrupt or not a plain state dict. Refusing to unpickle other objects."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:_LONGEST] or type(error).__name__
