"""Options as fields of records.

A field declares its option once: flags, help, range and default. The command line, its help, the
keys of a recipe and the command line that recreates a record are all derived from the field.
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
from slsgu_cli.records.codec import usual_value, without_none
from slsgu_cli.text import near

R = TypeVar("R")

# The panels of the help, in their order.
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
    """The option of a field, or an argument if it has no flags.

    `without` describes the default in the help. `read` parses the text (all texts of a
    repeatable option). A sequence that is not `repeatable` is given as one text, with commas.
    """

    flags: tuple[str, ...] = ()
    help: str = ""
    panel: str = MODEL
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    without: str | None = None
    read: Callable[[str, Any], Any] | None = None
    repeatable: bool = True

    @property
    def name(self) -> str:
        """The first flag, or the metavar of an argument."""
        return self.flags[0].partition("/")[0] if self.flags else str(self.metavar)

    @property
    def key(self) -> str:
        """The name as a Python identifier."""
        key = re.sub(r"\W+", "_", self.name).strip("_").lower()
        return f"{key}_" if keyword.iskeyword(key) else key


def option(default: Any, *flags: str, **attributes: Any) -> Any:
    """Return a field with an Option; the default `...` makes it required."""
    metadata = {"option": Option(flags, **attributes)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=MISSING if default is ... else default, metadata=metadata)


def options(
    default: Any,
    *,
    omit: Collection[str] = (),
    panel: str | None = None,
    **changes: Mapping[str, Any],
) -> Any:
    """Return a field for a record with options of its own, except for the fields in `omit`.

    `panel` and `changes` replace attributes of these options, `changes` by field.
    """
    metadata = {"changes": changes, "omit": omit, "panel": panel}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class OptionField:
    """An option of a record, with the path, type and default of its field."""

    path: tuple[str, ...]
    option: Option
    kind: Any
    default: Any

    @property
    def required(self) -> bool:
        """Whether the field has no default."""
        return self.default is MISSING

    @property
    def is_flag(self) -> bool:
        """Whether the option takes no value."""
        return self.kind is bool

    @property
    def repeatable(self) -> bool:
        """Whether the option may be given more than once."""
        several = typing.get_origin(self.kind) in (tuple, list, dict, Sequence)
        return several and self.option.repeatable

    @property
    def item(self) -> Any:
        """The type of the value, or of each value of a sequence."""
        return typing.get_args(self.kind)[0] if typing.get_origin(self.kind) else self.kind

    @property
    def metavar(self) -> str:
        """The placeholder of the value in the help."""
        if self.option.metavar:
            return self.option.metavar
        if issubclass(self.item, StrEnum):
            return "|".join(self.item)
        return {int: "N", float: "NUMBER", Path: "PATH"}.get(self.item, "TEXT")

    def default_words(self) -> str | None:
        """Return the default as the help shows it, or None if there is nothing to show."""
        if self.option.without is not None:
            return self.option.without
        if self.is_flag or self.default in (MISSING, None, "", (), {}):
            return None
        return ", ".join(self._texts(self.default))

    def value(self, texts: Any) -> Any:
        """Parse the text of the option, or all texts of a repeatable one. Raises UsageError."""
        name = self.option.name
        if self.option.read is not None:
            return self.option.read(name, texts)
        if typing.get_origin(self.kind) is dict:
            return pairs(name, texts)
        if self.repeatable:
            return tuple(self._parsed(text) for text in texts)
        return texts if self.is_flag else self._parsed(texts)

    def _parsed(self, text: str) -> Any:
        if issubclass(self.item, StrEnum):
            return _chosen(self.option.name, text, self.item)
        if self.item in (int, float):
            return _number(self.option, text, self.item)
        return self.item(text)

    def of(self, record: Any) -> Any:
        """Return the value in a record, or None if the record that holds it is None."""
        for name in self.path:
            record = None if record is None else getattr(record, name)
        return record

    def _texts(self, value: Any) -> list[str]:
        if isinstance(value, Mapping):
            return [f"{key}={item}" for key, item in value.items()]
        several = isinstance(value, Sequence) and not isinstance(value, str)
        texts = [
            figure(item) if isinstance(item, float) else str(item)
            for item in (value if several else [value])
        ]
        return texts if self.repeatable else [",".join(texts)]

    def arguments(self, value: Any) -> Iterator[str]:
        """Yield the command-line arguments that set this value."""
        flags = self.option.flags
        if self.is_flag:
            yes, _, no = flags[0].partition("/")
            yield yes if value else no
            return
        for text in self._texts(value):
            if not flags:
                yield text
            elif text.startswith("-"):
                yield f"{flags[0]}={text}"
            else:
                yield from (flags[0], text)


def option_fields(kind: type, defaults: Any = None) -> list[OptionField]:
    """Return the options of a record and of its nested records, in order.

    Defaults are the values of `defaults`, if there is one.
    """
    hints = typing.get_type_hints(kind)
    fields = []
    for field in dataclasses.fields(kind):
        usual = getattr(defaults, field.name) if defaults is not None else usual_value(field)
        bare = without_none(hints[field.name])
        if declared := field.metadata.get("option"):
            fields.append(OptionField((field.name,), declared, bare, usual))
        elif "changes" in field.metadata:
            changes, omit, panel = (field.metadata[key] for key in ("changes", "omit", "panel"))
            for inner in option_fields(bare, None if usual is MISSING else usual):
                name, declared = inner.path[0], inner.option
                if name in omit:
                    continue
                # If the nested record is optional, so are its options.
                default = None if usual is None and inner.required else inner.default
                attributes = {"panel": panel or declared.panel, **changes.get(name, {})}
                declared = dataclasses.replace(declared, **attributes)
                path = (field.name, *inner.path)
                fields.append(OptionField(path, declared, inner.kind, default))
    return fields


def build(kind: type[R], values: Mapping[tuple[str, ...], Any]) -> R:
    """Return a record with these values, by path, and defaults elsewhere.

    Raises UsageError if a required value is missing.
    """
    known = {field.path: field for field in option_fields(kind)}

    def made(kind: Any, usual: Any, at: tuple[str, ...]) -> Any:
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
                given = [known[each].option.name for each in values if each[: len(at)] == at]
                name = known[path].option.name
                what = f"{given[0]} needs {name}" if given else f"{name} is missing"
                raise UsageError(what, hint=f"{name} {known[path].metavar}")
        return kind(**fields) if usual in (None, MISSING) else dataclasses.replace(usual, **fields)

    return typing.cast(R, made(kind, MISSING, ()))


def command_line(
    record: Any, *, also: Collection[str] = (), fields: Sequence[str] | None = None
) -> list[str]:
    """Return the arguments that recreate a record: changed values, and the fields in `also`.

    `fields` selects and orders the fields.
    """
    selected = option_fields(type(record))
    if fields is not None:
        selected = [each for name in fields for each in selected if each.path[0] == name]
    arguments: list[str] = []
    for each in selected:
        value = each.of(record)
        if isinstance(value, list):
            value = tuple(value)
        if value is not None and (value != each.default or each.path[0] in also):
            arguments += each.arguments(value)
    return arguments


def figure(value: float) -> str:
    """Return the shortest text that parses to this number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _number(option: Option, text: str, kind: type[float]) -> float:
    name, low, high = option.name, option.min, option.max
    try:
        number = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"{name} {text} is not {what}", hint=f"for example {name} 4") from None
    below = low is not None and not number >= low
    if below or (high is not None and not number <= high):
        limits = f"{low or 0:g} or more" if high is None else f"from {low or 0:g} to {high:g}"
        raise UsageError(
            f"{name} {text} is out of range: it must be {limits}",
            hint=f"{name} {low if below else high:g}",
        )
    return number


def pairs(name: str, texts: Sequence[str]) -> dict[str, str]:
    """Parse the NAME=VALUE pairs of a repeatable option. Raises UsageError."""
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
    """Parse a size such as `4G`, `512MiB` or `1000000`, in bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise UsageError(f"{name} {text!r} is not a size", hint=f"for example {name} 4G")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def _positive(name: str, text: str, *, what: str, hint: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"{name} {text} is not a {what}", hint=hint)
    return value


def percent(name: str, text: str) -> float:
    """Parse a percentage as a fraction. Raises UsageError."""
    return _positive(name, text, what="positive percentage", hint=f"for example {name} 50") / 100


def device(name: str, text: str) -> str:
    """Check the name of a device. Raises UsageError."""
    # PyTorch would reject it as well, but only after minutes of other work.
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        known = "auto, cpu, cuda, cuda:N, mps"
        raise UsageError(f"{name} {text!r} is not one of {known}", hint=f"{name} auto")
    return text


def _chosen(name: str, text: str, kinds: Iterable[StrEnum]) -> StrEnum:
    known = {str(kind): kind for kind in kinds}
    if text not in known:
        raise UsageError(f"{name} {text} is not one of {', '.join(known)}", hint=near(text, known))
    return known[text]


def choices(
    kinds: Sequence[StrEnum], *, always: Sequence[StrEnum] = ()
) -> Callable[[str, Any], tuple[StrEnum, ...]]:
    """Return a parser of comma-separated names of `kinds`; `always` come first."""

    def read(name: str, texts: str | Sequence[str]) -> tuple[StrEnum, ...]:
        names = _comma_separated(texts)
        if not names:
            raise UsageError(f"{name} names none of {', '.join(kinds)}")
        return (*always, *(_chosen(name, text, kinds) for text in names))

    return read


def rates(name: str, texts: Sequence[str]) -> tuple[float, ...] | None:
    """Parse learning rates; None stands for `auto`. Raises UsageError."""
    words = _comma_separated(texts)
    if words == ["auto"]:
        return None
    hint = f"{name} 1e-6,1e-7, or {name} auto alone"
    values = [_positive(name, word, what="learning rate", hint=hint) for word in words]
    return tuple(dict.fromkeys(values))


def _comma_separated(texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    return [word.strip().lower() for text in texts for word in text.split(",") if word.strip()]


DEVICE_OPTION = Option(
    ("--device",),
    "Device to compute on: auto, cpu, cuda, cuda:N or mps.",
    SPEED,
    metavar="DEVICE",
    read=device,
)
DEVICE = functools.partial(dataclasses.field, default="auto", metadata={"option": DEVICE_OPTION})
