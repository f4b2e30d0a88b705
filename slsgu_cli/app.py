"""The Typer application that every command registers with."""

from typing import Annotated

import typer

import slsgu_cli

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
