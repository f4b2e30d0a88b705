"""The words of a command line: what is given, what a command takes, and what is wrong with it.

That is said as every other error is: what, where, what mends it. The parser under typer only
sees that a word does not fit. What was meant, and where the word belongs, is looked up here in
the commands and their options; so is what variables and a shell that completes know of them.
"""

import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import Any, Generic, TypeVar

import typer
from typer.core import TyperCommand

from slsgu_cli.errors import UsageError
from slsgu_cli.records.words import COMMON, PANELS, Option, build, places
from slsgu_cli.text import enumerated, near

R = TypeVar("R")

# Where artifacts are kept where nothing says it.
STORE = "./slsgu-store"
# What the parser raises, wherever the installed typer has it from: its own click, or click's.
ParserError: type[Exception] = typer.BadParameter.__bases__[0]


@contextmanager
def explained(ctx: Any) -> Iterator[None]:
    """Turn what the parser refuses of the command of `ctx` into a UsageError."""
    try:
        yield
    except ParserError as caught:
        error: Any = caught
        kind = type(caught).__name__
        if kind == "NoArgsIsHelpError":
            raise
        if kind == "NoSuchOption":
            raise _unknown_option(ctx, error.option_name) from caught
        if kind == "BadOptionUsage":
            raise _misused(error.option_name, _flags(ctx, ctx.command)) from caught
        if kind == "MissingParameter":
            raise _missing(ctx, error.param) from caught
        param = getattr(error, "param", None)
        what = ctx.command_path if param is None else _name(param)
        raise UsageError(f"{what}: {error.message.rstrip('.')}", hint=_help(ctx)) from caught


def check_words(ctx: Any, words: Sequence[str]) -> None:
    """Refuse what the parser would take: options given twice or without their value, more words.

    Raises UsageError, and what the parser raises.
    """
    if ctx.resilient_parsing:
        return
    _check_values(ctx, words)
    _, more, order = ctx.command.make_parser(ctx).parse_args(args=list(words))
    if any(param.is_eager for param in order):
        return
    for param in order:
        times = order.count(param)
        if times > 1 and _takes_value(param) and not param.multiple:
            raise UsageError(
                f"{_name(param)} is given {times} times and takes one value", hint="give it once"
            )
    if more and not ctx.allow_extra_args:
        places = [f"one {_name(param)}" for param in _params(ctx) if not _is_option(param)]
        verb = "is" if len(more) == 1 else "are"
        raise UsageError(
            f"{ctx.info_name} takes {' and '.join(places) or 'no arguments'}: "
            f"{', '.join(map(quote, more))} {verb} too much",
            hint=f"put quotes around what has spaces; {_help(ctx)}",
        )


# What a variable says of a flag.
WORDS_OF_FLAGS = {"1": True, "true": True, "yes": True, "on": True} | {
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


@dataclass(frozen=True, slots=True)
class FromEnvironment:
    """Options that variables or a recipe set: the words that give them, and what says so."""

    words: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, ctx: Any, words: Sequence[str]) -> "FromEnvironment":
        """Return what variables and a recipe add to the words of a command line, which wins.

        `SLSGU_MAX_LOSS=2` is `--max-loss 2`. A flag takes yes or no, a repeatable option several
        values, quoted as in a shell; an empty variable says nothing. Raises UsageError.
        """
        _, _, given = ctx.command.make_parser(ctx).parse_args(args=list(words))
        if ctx.resilient_parsing or any(param.is_eager for param in given):
            return cls()
        found: list[str] = []
        variables: dict[str, str] = {}
        for param in _params(ctx):
            if not _is_option(param) or param.hidden or param in given:
                continue
            for variable in variables_of(param.opts):
                if value := os.environ.get(variable, ""):
                    found += _words_of(param, variable, value)
                    variables[param.name] = variable
                    break
        return cls(tuple(found), variables)._with_recipe(ctx, words)

    def _with_recipe(self, ctx: Any, words: Sequence[str]) -> "FromEnvironment":
        """Add the options of the recipe that is named, if one is. Raises UsageError, InputError."""
        flags = _flags(ctx, ctx.command)
        parser = ctx.command.make_parser(ctx)
        values, _, given = parser.parse_args(args=[*self.words, *words])
        if "--recipe" not in flags or not values.get("recipe"):
            return self
        from slsgu_cli.removals.overlay import options_for
        from slsgu_cli.removals.reading import read_recipe

        recipe = read_recipe(Path(values["recipe"]))
        named = values.get("names", values.get("name")) or ()
        names = [named] if isinstance(named, str) else list(named)
        found = list(self.words)
        variables = dict(self.variables)
        said = iter(options_for(ctx.info_name, recipe, names))
        for word in said:
            flag, tied, _ = word.partition("=")
            param = flags.get(flag)
            takes = param is None or _takes_value(param)
            unit = [word] if tied or not takes else [word, next(said)]
            if param is not None and param not in given:
                found += unit
                variables[param.name] = f"the recipe {recipe.name}"
        return FromEnvironment(tuple(found), variables)

    @contextmanager
    def naming_variables(self, options: Sequence[Option]) -> Iterator[None]:
        """Name the variables of the options that an error is about."""
        names = {option.key: option.name for option in options}
        try:
            yield
        except UsageError as error:
            words = re.findall(r"--[\w-]+", error.message)
            told = [
                f"{variable} sets {names[key]}"
                for key, variable in self.variables.items()
                if names.get(key) in words
            ]
            message = f"{error.message} ({', '.join(told)})" if told else error.message
            raise UsageError(message, hint=error.hint) from error


def variables_of(flags: Sequence[str]) -> list[str]:
    """Return the variables that set an option: one for each of its long flags."""
    names = [flag.removeprefix("--") for flag in flags if flag.startswith("--")]
    return [f"SLSGU_{name.replace('-', '_').upper()}" for name in names]


def wants_json(words: Sequence[str]) -> bool:
    """Return whether a command line that may be refused asks for JSON."""
    return "--json" in words or WORDS_OF_FLAGS.get(os.environ.get("SLSGU_JSON", ""), False)


def _words_of(param: Any, variable: str, value: str) -> list[str]:
    """Return the words that give an option what its variable says. Raises UsageError."""
    name = _name(param)
    if param.is_flag:
        on = WORDS_OF_FLAGS.get(value.strip().lower())
        if on is None:
            raise UsageError(
                f"{variable}={value} sets the flag {name} to neither yes nor no",
                hint=f"{variable}=1, or {variable}=0",
            )
        return [name] if on else list(param.secondary_opts[:1])
    if not param.multiple:
        return [f"{name}={value}"]
    try:
        return [f"{name}={each}" for each in shlex.split(value)]
    except ValueError as error:
        raise UsageError(
            f"{variable}={value} cannot be split into values: {error}",
            hint=f"quote each as in a shell: {variable}=\"a 'b c'\"",
        ) from None


def _unknown_option(ctx: Any, name: str) -> UsageError:
    """Return what to say of an option that the command does not have."""
    root = ctx.find_root()
    group = root.command
    commands = {each: group.get_command(ctx, each) for each in group.list_commands(ctx)}
    commands |= {root.info_name: group}
    owners = [each for each, command in commands.items() if name in _shown(ctx, command)]
    what = f"{ctx.info_name} has no option {name}"
    if owners and ctx is root:
        return UsageError(
            f"{name} stands behind a command", hint=f"{root.info_name} COMMAND ... {name}"
        )
    if owners:
        verb = "has" if len(owners) == 1 else "have"
        return UsageError(f"{what}; {enumerated(owners)} {verb} it", hint=_help(ctx))
    return UsageError(what, hint=near(name, _shown(ctx, ctx.command)) or _help(ctx))


def unknown_command(ctx: Any, name: str) -> UsageError:
    """Return what to say of a command that there is not."""
    commands = ctx.command.list_commands(ctx)
    hint = near(name, commands) or f"`{ctx.command_path} --help` lists the commands"
    return UsageError(f"there is no command {quote(name)}", hint=hint)


def _missing(ctx: Any, param: Any) -> UsageError:
    """Return what a command needs, with the least that it can be called by."""
    least = [
        f"{_name(each)} {each.metavar}" if _is_option(each) else _name(each)
        for each in _params(ctx)
        if each.required
    ]
    about = f": {param.help.rstrip('.')}" if param.help else ""
    hint = " ".join([ctx.command_path, *least])
    return UsageError(f"{ctx.info_name} needs {_name(param)}{about}", hint=hint)


def _check_values(ctx: Any, words: Sequence[str]) -> None:
    """Refuse an option whose value is empty, or the next option."""
    flags = _flags(ctx, ctx.command)
    for word, following in pairwise([*words, "--"]):
        if word == "--":
            return
        flag, tied, value = word.partition("=")
        if flag not in flags or not _takes_value(flags[flag]):
            continue
        if not (value if tied else following):
            raise _misused(flag, flags)
        if not tied and following in flags:
            hint = f"{flag} {flags[flag].metavar}, or {flag}={following} if that is its value"
            raise UsageError(f"{flag} needs a value, and {following} is an option", hint=hint)


def _misused(flag: str, flags: Mapping[str, Any]) -> UsageError:
    """Return what to say of an option that lacks its value, or has one that it does not take."""
    if _takes_value(flags[flag]):
        return UsageError(f"{flag} needs a value", hint=f"{flag} {flags[flag].metavar}")
    return UsageError(f"{flag} takes no value", hint=f"{flag} alone")


def _params(ctx: Any, command: Any = None) -> list[Any]:
    params: list[Any] = (ctx.command if command is None else command).get_params(ctx)
    return params


def _flags(ctx: Any, command: Any) -> dict[str, Any]:
    """Return a command's options by each of their flags."""
    options = [param for param in _params(ctx, command) if _is_option(param)]
    return {flag: each for each in options for flag in (*each.opts, *each.secondary_opts)}


def _shown(ctx: Any, command: Any) -> list[str]:
    """Return the flags that a command's help lists."""
    return [flag for flag, param in _flags(ctx, command).items() if not param.hidden]


def _is_option(param: Any) -> bool:
    return bool(param.param_type_name == "option")


def _takes_value(param: Any) -> bool:
    return _is_option(param) and not param.is_flag


def _name(param: Any) -> str:
    """Return how the user knows a parameter: its first flag, or what stands for it."""
    return str(param.opts[0] if _is_option(param) else param.metavar)


def _help(ctx: Any) -> str:
    what = "the commands" if hasattr(ctx.command, "list_commands") else "what it takes"
    return f"`{ctx.command_path} --help` lists {what}"


class Words(dict[str, Any]):
    """What was given to each option, by its key; `typed` are those that no variable set."""

    def __init__(self, values: Mapping[str, Any], variables: Collection[str]) -> None:
        super().__init__(
            (key, value) for key, value in values.items() if value not in (None, [], ())
        )
        self.typed = set(self) - set(variables)

    def record(self, kind: type[R]) -> R:
        """Return a record of what was given to its options. Raises UsageError."""
        values = {
            place.path: place.value(self[place.option.key])
            for place in places(kind)
            if place.option.key in self
        }
        return build(kind, values)


@dataclass(frozen=True, slots=True)
class Asked(Generic[R]):
    """A record that a command may not need: its options that were given, and the record."""

    kind: type[R]
    words: Words

    def record(self) -> R:
        """Return the record. Raises UsageError where an option it needs was not given."""
        return self.words.record(self.kind)

    def __contains__(self, field: str) -> bool:
        """Return whether an option of this field was given."""
        return any(p.path[0] == field and p.option.key in self.words for p in places(self.kind))

    def refuse(self, reason: str, *, hint: str, beside: "Sequence[Asked[Any]]" = ()) -> None:
        """Raise UsageError if any of its options was typed, those of others aside.

        What a variable sets is for the commands and modes that it fits.
        """
        shared = {place.option.key for other in beside for place in places(other.kind)}
        options = [place.option for place in places(self.kind)]
        names = [each.name for each in options if each.key in self.words.typed - shared]
        if names:
            verb = "is" if len(names) == 1 else "are"
            raise UsageError(f"{', '.join(names)} {verb} {reason}", hint=hint)


class Command(TyperCommand):
    """A command that says in our words what it refuses; its help has the options in panels."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the words of a command. Raises UsageError."""
        with explained(ctx):
            check_words(ctx, args)
            ctx.obj = environment = FromEnvironment.read(ctx, args)
            return super().parse_args(ctx, [*environment.words, *args])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what follows the command's name: arguments by what stands for them."""
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        names = [(str(each.metavar), each.required) for each in arguments]
        return ["[OPTIONS]", *(name if needed else f"[{name}]" for name, needed in names)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options panel by panel."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        panels |= {panel: [] for panel in PANELS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                if param.param_type_name == "argument":
                    panels["Arguments"].append((str(param.metavar), record[1]))
                else:
                    panels[getattr(param, "rich_help_panel", None) or COMMON].append(record)
        for panel, rows in panels.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)


def completion(what: str) -> Callable[..., list[str]]:
    """Return what tells a shell the sets, edits or layers that an option may name."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        # A shell that asks has no use for an error.
        with suppress(Exception):
            return [
                name for name in known(what, ctx.params, ctx.args) if name.startswith(incomplete)
            ]
        return []

    return complete


def known(what: str, params: Mapping[str, Any], rest: Sequence[str] = ()) -> list[str]:
    """Return the names of a kind; `rest` has the arguments before an option without its value."""
    from slsgu_cli.store.artifacts import Artifact
    from slsgu_cli.store.store import Store

    # Where a shell completes, variables are not read as the options of a command.
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
