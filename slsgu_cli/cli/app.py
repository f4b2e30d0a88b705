"""The application: its commands, their common options, the store, exit codes.

A command is a function `(session, ...)`. Its other parameters are records; the fields of these
records become the options of the command.
"""

import contextlib
import functools
import importlib
import inspect
import os
import sys
import traceback
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.cli import usage
from slsgu_cli.cli.console import Console
from slsgu_cli.cli.usage import ParsedOptions
from slsgu_cli.errors import Ended, ExitCode, SlsguError, UsageError, ended_by
from slsgu_cli.records.codec import without_none
from slsgu_cli.records.common_options import CommonOptions
from slsgu_cli.records.option_fields import Option, OptionField, option_fields
from slsgu_cli.text import near

if TYPE_CHECKING:
    from slsgu_cli.store.store import Store

# The commands in the order of the help: the module of `slsgu_cli.cli` and a summary.
# A module is imported when one of its commands is needed.
GROUPS = {
    "Unlearning, step by step": {
        "build-sets": ("build_sets", "Curate a forget set, a retain set and evaluation sets."),
        "show": ("show", "Inspect a set before using it, and drop rows."),
        "grad": ("grad", "Compute the forget and retain gradients of a set."),
        "rank": ("rank", "Score layers by importance and alignment, and mark Pareto fronts."),
        "search": (
            "search",
            "Find step sizes for the layers on the fronts and write the best edit.",
        ),
        "apply": ("apply", "Write a copy of a model with edits applied."),
    },
    "Measuring an edit": {
        "eval": ("evaluate", "Measure forgetting and retained accuracy."),
        "verify": ("verify", "Try to recover a forgotten concept, and report what comes back."),
        "report": ("verify", "Write an HTML report of an edit and its cost."),
        "compare": ("compare", "Compare with other unlearning methods (Table 1 of the paper)."),
    },
    "Models built on CLIP": {
        "export": ("export", "Write edits as a LoRA."),
        "generate": ("generate", "Generate images before and after an edit."),
        "ask": ("generate", "Ask a LLaVA about images before and after an edit."),
    },
    "Studies": {
        "trajectory": ("trajectory", "Measure accuracy along a fine grid of steps."),
        "sweep": ("sweep", "Forget each class of a list, one at a time."),
    },
    "Removal requests": {
        "init": ("removals", "Write a starter recipe."),
        "run": ("removals", "Run the remaining stages of a recipe: forget, write, measure, gate."),
        "requests": ("removals", "List the removal requests of a recipe and their status."),
        "evidence": ("removals", "Write the evidence of a removal: page, figures, digests."),
    },
    "Store and environment": {
        "ls": ("store_commands", "List the artifacts in the store and their origins."),
        "check": ("store_commands", "Check a store for damage, or a model for an edit."),
        "gc": ("store_commands", "List or remove artifacts that nothing refers to."),
        "env": ("env", "Print versions, devices and installed extras."),
        "demo": ("demo", "Make the embedded CLIP forget a brand, step by step."),
    },
}
# Commands that may run in several processes.
IN_SEVERAL = {"grad", "rank", "search", "sweep"}
# Commands with the option --recipe.
IN_RECIPE = {
    "build-sets",
    "grad",
    "rank",
    "search",
    "trajectory",
    "apply",
    "eval",
    "verify",
    "report",
}
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}

# The functions of the commands whose modules are loaded.
_FUNCTIONS: dict[str, Callable[..., None]] = {}


class _Group(TyperGroup):
    """The commands in groups. A command is imported when it is needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command with its options, or None if there is none of this name."""
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            from typer.models import CommandInfo

            module, summary = COMMANDS[cmd_name]
            importlib.import_module(f"slsgu_cli.cli.{module}")
            function = _FUNCTIONS[cmd_name]
            info = CommandInfo(
                cmd_name,
                cls=usage.Command,
                callback=_runner(cmd_name, function),
                help=f"{summary}\n\n{inspect.getdoc(function)}",
            )
            self.commands[cmd_name] = typer.main.get_command_from_info(
                info, pretty_exceptions_short=False, rich_markup_mode=None
            )
        return self.commands.get(cmd_name)

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
        """Run a command line, and report usage errors like all other errors."""
        arguments = list(sys.argv[1:] if args is None else args)
        command = next((word for word in arguments if word in COMMANDS), None)
        try:
            sys.exit(super().main(arguments, *more, **{**extra, "standalone_mode": False}) or 0)
        except typer.Abort as abort:
            # An interrupt before the command begins.
            sys.exit(Ended.code(typing.cast(KeyboardInterrupt, abort.__cause__)))
        except usage.ParserError as caught:
            if type(caught).__name__ == "NoArgsIsHelpError":
                typer.echo(str(caught))
                sys.exit(ExitCode.USAGE)
            error: SlsguError = usage.usage_error(caught, command)
        except SlsguError as caught:
            error = caught
        from slsgu_cli import processes

        as_json = os.environ.get("SLSGU_JSON", "") in ("1", "true", "yes", "on")
        console = Console(command=command, as_json="--json" in arguments or as_json)
        if processes.reports_error():
            console.error(error)
            console.flush(error)
        sys.exit(error.exit_code)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command. Raises UsageError if it does not exist."""
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            hint = near(args[0], COMMANDS) or "slsgu --help"
            raise UsageError(f"there is no command {args[0]}", hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the groups of commands."""
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, summary) for name, (_, summary) in commands.items()])


app = typer.Typer(
    name="slsgu",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained CLIP forget a concept with one gradient pass and one edited layer.\n\n"
    "Typical use: build-sets, grad, rank, search, apply. Run `slsgu demo` to see every step.",
)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"slsgu {slsgu_cli.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options before the command."""


@dataclass(frozen=True, slots=True)
class Session:
    """The store and the console of a command, and its own options that were typed."""

    store: "Store"
    console: Console
    options: Sequence[str] = ()


# Marks ParsedOptions whose required options must be given.
NEEDED = "needed"
Names = Annotated[Sequence[str], Option(metavar="NAME...", help="Names of sets.")]
Name = Annotated[str, Option(metavar="NAME", help="Name of the set.")]


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter of a command function: its options, and how to make it of their values.

    `make` takes the values of options by key, and the keys that were typed.
    """

    fields: list[OptionField]
    required: bool
    make: Callable[[Mapping[str, Any], Collection[str]], Any]

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> "_Parameter":
        kind, marks, default = parameter.annotation, list[Any](), parameter.default
        if typing.get_origin(kind) is Annotated:
            kind, *marks = typing.get_args(kind)
        if marks and isinstance(marks[0], Option):
            key = marks[0].key
            required = default is inspect.Parameter.empty
            field = OptionField((), marks[0], without_none(kind), MISSING if required else default)
            return cls(
                [field],
                required,
                lambda values, typed: field.value(values[key]) if key in values else default,
            )
        if typing.get_origin(kind) is ParsedOptions:
            (record,) = typing.get_args(kind)
            make = functools.partial(ParsedOptions, record)
            return cls(option_fields(record), NEEDED in marks, make)
        record = without_none(kind)
        fields = option_fields(record)
        needed = {field.option.key for field in fields if field.required}

        def made(values: Mapping[str, Any], typed: Collection[str]) -> Any:
            # A variable alone does not ask for an optional record, unless it makes it complete.
            given = {field.option.key for field in fields} & {*typed} or needed <= values.keys()
            return ParsedOptions(record, values, typed).record() if given else default

        return cls(fields, default is not None, made)


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function `(session, ...)` as a command. Its docstring is part of the help."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _FUNCTIONS[name] = function
        return function

    return register


def _runner(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """Return the function that typer calls with all options of a command."""
    signature = inspect.signature(function, eval_str=True).parameters
    parameters = {key: _Parameter.of(each) for key, each in list(signature.items())[1:]}
    fields = [
        (field, field.required and each.required)
        for each in parameters.values()
        for field in each.fields
    ]
    flags = {field.option.key: field.option.name for field, _ in fields if field.option.flags}
    for field in option_fields(CommonOptions):
        if field.path != ("recipe",) or name in IN_RECIPE:
            fields.append((field, False))
    options: dict[str, inspect.Parameter] = {}
    for field, required in fields:
        # Records share options of the same name.
        options.setdefault(field.option.key, _option_of(field, required=required))

    @functools.wraps(function)
    def run(ctx: typer.Context, **given: Any) -> None:
        # Not needed for `--help`, which would take a third longer with them.
        from slsgu_cli import processes
        from slsgu_cli.store.ranks import RankStore

        values = {key: value for key, value in given.items() if value not in (None, [], ())}
        typed = {key for key in values if usage.source(ctx, key) == "COMMANDLINE"}
        common = ParsedOptions(CommonOptions, values, typed).record()
        verbosity = -1 if common.quiet else int(common.verbose)
        console = Console(name, verbosity=verbosity, as_json=common.json)
        with _ending(console, ctx, debug=common.debug):
            if name not in IN_SEVERAL:
                processes.refuse_several(name)
            rank_console, rank_stderr = console, sys.stderr
            if not processes.prints():
                rank_stderr = Path(os.devnull).open("w")  # noqa: SIM115
                rank_console = Console.writing_to(rank_stderr)
            # Only the console prints results; libraries print to stderr.
            with (
                contextlib.redirect_stdout(rank_stderr),
                contextlib.redirect_stderr(rank_stderr),
                progress.using(rank_console),
                processes.joined(),
            ):
                made = {key: each.make(values, typed) for key, each in parameters.items()}
                store = RankStore(common.store, waits=not common.no_wait)
                if not store.is_lasting:
                    progress.warn(f"{store.url} is discarded when this command ends")
                function(
                    Session(store, rank_console, [flags[key] for key in flags if key in typed]),
                    **made,
                )
            rank_console.flush()

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    listed = [context, *options.values()]
    run.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in listed}
    return run


@contextlib.contextmanager
def _ending(console: Console, ctx: typer.Context, *, debug: bool) -> Iterator[None]:
    """Report what a command raises, and exit with its code."""
    from slsgu_cli import processes

    try:
        yield
    except (typer.Exit, SystemExit):
        raise
    except BrokenPipeError:
        raise typer.Exit(ExitCode.UNREAD) from None
    except BaseException as error:  # noqa: BLE001 - every error is reported
        interrupted = isinstance(error, KeyboardInterrupt)
        if debug and not interrupted:
            traceback.print_exception(error)
        ended = ended_by(error)
        if isinstance(ended, UsageError):
            ended.message = usage.naming_variables(ended.message, ctx)
        if processes.reports_error():
            if interrupted:
                console.warn(ended.message)
            else:
                console.error(ended)
        if processes.prints():
            # The document contains the results so far and the error.
            with contextlib.suppress(OSError, SlsguError):
                console.flush(ended)
        raise typer.Exit(ended.exit_code) from None


def _option_of(field: OptionField, *, required: bool) -> inspect.Parameter:
    """Return the parameter that typer makes an option of. All values are texts."""
    declared = field.option
    help_text = declared.help
    if field.repeatable and declared.flags:
        help_text += " Repeatable."
    default = None if required else field.default_words()
    if default is not None:
        help_text += f"  [default: {default}]"
    settings: dict[str, Any] = {"help": help_text, "show_default": False}
    if not field.is_flag:
        settings["metavar"] = field.metavar
    if declared.flags:
        variable = "SLSGU_" + declared.name.removeprefix("--").replace("-", "_").upper()
        settings |= {"envvar": variable, "show_envvar": False, "rich_help_panel": declared.panel}
        what = typer.Option(*declared.flags, **settings)
    else:
        what = typer.Argument(**settings)
    kind: Any = bool if field.is_flag else list[str] if field.repeatable else str
    return inspect.Parameter(
        declared.key,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[kind if required else kind | None, what],
    )
