"""The words of a concept, from the command line or from files.

A file has one word a line, with its aliases after tabs. Below a line `# description`, each line is
a text that describes the concept; any other line that begins with # ends the descriptions.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slsgu_cli.errors import InputError, MissingError

FILES = (".txt", ".tsv")
DESCRIPTION = "description"


@dataclass(frozen=True, slots=True)
class Word:
    """A word and its aliases."""

    name: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The word and its aliases."""
        return self.name, *self.aliases


@dataclass(frozen=True, slots=True)
class WordList:
    """The words of a concept, and texts that describe it."""

    words: tuple[Word, ...]
    descriptions: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The words without their aliases."""
        return tuple(word.name for word in self.words)

    @property
    def patterns(self) -> tuple[str, ...]:
        """All words and aliases."""
        return tuple(name for word in self.words for name in word.names)

    def within(self, thing: str) -> "WordList":
        """Return the list with each name as an attribute of a thing. Descriptions stay as is."""
        names = [[with_attribute(thing, name) for name in word.names] for word in self.words]
        words = tuple(Word(name, tuple(aliases)) for name, *aliases in names)
        return replace(self, words=words)


def with_attribute(thing: str, attribute: str) -> str:
    """Return the text of a thing with an attribute: `red {}`, or `{} with` the attribute."""
    return (attribute if "{}" in attribute else f"{{}} with {attribute}").replace("{}", thing)


def alone(attribute: str) -> str:
    """Return the text of an attribute without a thing."""
    return " ".join(attribute.replace("{}", " ").split())


def read_words(texts: Iterable[str]) -> WordList:
    """Return the words of texts and files. Raises MissingError or InputError."""
    words: list[Word] = []
    descriptions: list[str] = []
    for text in texts:
        each = _of_file(text) if _is_file(text) else WordList(_words([text], "--words"))
        words += each.words
        descriptions += each.descriptions
    names = [name.casefold() for word in words for name in word.names]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"--words has {twice[0]!r} twice", hint="name each word once")
    return WordList(tuple(words), tuple(dict.fromkeys(descriptions)))


def _is_file(text: str) -> bool:
    """Return whether a text is the name of a file. Raises MissingError if that is missing."""
    if Path(text).is_file():
        return True
    if text.endswith(FILES):
        raise MissingError(f"there is no file {text}", hint="--words TEXT or --words FILE")
    return False


def _of_file(path: str) -> WordList:
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the words in {path}: {error}") from error
    words: list[str] = []
    descriptions: list[str] = []
    described = False
    for line in lines:
        if line.startswith("#"):
            described = line.lstrip("#").strip().casefold().startswith(DESCRIPTION)
        elif line.strip():
            (descriptions if described else words).append(line.strip(" "))
    if not words:
        raise InputError(
            f"{path} has no words", hint="one a line: WORD<tab>alias; texts below # description"
        )
    return WordList(_words(words, path), tuple(descriptions))


def _words(lines: Sequence[str], where: str) -> tuple[Word, ...]:
    words = []
    for number, line in enumerate(lines, 1):
        name, *aliases = (part.strip() for part in line.split("\t"))
        if not name:
            raise InputError(f"{where}: word {number} is blank")
        words.append(Word(name, tuple(dict.fromkeys(alias for alias in aliases if alias))))
    return tuple(words)
