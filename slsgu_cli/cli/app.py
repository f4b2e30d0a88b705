"""The application, and what every command shares: options, the store, how it ends.

A command is a function `(session, ...)`. Its parameters are records, and each is spread
into the options that its fields carry; the records are made of what was given.
"""

import contextlib
import functools
import importlib
import inspect
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.cli import usage
from slsgu_cli.cli.usage import Asked, Words
from slsgu_cli.errors import Ended, ExitCode, MissingError, SlsguError, ended_by
from slsgu_cli.records.codec import without_none
from slsgu_cli.records.words import COMMON, Option, Place, places

if TYPE_CHECKING:
    from slsgu_cli.cli.console import Console
    from slsgu_cli.store.store import Store

# The commands as the help lists them, in the order of use: in which room of `slsgu_cli.cli`
# each is, and what it does. A room is loaded when one of its commands is wanted.
GROUPS = {
    "The five steps, and a look at a set": {
        "build-sets": ("steps", "Curate a forget set, a retain set and evaluation sets."),
        "show": ("steps", "Look at a set before it is used; drop rows."),
        "grad": ("steps", "Compute the forget and retain gradients of a set, once."),
        "rank": ("steps", "Score layers by importance and alignment; mark Pareto fronts."),
        "search": ("steps", "Find each front layer's step size and write the best edit."),
        "apply": ("steps", "Write a copy of a model with edits in it."),
    },
    "What an edit does": {
        "eval": ("steps", "Measure what is forgotten and what is kept."),
        "verify": ("verify", "Try to bring a forgotten concept back, and say what comes back."),
        "report": ("verify", "Write one HTML page: what was forgotten, how, at what cost."),
        "compare": ("study", "Compare with other unlearning methods (the paper's Table 1)."),
    },
    "On a model built on CLIP": {
        "export": ("downstream", "Write edits as a LoRA, for the clients of such models."),
        "generate": ("downstream", "Generate images before and after an edit."),
        "ask": ("downstream", "Ask a LLaVA about images before and after an edit."),
    },
    "Studies": {
        "trajectory": ("study", "Follow accuracies over a fine grid of steps, layer by layer."),
        "sweep": ("study", "Forget each class of a list, one at a time."),
    },
    "A whole job, from request to proof": {
        "init": ("removals", "Write a recipe to fill in, or a demonstration."),
        "run": ("removals", "Run the remaining stages of a recipe: forget, write, measure, gate."),
        "requests": ("removals", "List the removal requests of a recipe and their states."),
        "evidence": ("removals", "Write evidence of a removal: page, figures, digests."),
    },
    "The store, and a demonstration": {
        "ls": ("steps", "List what the store holds and what each thing was made from."),
        "check": ("steps", "Read a store and say what is damaged; tell if an edit is in a model."),
        "gc": ("steps", "List what nothing in the store refers to, and remove it."),
        "env": ("env", "Show versions, devices and extras."),
        "demo": ("demo", "Make the embedded CLIP forget a brand, command by command."),
    },
}
# The commands that a launcher may start in several processes.
IN_SEVERAL = {"grad", "rank", "search", "sweep"}
# The commands that take their options from a recipe where one is named.
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

# The functions of the commands whose rooms are loaded.
_FUNCTIONS: dict[str, Callable[..., None]] = {}


class _Group(TyperGroup):
    """The commands in groups; each is spread into its options when it is wanted."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command with its options; None where there is none of that name."""
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            from typer.models import CommandInfo

            room, summary = COMMANDS[cmd_name]
            importlib.import_module(f"slsgu_cli.cli.{room}")
            function = _FUNCTIONS[cmd_name]
            about = f"{summary}\n\n{inspect.getdoc(function)}"
            run = _runner(cmd_name, function)
            info = CommandInfo(cmd_name, cls=usage.Command, callback=run, help=about)
            self.commands[cmd_name] = typer.main.get_command_from_info(
                info, pretty_exceptions_short=False, rich_markup_mode=None
            )
        return self.commands.get(cmd_name)

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
        """Run a command line; one that is refused ends as a command does that is."""
        words = list(sys.argv[1:] if args is None else args)
        try:
            return super().main(words, *more, **extra)
        except SlsguError as error:
            from slsgu_cli import processes
            from slsgu_cli.cli.console import Console

            named = next((word for word in words if word in COMMANDS), None)
            console = Console(command=named, as_json=usage.wants_json(words))
            if processes.reports_error():
                console.error(error)
                console.flush(error)
            sys.exit(error.exit_code)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that is named; an interrupt before it begins has its exit code too."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            sys.exit(Ended.code(interrupt))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the options before the command. Raises UsageError."""
        with usage.explained(ctx):
            return super().parse_args(ctx, [] if args == ["--"] else args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is named. Raises UsageError."""
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            raise usage.unknown_command(ctx, args[0])
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each group with what each command does."""
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, does) for name, (_, does) in commands.items()])


app = typer.Typer(
    name="slsgu",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained CLIP forget a concept with one gradient pass and one edited layer.\n\n"
    "The usual way: build-sets, grad, rank, search, apply. `slsgu demo` shows all of it.",
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
    """Hold the options that stand before any command."""


_STORE = Option(
    ("--store",),
    "Folder or fsspec URL where artifacts are kept; SLSGU_STORE sets it, as "
    "such a variable does every option: SLSGU_MAX_LOSS is --max-loss.",
    COMMON,
    metavar="STORE",
    without=usage.STORE,
)
_FLAGS = (
    Option(("--no-wait",), "Compute what another process is computing for the store, too.", COMMON),
    Option(("--json",), "Print one JSON document.", COMMON),
    Option(("--quiet", "-q"), "Results only.", COMMON),
    Option(("--verbose", "-v"), "Say how it is done.", COMMON),
    Option(("--debug",), "Show tracebacks.", COMMON),
)
_RECIPE = Option(
    ("--recipe",),
    "Take the options that are not given from this recipe.",
    COMMON,
    metavar="FILE",
    without="none",
)


@dataclass(frozen=True, slots=True)
class Session:
    """The store and the console of one command, and the options of its own that were typed."""

    store: "Store"
    console: "Console"
    options: tuple[str, ...] = ()


# Marks a parameter whose options are taken and not shown.
HIDDEN = "hidden"
# Marks a record that is asked for in one way or another: what it requires must be given.
NEEDED = "needed"
Names = Annotated[Sequence[str], Option(metavar="NAME...", help="Names of sets.", completes="set")]
Name = Annotated[str, Option(metavar="NAME", help="Name of the set.", completes="set")]


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter of a command function: the options it is spread into, and how it is made."""

    places: list[Place]
    make: Callable[[Words], Any]
    optional: bool = False
    hidden: bool = False

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> "_Parameter":
        kind, marks = parameter.annotation, list[Any]()
        if typing.get_origin(kind) is Annotated:
            kind, *marks = typing.get_args(kind)
        for mark in marks:
            if isinstance(mark, Option):
                return cls._alone(mark, kind, parameter.default, hidden=HIDDEN in marks)
        if typing.get_origin(kind) is Asked:
            (record,) = typing.get_args(kind)
            make = functools.partial(Asked, record)
            return cls(places(record), make, NEEDED not in marks, HIDDEN in marks)
        optional = parameter.default is None
        record = without_none(kind)
        listed = places(record)

        def made(words: Words) -> Any:
            keys = {place.option.key for place in listed}
            needed = {place.option.key for place in listed if place.required}
            wanted = keys & words.typed or (keys & set(words) and needed <= set(words))
            return words.record(record) if wanted or not optional else None

        return cls(listed, made, optional=optional)

    @classmethod
    def _alone(cls, option: Option, kind: Any, default: Any, *, hidden: bool) -> "_Parameter":
        required = default is inspect.Parameter.empty
        place = Place((), option, without_none(kind), MISSING if required else default)

        def made(words: Words) -> Any:
            return place.value(words[option.key]) if option.key in words else default

        return cls([place], made, optional=not required, hidden=hidden)


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function `(session, ...)` as the command `name` with the common options.

    Its docstring stands in the help below what the command does.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _FUNCTIONS[name] = function
        return function

    return register


def _runner(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """Return what typer calls: it takes every option, and calls `function` with its records."""
    signature = inspect.signature(function, eval_str=True).parameters
    spread = {key: _Parameter.of(each) for key, each in list(signature.items())[1:]}
    options = [place.option for each in spread.values() for place in each.places]

    @functools.wraps(function)
    def run(ctx: typer.Context, **values: Any) -> None:
        # Not for `--help`, which takes a third of the time without them.
        from slsgu_cli import processes
        from slsgu_cli.cli.console import Console
        from slsgu_cli.store.ranks import RankStore

        environment: usage.FromEnvironment = ctx.obj
        words = Words(values, environment.variables)
        verbosity = -1 if words["quiet"] else int(words["verbose"])
        console = Console(name, verbosity=verbosity, as_json=words["json"])
        with _ending(console, debug=words["debug"]):
            _require_folder()
            if name not in IN_SEVERAL:
                processes.refuse_several(name)
            # Results go through the console alone; what a library prints is no result.
            heard, others = _heard(console)
            with (
                contextlib.redirect_stdout(others),
                contextlib.redirect_stderr(others),
                progress.using(heard),
                processes.joined(),
                environment.naming_variables(options),
            ):
                words.setdefault("store", usage.STORE)
                made = {key: each.make(words) for key, each in spread.items()}
                store = RankStore(words["store"], waits=not words["no_wait"])
                if not store.is_lasting:
                    progress.warn(f"{store.url} keeps nothing when this command has ended")
                typed = [each.name for each in options if each.flags and each.key in words.typed]
                session = Session(store, heard, tuple(dict.fromkeys(typed)))
                function(session, **made)
            heard.flush()

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *_signature(spread, recipe=name in IN_RECIPE)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


@contextlib.contextmanager
def _ending(console: "Console", *, debug: bool) -> Iterator[None]:
    """End a command: exit with the code for what was raised, and a message for the user."""
    from slsgu_cli import processes

    try:
        yield
    except (typer.Exit, SystemExit):
        raise
    except BrokenPipeError:
        # The reader of the pipe has gone, as `head` does: there is nothing to tell.
        raise typer.Exit(ExitCode.UNREAD) from None
    except BaseException as error:  # noqa: BLE001 - whatever it is, the user is told
        interrupted = isinstance(error, KeyboardInterrupt)
        if debug and not interrupted:
            traceback.print_exception(error)
        ended = ended_by(error)
        if processes.reports_error():
            if interrupted:
                console.warn(ended.message)
            else:
                console.error(ended)
        if processes.prints():
            # Results that were ready are in the document, beside the error.
            with contextlib.suppress(OSError, SlsguError):
                console.flush(ended)
        raise typer.Exit(ended.exit_code) from None


def _require_folder() -> None:
    """Raise MissingError where the folder that this runs in is gone: MKL would end the process."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise MissingError(
            "the folder that this runs in is gone", hint="cd to a folder that is there"
        ) from error


def _heard(console: "Console") -> "tuple[Console, TextIO]":
    """Return what a command tells, and where others print; nobody hears but the first process."""
    from slsgu_cli import processes

    if processes.prints():
        return console, sys.stderr
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115
    return console.writing_to(nowhere), nowhere


def _signature(spread: Mapping[str, _Parameter], *, recipe: bool) -> list[inspect.Parameter]:
    """Return a parameter for each option; records that have the same option share it.

    With `recipe`, a recipe can be named.
    """
    options: dict[str, inspect.Parameter] = {}
    for each in spread.values():
        for place in each.places:
            required = place.required and not each.optional
            parameter = _parameter(place, required=required, hidden=each.hidden)
            options.setdefault(place.option.key, parameter)
    named = [_parameter(Place((), _RECIPE, Path, None))] if recipe else []
    store = _parameter(Place((), _STORE, str, None))
    flags = [_parameter(Place((), each, bool, False)).replace(default=False) for each in _FLAGS]
    return [*options.values(), *named, store, *flags]


def _parameter(place: Place, *, required: bool = False, hidden: bool = False) -> inspect.Parameter:
    option = place.option
    settings: dict[str, Any] = {"help": place.help(required=required), "show_default": False}
    if option.completes is not None:
        settings["autocompletion"] = usage.completion(option.completes)
    if not place.is_flag:
        settings["metavar"] = place.metavar
    if option.flags:
        settings |= {"rich_help_panel": option.panel, "hidden": hidden}
    kind: Any = bool if place.is_flag else Path if place.item is Path else str
    kind = list[kind] if place.repeatable or option.once else kind
    what = typer.Option(*option.flags, **settings) if option.flags else typer.Argument(**settings)
    return inspect.Parameter(
        option.key,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[kind if required else kind | None, what],
    )
