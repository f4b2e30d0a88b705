"""The command `apply`."""

from pathlib import Path
from typing import TYPE_CHECKING

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.formats import file_size
from slsgu_cli.records.options import ApplyRequest

if TYPE_CHECKING:
    from slsgu_cli.checkpoints.model_copy import AppliedResult


@command("apply")
def apply(session: Session, request: ApplyRequest) -> None:
    """Example: slsgu apply facebook --target stable-diffusion --out sd-without-facebook"""
    from slsgu_cli.engine.apply import apply as run

    show_applied(session.console, run(session.store, request))


def show_applied(console: Console, result: "AppliedResult") -> None:
    """Print the files that were or would be written, and the changes in each."""
    rows = [
        (file.path, change.layer, change.dtype, change.share, file.nbytes)
        for file in result.files
        for change in file.changes
    ]
    title = f"{'would write' if result.dry_run else 'written'}: {result.out}"
    alike = len({Path(file.path).name for file in result.files}) < len(result.files)

    def named(path: str) -> str:
        # Both encoders of a pipeline have the same file name.
        return str(Path(path).relative_to(result.out)) if alike else Path(path).name

    columns = (
        Column("file", shown=named),
        Column("layer", shown=known_as),
        "dtype",
        Column("relative change", shown=lambda share: f"{100 * share:.3g}%", label="moved by"),
        Column("bytes", shown=file_size, label="size"),
    )
    console.table("applied", columns, rows, title=title, data=result)
    if result.model and not result.dry_run:
        console.note(f"{result.client} loads it as {result.model}")
