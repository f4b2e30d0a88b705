"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer

from slsgu_cli import options as opt
from slsgu_cli.app import app
from slsgu_cli.session import Session, command


@command(app, "report")
def report(
    session: Session,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of sets.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the page goes.")],
    examples: Annotated[
        bool, typer.Option("--examples/--no-examples", help="Run the model over a few images.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is at --out.")
    ] = False,
    device: opt.Device = "auto",
) -> None:
    """Write one HTML page: what was forgotten, how, at what cost.

    The page is self-contained: it fetches nothing and can be sent as it is.

    Example: slsgu report facebook --out report.html
    """
    from slsgu_cli.report.write import ReportRequest, write_report
    from slsgu_cli.tables import Column

    request = ReportRequest(
        names=names, out=out, examples=examples, overwrite=overwrite, device=device
    )
    written = write_report(session.store, request)
    rows = [
        (name, section.title, section.state, section.run)
        for name, sections in written.sections.items()
        for section in sections
    ]
    columns = (Column("name"), Column("section"), Column("state"), Column("run", label="to add it"))
    session.console.table("sections", columns, rows, title=f"report: {written.out}")
    session.console.paths("files", [written.out])
