"""The application, and what every command shares: the store, the console, how it ends."""

import contextlib
import functools
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.errors import ExitCode, SlsguError

if TYPE_CHECKING:
    from slsgu_cli.cli.console import Console
    from slsgu_cli.store.store import Store


app = typer.Typer(
    name="slsgu",
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


StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="SLSGU_STORE",
        help="Folder or fsspec URL where artifacts are kept.",
        rich_help_panel="Common options",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document.", rich_help_panel="Common options"),
]
QuietOption = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Results only.", rich_help_panel="Common options"),
]
VerboseOption = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Say how it is done.", rich_help_panel="Common options"),
]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks.", rich_help_panel="Common options"),
]
_COMMON: dict[str, tuple[Any, Any]] = {
    "store": (StoreOption, "./slsgu-store"),
    "as_json": (JsonOption, False),
    "quiet": (QuietOption, False),
    "verbose": (VerboseOption, False),
    "debug": (DebugOption, False),
}


@dataclass(frozen=True, slots=True)
class Session:
    """The store and the console of one command."""

    store: "Store"
    console: "Console"


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function `(session, ...)` as the command `name` with the common options."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**values: Any) -> None:
            # Not for `--help`, which takes a third of the time without them.
            from slsgu_cli.cli.console import Console
            from slsgu_cli.store.store import Store

            common = {key: values.pop(key) for key in _COMMON}
            verbosity = -1 if common["quiet"] else int(common["verbose"])
            console = Console(verbosity=verbosity, as_json=common["as_json"])
            with _Ending(console, debug=common["debug"]):
                # Results go through the console alone; what a library prints is no result.
                with contextlib.redirect_stdout(sys.stderr), progress.using(console):
                    function(Session(Store(common["store"]), console), **values)
                console.flush()

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        shared = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for key, (kind, default) in _COMMON.items()
        ]
        keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__signature__ = inspect.Signature([*keyword, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*keyword, *shared]}
        app.command(name)(run)
        return function

    return register


class _Ending:
    """Ends a command: an exit code for what was raised, and a message for the user."""

    def __init__(self, console: "Console", *, debug: bool) -> None:
        self.console = console
        self.debug = debug

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, typer.Exit | SystemExit):
            raise typer.Exit(self._code(error)) from None

    def _code(self, error: BaseException) -> int:
        """Tell the user what was raised and return the exit code for it."""
        if isinstance(error, BrokenPipeError):
            # The reader of the pipe has gone, as `head` does: there is nothing to tell.
            return ExitCode.UNREAD
        if isinstance(error, KeyboardInterrupt):
            self.console.warn("interrupted; what was complete is kept")
            return ExitCode.INTERRUPTED
        if self.debug:
            traceback.print_exception(error)
        told = error if isinstance(error, SlsguError) else _unexpected(error)
        # Results that were ready before the error are results still.
        with contextlib.suppress(OSError, SlsguError):
            self.console.flush()
        self.console.error(told)
        return told.exit_code


def _unexpected(error: BaseException) -> SlsguError:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return SlsguError(
            f"out of memory: {error}",
            hint="a smaller --memory-budget or --cache-budget, or --device cpu",
        )
    text = f"unexpected {type(error).__name__}: {error}"
    return SlsguError(text, hint="add --debug to see where, and report it")
