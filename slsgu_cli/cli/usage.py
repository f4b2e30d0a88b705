"""Usage errors with hints, options from recipes, help in panels, and records of parsed options."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import typer
from typer.core import TyperCommand

from slsgu_cli.errors import UsageError
from slsgu_cli.records.option_fields import COMMON, PANELS, build, option_fields

R = TypeVar("R")

# The usage error of click, which some versions of typer bring along.
ParserError: type[Exception] = typer.BadParameter.__bases__[0]


def usage_error(caught: Exception, command: str | None) -> UsageError:
    """Return a usage error of typer as ours, with a hint."""
    error: Any = caught
    message, context = error.format_message().rstrip("."), error.ctx
    if context is not None and context.parent is None and hasattr(error, "option_name"):
        return UsageError(message, hint="options follow the command: slsgu COMMAND [OPTIONS]")
    if context is not None and command is not None:
        message = naming_variables(message, context)
    return UsageError(message, hint=" ".join(filter(None, ("slsgu", command, "--help"))))


def naming_variables(message: str, context: Any) -> str:
    """Return a message that names the environment variables of the options in it."""
    flags = re.findall(r"--[\w-]+", message)
    origins = [
        f" ({param.envvar} sets {param.opts[0]})"
        for param in context.command.params
        if param.opts[0] in flags and source(context, param.name) == "ENVIRONMENT"
    ]
    return "".join([message, *origins])


def source(context: Any, name: str) -> str:
    """Return what sets an option: COMMANDLINE, ENVIRONMENT, DEFAULT_MAP (a recipe) or DEFAULT."""
    return str(getattr(context.get_parameter_source(name), "name", "DEFAULT"))


class Command(TyperCommand):
    """A command that also takes options from a recipe, and shows its options in panels."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments. A recipe gives the defaults of options."""
        if not ctx.resilient_parsing and any("--recipe" in param.opts for param in self.params):
            ctx.default_map = self._of_recipe(ctx, args)
        return super().parse_args(ctx, args)

    def _of_recipe(self, ctx: Any, args: list[str]) -> dict[str, Any]:
        parser = self.make_parser(ctx)
        # A recipe has options of other commands as well.
        parser.ignore_unknown_options = True
        given, *_ = parser.parse_args(args=list(args))
        path = given.get("recipe") or os.environ.get("SLSGU_RECIPE")
        if not path or "help" in given:
            return {}
        from slsgu_cli.removals.overlay import options_for
        from slsgu_cli.removals.reading import read_recipe

        names = given.get("names") or given.get("name") or ()
        names = [names] if isinstance(names, str) else list(names)
        words = options_for(ctx.info_name, read_recipe(Path(path)), names)
        values, _, order = parser.parse_args(args=words)
        return {param.name: values[param.name] for param in order if param.opts[0].startswith("-")}

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


@dataclass(frozen=True, slots=True)
class ParsedOptions(Generic[R]):
    """The options of a record that a command may not need.

    `values` and `typed` are by the key of the option; `typed` excludes variables and recipes.
    """

    kind: type[R]
    values: Mapping[str, Any]
    typed: Collection[str]

    def record(self) -> R:
        """Return the record. Raises UsageError if a required option is missing."""
        values = {}
        for field in option_fields(self.kind):
            if field.option.key in self.values:
                text = self.values[field.option.key]
                if text in ("", [""]):
                    name = field.option.name
                    raise UsageError(f"{name} needs a value", hint=f"{name} {field.metavar}")
                values[field.path] = field.value(text)
        return build(self.kind, values)

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
