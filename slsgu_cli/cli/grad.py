"""The command `grad`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from slsgu_cli.cli.app import Name, Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.formats import artifact_name
from slsgu_cli.records.option_fields import MODEL, ROWS, Option
from slsgu_cli.records.options import PassOptions
from slsgu_cli.records.sets import ModelSpec

if TYPE_CHECKING:
    from slsgu_cli.engine.gradients import GradResult


@command("grad")
def grad(
    session: Session,
    name: Name,
    options: PassOptions,
    model: ModelSpec | None = None,
    squares: Annotated[
        bool,
        Option(("--squares",), "Also compute mean squared mini-batch gradients (slower).", MODEL),
    ] = False,
    adversarial: Annotated[
        bool,
        Option(
            ("--adversarial",),
            "Also forget the name after the prefixes that `verify` found, and after random ones.",
            ROWS,
        ),
    ] = False,
) -> None:
    """Example: slsgu grad facebook"""
    from slsgu_cli.engine.gradients import adversarial_prefixes, compute_gradients

    if adversarial:
        prefixes = adversarial_prefixes(session.store, name)
        options = replace(options, prefixes=(*options.prefixes, *prefixes))
    result = compute_gradients(session.store, name, model=model, options=options, squares=squares)
    show_gradients(session.console, result)


def show_gradients(console: Console, result: "GradResult") -> None:
    """Print both gradients of a set, and whether each was computed or cached."""
    pointer, squared = result.pointer, result.squared
    digests = {"forget": pointer.forget, "retain": pointer.retain}
    rows = [
        (
            role,
            header.loss,
            header.mean_loss,
            header.rows,
            header.batches,
            digests[role],
            _made(role in result.computed),
            None if squared is None else _made(role in squared),
        )
        for role, header in result.headers.items()
    ]
    columns = (
        "role",
        "loss",
        "mean loss",
        "rows",
        "batches",
        Column("gradient", shown=artifact_name),
        "made",
        "squares",
    )
    console.table("gradients", columns, rows, title=f"gradients of {pointer.name}")


def _made(computed: bool) -> str:
    return "computed" if computed else "cached"
