"""Texts that describe a concept, from a file: one per line, or JSON for several concepts.

The layout of the JSON is that of the prompts of EMMA (arXiv 2512.17320): a list of objects, in
each the name of a concept with the list of its texts.
"""

import re
from typing import Any

from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import parse_json
from slsgu_cli.sources.prompts import filled_lines, read_text


def read_descriptions(path: str, concept: str) -> tuple[str, ...]:
    """Return the texts about a concept in a file. Raises MissingError and InputError.

    All lines of a text file are about it, except those that begin with #. A JSON file may have
    no text about it.
    """
    text = read_text(path, "--descriptions")
    if path.lower().endswith(".json"):
        return parse_described(text, path, concept)
    lines = [line for _, line in filled_lines(text) if not line.startswith("#")]
    if not lines:
        raise InputError(f"{path} contains no descriptions", hint="write one per line")
    return tuple(dict.fromkeys(lines))


def parse_described(text: str, origin: str, concept: str) -> tuple[str, ...]:
    """Return the texts about a concept in a JSON text. Raises InputError.

    Names are compared by their letters and digits, ignoring case: `hotwheels` is `Hot Wheels`.
    """
    try:
        listed = [pair for each in parse_json(text) for pair in each.items()]
        valid = all(_is_texts(texts) for _, texts in listed)
    except (ValueError, TypeError, AttributeError):
        listed, valid = [], False
    if not valid:
        raise InputError(
            f"{origin} is not a list of objects with a list of texts for each concept",
            hint='[{"facebook": ["a white letter on a blue square"]}]',
        )
    wanted = _letters(concept)
    texts = [text.strip() for name, texts in listed if _letters(name) == wanted for text in texts]
    return tuple(dict.fromkeys(filter(None, texts)))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()
