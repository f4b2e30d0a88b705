"""`typos`: typing errors, other forms of the name, and other names."""

from collections.abc import Callable, Iterator

import numpy as np

from slsgu_cli.records.verification import KIND, Settings, Variant
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.verdicts import mean_and_worst

# How many typing errors of each kind to draw, and the rows of a keyboard.
ERRORS_PER_KIND = 3
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
SHORTEST_PART = 2


def typos(model: ModelUnderTest, settings: Settings) -> list[Variant]:
    """Measure with variants of the name, and with other names, in its place.

    Variants that the tokenizer cannot distinguish from the name are omitted.
    """
    texts = [*variants_of(model.name, seed=settings.seed)]
    texts += [("alias", alias) for alias in settings.aliases]
    texts += [(kind, text) for kind, _, text in (s.partition(KIND) for s in settings.spellings)]
    tokens, *rows_of_tokens = model.tokenize([model.name, *(text for _, text in texts)])
    distinct = [
        pair for pair, row in zip(texts, rows_of_tokens, strict=True) if (row != tokens).any()
    ]
    if not distinct:
        return []
    embeddings = model.classes(tuple(text for _, text in distinct), model.templates)
    return [
        Variant(f"{kind}{KIND}{text}", model.accuracy_with(embedding))
        for (kind, text), embedding in zip(distinct, embeddings, strict=True)
    ]


SPEC = CheckSpec(
    run=typos,
    fills="variants",
    settings=("spellings", "aliases", "seed"),
    rows=mean_and_worst,
    effort="typing errors and other names ({})",
)


def variants_of(name: str, *, seed: int) -> Iterator[tuple[str, str]]:
    """Yield kinds and texts of the variants of a name, each text once.

    Typing errors are drawn by seed: two letters swapped, one dropped, one doubled, one
    replaced by its neighbour on the keyboard. Other forms are all listed: the word split in
    two or two words joined, capitals, plural, possessive, and the name repeated.
    """
    known = {name}
    for kind, text in (*_errors(name, np.random.default_rng(seed)), *_forms(name)):
        if text not in known:
            known.add(text)
            yield kind, text


def _errors(name: str, generator: np.random.Generator) -> Iterator[tuple[str, str]]:
    letters = [place for place, letter in enumerate(name) if letter.isalnum()]
    pairs = [place for place in letters if name[place + 1 : place + 2].isalnum()]
    changes: dict[str, tuple[list[int], Callable[[int], str]]] = {
        "swapped": (pairs, lambda i: name[:i] + name[i + 1] + name[i] + name[i + 2 :]),
        "dropped": (letters, lambda i: name[:i] + name[i + 1 :]),
        "doubled": (letters, lambda i: name[: i + 1] + name[i:]),
        "mistyped": (
            [place for place in letters if _adjacent(name[place])],
            lambda i: name[:i] + str(generator.choice(list(_adjacent(name[i])))) + name[i + 1 :],
        ),
    }
    for kind, (places, change) in changes.items():
        texts = [change(place) for place in generator.permutation(places).tolist()]
        valid = [text for text in dict.fromkeys(texts) if text.strip() and text != name]
        yield from ((kind, text) for text in valid[:ERRORS_PER_KIND])


def _adjacent(letter: str) -> str:
    """Return the letters on the keys to the left and right; empty for other characters."""
    row = next((row for row in KEYS if letter.lower() in row), "")
    place = row.find(letter.lower())
    return row[max(0, place - 1) : place] + row[place + 1 : place + 2] if row else ""


def _forms(name: str) -> Iterator[tuple[str, str]]:
    for place in range(SHORTEST_PART, len(name) - SHORTEST_PART + 1):
        if name[place - SHORTEST_PART : place + SHORTEST_PART].isalnum():
            yield from (("split", name[:place] + mark + name[place:]) for mark in " -")
    yield from (("joined", name.replace(" ", mark)) for mark in ("", "-"))
    yield from (("case", text) for text in (name.lower(), name.upper(), name.title()))
    yield from (("form", name + ending) for ending in ("s", "'s"))
    yield "twice", f"{name} {name}"
