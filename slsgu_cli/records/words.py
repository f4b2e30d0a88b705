"""Records to and from the words of a command line.

A field of a record carries its option: flags, help, range, and what stands for no value.
The command line is read by these, its help is written from them, and so is the command
line of a record that is there. Nothing here knows a terminal.
"""

import dataclasses
import functools
import keyword
import math
import re
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from slsgu_cli.errors import UsageError
from slsgu_cli.records.codec import ADDED, usual_value, without_none
from slsgu_cli.text import near

R = TypeVar("R")

ROWS = "Rows and sources"
DOWNLOAD = "Download"
GENERATION = "Generation"
EVALUATION = "Evaluation"
LAYERS = "Layers and direction"
SEARCH = "Search and training"
TARGET = "Target"
OUTPUT = "Output"
SPEED = "Speed and memory"
MODEL = "Model"
COMMON = "Common options"
PANELS = (
    ROWS,
    MODEL,
    EVALUATION,
    GENERATION,
    DOWNLOAD,
    LAYERS,
    SEARCH,
    TARGET,
    OUTPUT,
    SPEED,
    COMMON,
)


@dataclass(frozen=True, slots=True)
class Option:
    """What a field is on the command line; without flags, an argument.

    `without` says what happens where it is not given. `read` makes a value of the word given (of
    all words, where it is repeatable), `write` the word or words of a value. With `once` it is
    refused where it is repeated, and else the last one counts. One word gives all of a sequence
    that is not `repeatable`. `completes` says what a shell may put there: a set, an edit, a layer.
    """

    flags: tuple[str, ...] = ()
    help: str = ""
    panel: str = MODEL
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    without: str | None = None
    read: Callable[[str, Any], Any] | None = None
    write: Callable[[Any], str | list[str]] | None = None
    repeatable: bool = True
    once: bool = False
    completes: str | None = None

    @property
    def name(self) -> str:
        """How the user knows it: its first flag, or what stands for it in the usage."""
        return self.flags[0].partition("/")[0] if self.flags else str(self.metavar)

    @property
    def key(self) -> str:
        """Its name as that of a variable."""
        key = re.sub(r"\W+", "_", self.name).strip("_").lower()
        return f"{key}_" if keyword.iskeyword(key) else key


@dataclass(frozen=True, slots=True)
class Nested:
    """A field that is a record with options of its own, those of the fields `omit` left out.

    `said` replaces, by field, what these options say.
    """

    said: Mapping[str, Mapping[str, Any]]
    omit: Collection[str] = ()
    panel: str | None = None


def option(default: Any, *flags: str, later: bool = False, **said: Any) -> Any:
    """Return a field that is an option on the command line (see Option), `...` if required.

    Records of before an option that came `later` have its default.
    """
    metadata = {"option": Option(flags, **said), ADDED: later}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=MISSING if default is ... else default, metadata=metadata)


def options(
    default: Any, *, omit: Collection[str] = (), panel: str | None = None, **said: Mapping[str, Any]
) -> Any:
    """Return a field whose record has options of its own (see Nested)."""
    return dataclasses.field(default=default, metadata={"options": Nested(said, omit, panel)})


@dataclass(frozen=True, slots=True)
class Place:
    """An option of a record: where its value stands, of which type, and its default."""

    path: tuple[str, ...]
    option: Option
    kind: Any
    default: Any

    @property
    def required(self) -> bool:
        """Whether the record cannot be made without it."""
        return self.default is MISSING

    @property
    def is_flag(self) -> bool:
        """Whether it takes no value."""
        return self.kind is bool

    @property
    def repeatable(self) -> bool:
        """Whether it may be given more than once."""
        several = typing.get_origin(self.kind) in (tuple, list, dict, Sequence)
        return several and self.option.repeatable

    @property
    def item(self) -> Any:
        """The type of its value, or of each where it is repeatable."""
        return typing.get_args(self.kind)[0] if typing.get_origin(self.kind) else self.kind

    @property
    def metavar(self) -> str:
        """What stands for its value in the help."""
        if self.option.metavar:
            return self.option.metavar
        if issubclass(self.item, StrEnum):
            return "|".join(self.item)
        return {int: "N", float: "NUMBER", Path: "PATH"}.get(self.item, "TEXT")

    def default_words(self) -> str | None:
        """Return what happens without it, as the help says it; None where there is no need."""
        if self.option.without is not None:
            return self.option.without
        if self.is_flag or self.default in (MISSING, None, "", (), {}):
            return None
        return ", ".join(self._texts(self.default))

    def help(self, *, required: bool) -> str:
        """Return what the help says of it: what it is, whether once, and what without it."""
        words = [self.option.help]
        if self.repeatable and self.option.flags:
            words.append("Repeatable.")
        without = None if required else self.default_words()
        if without is not None:
            words.append(f" [default: {without}]")
        return " ".join(words)

    def value(self, words: Any) -> Any:
        """Return the value that these words mean. Raises UsageError."""
        name, kind = self.option.name, self.kind
        if self.option.once:
            if len(words) > 1:
                raise UsageError(
                    f"{name} is given {len(words)} times and takes one value",
                    hint="run the command once for each",
                )
            (words,) = words
        if self.option.read is not None:
            return self.option.read(name, words)
        if typing.get_origin(kind) is dict:
            return pairs(name, words)
        if self.repeatable:
            return tuple(self._one(text) for text in words)
        return words if self.is_flag else self._one(words)

    def _one(self, text: str) -> Any:
        name, kind, said = self.option.name, self.item, self.option
        if issubclass(kind, StrEnum):
            return _chosen(name, text, kind)
        if kind not in (int, float):
            return kind(text)
        try:
            number = kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise UsageError(f"{name} {text} is no {what}", hint=f"such as {name} 4") from None
        low, high = said.min, said.max
        below = low is not None and not number >= low
        if below or (high is not None and not number <= high):
            limits = f"{low or 0:g} or more" if high is None else f"from {low or 0:g} to {high:g}"
            raise UsageError(
                f"{name} {text} is out of range: it must be {limits}",
                hint=f"{name} {low if below else high:g}",
            )
        return number

    def of(self, record: Any) -> Any:
        """Return its value in a record; None where the record it stands in is not there."""
        for name in self.path:
            record = None if record is None else getattr(record, name)
        return record

    def _texts(self, value: Any) -> list[str]:
        """Return a value as words of the command line, one unless it is repeatable."""
        if self.option.write is not None:
            written = self.option.write(value)
            return [written] if isinstance(written, str) else written
        if isinstance(value, Mapping):
            return [f"{key}={item}" for key, item in value.items()]
        items = value if self.repeatable else [value]
        return [figure(item) if isinstance(item, float) else str(item) for item in items]

    def words(self, value: Any) -> Iterator[str]:
        """Yield the words that give it this value."""
        flags = self.option.flags
        if self.is_flag:
            yes, _, no = flags[0].partition("/")
            yield yes if value else no
            return
        for text in self._texts(value):
            # A value that could be an option is tied to its own.
            if not flags:
                yield text
            elif text.startswith("-"):
                yield f"{flags[0]}={text}"
            else:
                yield from (flags[0], text)


def places(kind: type, default: Any = None) -> list[Place]:
    """Return the options of a record and of the records in it, in their order.

    Defaults are those of `default`, where there is such a record.
    """
    hints = typing.get_type_hints(kind)
    listed = []
    for field in dataclasses.fields(kind):
        usual = getattr(default, field.name) if default is not None else usual_value(field)
        bare = without_none(hints[field.name])
        if said := field.metadata.get("option"):
            listed.append(Place((field.name,), said, bare, usual))
        elif nested := field.metadata.get("options"):
            for place in places(bare, None if usual is MISSING else usual):
                if usual is None and place.required:
                    # Without it, there is no such record.
                    place = dataclasses.replace(place, default=None)
                if place.path[0] not in nested.omit:
                    listed.append(_within(field.name, place, nested))
    return listed


def _within(name: str, place: Place, nested: Nested) -> Place:
    panel = nested.panel or place.option.panel
    said = dataclasses.replace(place.option, panel=panel, **nested.said.get(place.path[0], {}))
    return dataclasses.replace(place, path=(name, *place.path), option=said)


def build(kind: type[R], values: Mapping[tuple[str, ...], Any]) -> R:
    """Return a record of these values, by their places; the others are as usual.

    Raises UsageError where one that is required is not there.
    """
    known = {place.path: place for place in places(kind)}

    def made(kind: Any, usual: Any, at: tuple[str, ...]) -> Any:
        """Return the record at `at`: `usual`, or a new one, with the values that are below it."""
        hints = typing.get_type_hints(kind)
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(kind):
            path = (*at, field.name)
            default = getattr(usual, field.name, usual_value(field))
            if path in values:
                fields[field.name] = values[path]
            elif any(each[: len(path)] == path for each in values):
                fields[field.name] = made(without_none(hints[field.name]), default, path)
            elif default is MISSING and path in known:
                below = [known[each].option.name for each in values if each[: len(at)] == at]
                name = known[path].option.name
                what = f"{below[0]} needs {name}" if below else f"{name} is missing"
                raise UsageError(what, hint=f"{name} {known[path].metavar}")
        return kind(**fields) if usual in (None, MISSING) else dataclasses.replace(usual, **fields)

    return typing.cast(R, made(kind, MISSING, ()))


def command_line(
    record: Any, *, also: Collection[str] = (), fields: Sequence[str] | None = None
) -> list[str]:
    """Return the words that ask for a record: what is not as usual, and the fields of `also`.

    With `fields`, only these are told, in that order.
    """
    listed = places(type(record))
    if fields is not None:
        listed = [place for name in fields for place in listed if place.path[0] == name]
    words: list[str] = []
    for place in listed:
        value = place.of(record)
        if isinstance(value, list):
            value = tuple(value)
        said = value is not None or place.option.write is not None
        if said and (value != place.default or place.path[0] in also):
            words += place.words(value)
    return words


def figure(value: float) -> str:
    """Return the shortest text that is this number again."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def pairs(name: str, texts: Sequence[str]) -> dict[str, str]:
    """Return the NAME=VALUE pairs given to a repeatable option. Raises UsageError."""
    values: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UsageError(f"{name} {text} is not NAME=VALUE", hint=f"{name} brands=...")
        if key in values:
            raise UsageError(f"{name} names {key} twice")
        values[key] = value
    return values


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def bytes_of(name: str, text: str) -> int:
    """Return the bytes meant by `4G`, `512MiB` or `1000000`. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise UsageError(f"{name} {text!r} is not a size", hint=f"such as {name} 4G, or 1000000")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def _positive(name: str, text: str, *, what: str, hint: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"{name} {text} is no {what}", hint=hint)
    return value


def percent(name: str, text: str) -> float:
    """Return the share that a percentage is. Raises UsageError."""
    return _positive(name, text, what="share of a norm", hint=f"such as {name} 50") / 100


def device(name: str, text: str) -> str:
    """Return the name of a device. Raises UsageError."""
    # Checked here as well as where torch knows the devices: a command may not come to that.
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        known = "auto, cpu, cuda, cuda:N and mps"
        raise UsageError(f"{name} {text!r} is none of {known}", hint=f"{name} auto")
    return text


def _chosen(name: str, text: str, kinds: Iterable[StrEnum]) -> StrEnum:
    known = {str(kind): kind for kind in kinds}
    if text not in known:
        raise UsageError(f"{name} {text} is none of {', '.join(known)}", hint=near(text, known))
    return known[text]


def choices(
    kinds: Sequence[StrEnum], *, always: Sequence[StrEnum] = ()
) -> Callable[[str, Any], tuple[StrEnum, ...]]:
    """Return what reads names of `kinds`, also with commas between; `always` come first."""

    def read(name: str, texts: str | Sequence[str]) -> tuple[StrEnum, ...]:
        wanted = _listed(texts)
        if not wanted:
            raise UsageError(f"{name} names none of {', '.join(kinds)}")
        return (*always, *(_chosen(name, text, kinds) for text in wanted))

    return read


def rates(name: str, texts: Sequence[str]) -> tuple[float, ...] | None:
    """Return the learning rates given, None for `auto`. Raises UsageError."""
    words = _listed(texts)
    if words == ["auto"]:
        return None
    hint = f"{name} 1e-6,1e-7, or {name} auto alone"
    values = [_positive(name, word, what="learning rate", hint=hint) for word in words]
    return tuple(dict.fromkeys(values))


def _listed(texts: str | Sequence[str]) -> list[str]:
    """Return the words of an option that takes commas, once or repeated."""
    texts = [texts] if isinstance(texts, str) else texts
    return [word.strip().lower() for text in texts for word in text.split(",") if word.strip()]


DEVICE_OPTION = Option(
    ("--device",), "auto, cpu, cuda, cuda:N or mps.", SPEED, metavar="DEVICE", read=device
)
DEVICE = functools.partial(dataclasses.field, default="auto", metadata={"option": DEVICE_OPTION})
