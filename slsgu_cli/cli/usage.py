"""What typer does not do for the command line.

Usage errors get the form of all other errors, with a hint. Options may come from environment
variables and recipes, and only those that were typed can be out of place. Shells complete names
in the store.
"""

import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Generic, TypeVar

import typer
from typer.core import TyperCommand

from slsgu_cli.errors import UsageError
from slsgu_cli.records.option_fields import COMMON, PANELS, Option, build, option_fields
from slsgu_cli.text import enumerated, near

R = TypeVar("R")

STORE = "./slsgu-store"
# The usage error of click, which some versions of typer bring along.
ParserError: type[Exception] = typer.BadParameter.__bases__[0]


def usage_error(caught: Exception, command: str = "") -> UsageError:
    """Return a usage error of typer as ours, with a hint. The parser does not set its context."""
    error: Any = caught
    if type(error).__name__ == "NoSuchOption":
        return _unknown_option(error.ctx, error.option_name)
    message = error.format_message().rstrip(".")
    name = getattr(getattr(error, "param", None), "name", None)
    if error.ctx is not None and name in (error.ctx.obj or {}):
        message += f" ({error.ctx.obj[name][1]} sets {error.param.opts[0]})"
    hint = f"`slsgu {command} --help` lists its options"
    return UsageError(message, hint=hint if error.ctx is None else _see_help(error.ctx))


def _unknown_option(ctx: Any, name: str) -> UsageError:
    root = ctx.find_root()
    group = root.command
    commands = {each: group.get_command(ctx, each) for each in group.list_commands(ctx)}
    commands |= {root.info_name: group}
    owners = [each for each, command in commands.items() if name in _flags(ctx, command)]
    what = f"{ctx.info_name} has no option {name}"
    if owners and ctx is root:
        hint = f"{root.info_name} COMMAND ... {name}"
        return UsageError(f"{name} must follow the command", hint=hint)
    if owners:
        verb = "has" if len(owners) == 1 else "have"
        return UsageError(f"{what}; {enumerated(owners)} {verb} it", hint=_see_help(ctx))
    return UsageError(what, hint=near(name, _flags(ctx, ctx.command)) or _see_help(ctx))


def unknown_command(ctx: Any, name: str) -> UsageError:
    """Return the error for a command that does not exist."""
    hint = near(name, ctx.command.list_commands(ctx)) or _see_help(ctx)
    return UsageError(f"there is no command {quote(name)}", hint=hint)


def _see_help(ctx: Any) -> str:
    what = "commands" if hasattr(ctx.command, "list_commands") else "options"
    return f"`{ctx.command_path} --help` lists its {what}"


def _flags(ctx: Any, command: Any) -> dict[str, Any]:
    """Return the options of a command by flag."""
    options = [param for param in command.get_params(ctx) if param.param_type_name == "option"]
    return {flag: each for each in options for flag in (*each.opts, *each.secondary_opts)}


class Command(TyperCommand):
    """A command that also takes options from variables and a recipe."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments. The command line overrides variables, and these a recipe."""
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        given: list[Any] = list(order)
        if not (ctx.resilient_parsing or any(param.is_eager for param in given)):
            flags = _flags(ctx, self)
            for param in given:
                if param in flags.values() and not param.is_flag:
                    _check_given(param, values[param.name], given.count(param), flags)
            ctx.obj = self._settings(ctx, values, flags)
            ctx.default_map = {name: value for name, (value, _) in ctx.obj.items()}
        return super().parse_args(ctx, args)

    def _settings(
        self, ctx: Any, values: Mapping[str, Any], flags: Mapping[str, Any]
    ) -> dict[str, tuple[Any, str]]:
        """Return the values that a recipe and variables give to options, and the origin of each."""
        settings: dict[str, tuple[Any, str]] = {}
        for param in flags.values():
            for variable in variables_of(param.opts):
                if text := os.environ.get(variable):
                    value = _values(variable, text) if param.multiple else text
                    settings[param.name] = value, variable
        path = values.get("recipe") or settings.get("recipe", ("", ""))[0]
        if "--recipe" not in flags or not path:
            return settings
        from slsgu_cli.removals.overlay import options_for
        from slsgu_cli.removals.reading import read_recipe

        recipe = read_recipe(Path(path))
        names = values.get("names") or values.get("name") or ()
        names = [names] if isinstance(names, str) else list(names)
        parser = self.make_parser(ctx)
        # A recipe may have options for other commands of the same job.
        parser.ignore_unknown_options = True
        chosen, _, order = parser.parse_args(args=options_for(ctx.info_name, recipe, names))
        listed = [param for param in order if param in flags.values()]
        from_recipe = {p.name: (chosen[p.name], f"the recipe {recipe.name}") for p in listed}
        return from_recipe | settings

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the arguments by their metavars."""
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        names = [(str(each.metavar), each.required) for each in arguments]
        return ["[OPTIONS]", *(name if needed else f"[{name}]" for name, needed in names)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options in panels; rich's own would triple the time that `--help` takes."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        panels |= {panel: [] for panel in PANELS}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                if param.param_type_name == "argument":
                    panels["Arguments"].append((str(param.metavar), record[1]))
                else:
                    panels[getattr(param, "rich_help_panel", None) or COMMON].append(record)
        for panel, rows in panels.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)


def _check_given(param: Any, value: Any, times: int, flags: Mapping[str, Any]) -> None:
    """Refuse values that are empty or other options, and options that are given twice."""
    name = param.opts[0]
    for text in value if param.multiple else [value]:
        if text in flags or not text:
            what = f", and {text} is an option" if text else ""
            raise UsageError(f"{name} needs a value{what}", hint=f"{name} {param.metavar}")
    if times > 1 and not param.multiple:
        raise UsageError(f"{name} is given {times} times but takes one value", hint="give it once")


def variables_of(flags: Sequence[str]) -> list[str]:
    """Return the environment variables of an option, one for each long flag."""
    names = [flag.removeprefix("--") for flag in flags if flag.startswith("--")]
    return [f"SLSGU_{name.replace('-', '_').upper()}" for name in names]


def _values(variable: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(
            f"{variable}={text} cannot be split into values: {error}",
            hint=f"quote each value as in a shell: {variable}=\"a 'b c'\"",
        ) from None


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether a command line that failed to parse asks for JSON."""
    return "--json" in arguments or os.environ.get("SLSGU_JSON", "") in ("1", "true", "yes", "on")


@contextmanager
def naming_origins(options: Sequence[Option], settings: Mapping[str, Any]) -> Iterator[None]:
    """Name the variables and the recipe that set the options in an error message."""
    try:
        yield
    except UsageError as error:
        flags = re.findall(r"--[\w-]+", error.message)
        origins = [
            f"{settings[each.key][1]} sets {each.name}"
            for each in options
            if each.key in settings and each.name in flags
        ]
        suffix = f" ({', '.join(dict.fromkeys(origins))})" if origins else ""
        raise UsageError(f"{error.message}{suffix}", hint=error.hint) from error


def made(kind: type[R], values: Mapping[str, Any]) -> R:
    """Return a record from parsed options, by key. Raises UsageError."""
    return build(
        kind,
        {
            field.path: field.value(values[field.option.key])
            for field in option_fields(kind)
            if field.option.key in values
        },
    )


@dataclass(frozen=True, slots=True)
class ParsedOptions(Generic[R]):
    """The options of a record that a command may not need. `typed` excludes variables."""

    kind: type[R]
    values: Mapping[str, Any]
    typed: Collection[str]

    def record(self) -> R:
        """Return the record. Raises UsageError if a required option is missing."""
        return made(self.kind, self.values)

    def __contains__(self, field: str) -> bool:
        """Return whether an option of this field was given."""
        return any(
            each.path[0] == field and each.option.key in self.values
            for each in option_fields(self.kind)
        )

    def refuse(
        self, reason: str, *, hint: str, shared: "Sequence[ParsedOptions[Any]]" = ()
    ) -> None:
        """Raise UsageError if any option was typed that no record in `shared` has.

        Variables may set options that a command does not use.
        """
        others = {field.option.key for other in shared for field in option_fields(other.kind)}
        options = [field.option for field in option_fields(self.kind)]
        names = [each.name for each in options if each.key in {*self.typed} - others]
        if names:
            verb = "is" if len(names) == 1 else "are"
            raise UsageError(f"{', '.join(names)} {verb} {reason}", hint=hint)


def complete(what: str, params: Mapping[str, Any], rest: Sequence[str], start: str) -> list[str]:
    """Return the sets, edits or layers in the store whose names begin with `start`.

    `rest` has the arguments before an option whose value is completed.
    """
    # A shell that completes has no use for an error.
    with suppress(Exception):
        return [name for name in _stored_names(what, params, rest) if name.startswith(start)]
    return []


def _stored_names(what: str, params: Mapping[str, Any], rest: Sequence[str]) -> list[str]:
    from slsgu_cli.store.artifacts import Artifact
    from slsgu_cli.store.store import Store

    store = Store(params.get("store") or os.environ.get("SLSGU_STORE") or STORE)
    if what == "layer":
        from slsgu_cli.checkpoints.layers import known_as
        from slsgu_cli.records.method import Ranking

        names = next((params[key] for key in ("name", "name_edit") if params.get(key)), rest)
        name = names if isinstance(names, str) else names[0]
        ranking = store.read_record(Artifact.RANKING.path(name), Ranking)
        return [known_as(score.layer) for score in ranking.scores]
    kinds = [Artifact.SET, Artifact.EDIT] if what == "edit" else [Artifact.SET]
    return sorted({name for kind in kinds for name in kind.names(store)})
