"""Recipes in TOML: their tables and keys, and a reader whose errors name the line."""

import re
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.records.figures import Assertion
from slsgu_cli.records.option_fields import ROWS, OptionField, build, option, option_fields
from slsgu_cli.records.options import BuildRequest, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.verification import VerifyRequest
from slsgu_cli.removals.recipe import (
    BOUNDS,
    EvaluationRows,
    Outputs,
    Recipe,
    RemovalRequest,
    Together,
)
from slsgu_cli.text import near


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a recipe: its record, its description, and the fields to omit.

    A recipe may have `many` of them, as a list or each under its own name.
    """

    kind: type
    about: str
    omit: Collection[str] = ()
    many: bool = False

    def option_fields(self) -> dict[str, OptionField]:
        """Return the options of the record by key, each with its key as its flag."""
        return {
            (key := each.path[-1]): replace(each, option=replace(each.option, flags=(key,)))
            for each in option_fields(self.kind)
            if each.path[0] not in self.omit
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The keys of a recipe before its first table."""

    name: str = option("", help="Name of the recipe.", without="that of the file")
    model: str = option(..., help="The model, as for --model.")
    pretrained: str | None = option(None, help="Weights of a model name, as for --pretrained.")
    bounds: tuple[Assertion, ...] = option((), help="Bounds of every request.", **BOUNDS)
    together: Together = option(
        Together.JOINT, help="Search requests jointly, each alone (sum), or each after the others."
    )
    shared_retain: bool = option(
        False, help="Share one retain set without any requested concept.", panel=ROWS
    )


HEAD = Table(Head, "A removal job: model, data, options, requests, outputs.")
# Fields that other tables set or that a recipe does not need.
OF_REQUEST = ("name", "concept", "model", "match", "not_match", "collect", "dropped")
OF_EVALUATION = ("evals", "classes", "templates", "tests", "forget_eval")
TABLES = {
    "sets": Table(BuildRequest, "Sources of the sets.", (*OF_REQUEST, *OF_EVALUATION)),
    "evaluation": Table(EvaluationRows, "Evaluation sets by name.", many=True),
    "grad": Table(PassOptions, "How to compute gradients.", ("shard",)),
    "rank": Table(RankOptions, "How to rank layers.", ("shard",)),
    "search": Table(SearchOptions, "How to search for edits.", ("after", "shard")),
    "verify": Table(VerifyRequest, "How to verify the result.", ("model", "edits")),
    "request": Table(RemovalRequest, "A concept to remove.", many=True),
    "outputs": Table(Outputs, "What to write."),
}


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a TOML file. Raises MissingError, InputError."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise MissingError(f"there is no recipe {path}", hint=f"slsgu init {path}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the recipe {path}: {error}") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, path: str) -> Recipe:
    """Return the recipe in a text from the file `path`. Raises InputError."""
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    return _Reader(text, path).recipe(content)


@dataclass(frozen=True, slots=True)
class _Reader:
    text: str
    path: str

    def recipe(self, content: dict[str, Any]) -> Recipe:
        head_keys = {key: value for key, value in content.items() if key not in TABLES}
        head: Head = self._record(HEAD, head_keys, "")
        evaluations = {
            name: self._record(TABLES["evaluation"], value, f"evaluation.{name}")
            for name, value in self._tables(content, "evaluation", dict).items()
        }
        requests = tuple(
            self._record(TABLES["request"], value, "request", number)
            for number, value in enumerate(self._tables(content, "request", list))
        )
        records = {
            key: self._record(table, content.get(key, {}), key)
            for key, table in TABLES.items()
            if not table.many
        }
        records["sets"] = replace(
            records["sets"],
            evals={name: each.source for name, each in evaluations.items()},
            classes={n: each.classes for n, each in evaluations.items() if each.classes},
            templates={n: each.templates for n, each in evaluations.items() if each.templates},
            tests={n: each.test for n, each in evaluations.items() if each.test},
        )
        if "verify" not in content:
            records["verify"] = None
        try:
            return Recipe(
                name=head.name or Path(self.path).stem,
                model=ModelSpec(head.model, head.pretrained),
                together=head.together,
                shared_retain=head.shared_retain,
                bounds=head.bounds,
                requests=requests,
                **records,
            )
        except UsageError as error:
            raise InputError(f"{self.path}: {error.message}", hint=error.hint) from error

    def _tables(self, content: dict[str, Any], key: str, kind: type) -> Any:
        value = content.get(key, kind())
        inner = value.values() if isinstance(value, dict) else value
        if not isinstance(value, kind) or not all(isinstance(each, dict) for each in inner):
            header = f"[[{key}]]" if kind is list else f"[{key}.NAME]"
            self._refuse(f"{key} is not a table", "", key, hint=f"begin each with {header}")
        return value

    def _record(self, table: Table, values: Any, at: str, number: int = 0) -> Any:
        """Return the record of the `number`th table `at`. Raises InputError."""
        if not isinstance(values, dict):
            self._refuse(f"{at} is not a table", "", at, hint=f"[{at}]")
        known = table.option_fields()
        fields = {}
        for key, value in values.items():
            if key not in known:
                what = f"[{at}] has no key" if at else "a recipe has no key or table"
                names = sorted(known) if at else [*known, *TABLES]
                hint = near(key, names) or f"it takes {', '.join(names)}"
                self._refuse(f"{what} {key}", at, key, number, hint=hint)
            fields[known[key].path] = self._value(known[key], value, at, number)
        for key, place in known.items():
            if place.required and key not in values:
                what = f"{f'[{at}]' if at else 'it'} has no {key}"
                hint = f"{key}: {place.option.help.rstrip('.')}"
                self._refuse(what, at, key, number, hint=hint)
        try:
            return build(table.kind, fields)
        except UsageError as error:
            self._refuse(error.message, at, "name", number, hint=error.hint)

    def _value(self, place: OptionField, value: Any, at: str, number: int) -> Any:
        """Return the value of a key. Raises InputError for another type."""
        key = place.path[-1]
        if place.is_flag:
            if not isinstance(value, bool):
                self._refuse(f"{key} is neither true nor false", at, key, number)
            return value
        try:
            if not place.repeatable:
                return place.value(_word(place, value))
            if not isinstance(value, list):
                raise UsageError(f"{key} is not a list", hint=f'{key} = ["..."]')
            return place.value([_word(place, each) for each in value])
        except UsageError as error:
            self._refuse(error.message, at, key, number, hint=error.hint)

    def _refuse(
        self, message: str, at: str, key: str, number: int = 0, *, hint: str | None = None
    ) -> NoReturn:
        raise InputError(f"{self.path}, line {self._line(at, key, number)}: {message}", hint=hint)

    def _line(self, at: str, key: str, number: int) -> int:
        """Return the line of a key in the `number`th table `at`, or the line of the table."""
        current, inside, table_line = -1, not at, 1
        assignment = re.compile(rf"\s*([\"']?){re.escape(key)}\1\s*[.=]")
        for line_number, line in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[\[?([^\]]+)\]", line):
                name = ".".join(part.strip().strip("\"'") for part in header[1].split("."))
                if not at and key in (name, name.partition(".")[0]):
                    return line_number
                current += name == at
                inside = name == at and current == number
                if inside:
                    table_line = line_number
            elif inside and assignment.match(line):
                return line_number
        return table_line


def _word(place: OptionField, value: Any) -> str:
    """Return a TOML value as a word of the command line. Raises UsageError."""
    key, numeric = place.path[-1], place.metavar in ("N", "NUMBER")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{key} takes single values only", hint=f"{key}: {place.option.help}")
    if isinstance(value, str) == numeric and place.option.read is None:
        raise UsageError(f"{key} {value!r} is not a {'number' if numeric else 'string'}")
    return value if isinstance(value, str) else repr(value)
