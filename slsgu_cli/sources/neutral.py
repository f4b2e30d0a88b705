"""Neutral words and prompts: what a set from words retains if nothing else is named."""

from functools import cache
from importlib.resources import files

# Each noun is in all of these, with another noun of the list in the last two.
PATTERNS = (
    "{noun}",
    "a photo of {a_noun}",
    "a drawing of {a_noun}",
    "a small {noun}",
    "a red {noun} on a table",
    "{a_noun} next to {near}",
    "{a_noun} in front of {far}",
)
# How far behind the noun the others stand in the list.
NEAR, FAR = 97, 211


@cache
def neutral_words() -> tuple[str, ...]:
    """Return some hundred everyday nouns, in alphabetical order."""
    text = files("slsgu_cli.sources").joinpath("neutral.txt").read_text("utf-8")
    return tuple(text.split())


def neutral_prompts() -> tuple[str, ...]:
    """Return some thousand prompts: each noun alone, described, and next to other nouns."""
    words = neutral_words()
    return tuple(
        pattern.format(
            noun=noun,
            a_noun=_with_article(noun),
            near=_with_article(words[(place + NEAR) % len(words)]),
            far=_with_article(words[(place + FAR) % len(words)]),
        )
        for place, noun in enumerate(words)
        for pattern in PATTERNS
    )


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeio" or noun == "umbrella" else f"a {noun}"
