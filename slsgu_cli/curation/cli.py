"""The commands of curation; those that build sets are options of `build-sets`."""

from typing import Annotated

import typer

from slsgu_cli import options as opt
from slsgu_cli.app import app
from slsgu_cli.session import Session, command


@command(app, "show")
def show(
    session: Session,
    name: opt.Name,
    part: Annotated[
        str, typer.Option("--part", help="forget, retain or the name of an evaluation set.")
    ] = "forget",
    images: Annotated[
        int, typer.Option("--images", min=1, max=400, help="Images on the contact sheet.")
    ] = 48,
    drop: Annotated[
        list[str] | None,
        typer.Option("--drop", metavar="KEY", help="Take this row out: key or hash. Repeatable."),
    ] = None,
    drop_from: Annotated[
        str | None, typer.Option("--drop-from", help="File of keys or hashes, one a line.")
    ] = None,
) -> None:
    """Look at a set before it is used; drop rows.

    Example: slsgu show facebook --drop 000000012
    """
    from slsgu_cli.curation import printing
    from slsgu_cli.curation.inspection import drop_from_set, inspect_set, read_keys

    wanted = [*(drop or ()), *(read_keys(drop_from) if drop_from else ())]
    if wanted:
        drop_from_set(session.store, name, wanted, part=part)
        session.console.note(f"{part} of {name} has other rows now; what was made of it is stale")
    seen = inspect_set(session.store, name, part=part, images=images)
    printing.inspection(session.console, session.store, seen)
