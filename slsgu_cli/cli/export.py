"""The command `export`."""

from typing import TYPE_CHECKING

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.figures.numbers import roughly
from slsgu_cli.records.options import ExportRequest

if TYPE_CHECKING:
    from slsgu_cli.engine.export import ExportResult


@command("export")
def export(session: Session, request: ExportRequest) -> None:
    """Example: slsgu export facebook --out facebook-lora.safetensors"""
    from slsgu_cli.engine.export import export as run

    show_exported(session.console, run(session.store, request))


def show_exported(console: Console, result: "ExportResult") -> None:
    """Print the ranks of the edits in a LoRA, and forget accuracy at each strength."""

    edits = [(one.name, one.layer, one.rank, one.full_rank) for one in result.edits]
    columns = ("edit", Column("layer", shown=known_as), "rank", "of")
    console.table("edits", columns, edits, title="rank of each edit")
    rows = [(one.strength, one.name, one.forget.top1, one.forget.top5) for one in result.figures]
    figures = (Column("FA@1", shown=roughly), Column("FA@5", shown=roughly))
    console.table(
        "strengths",
        ("strength", "set", *figures),
        rows,
        title="on the test split, by strength",
    )
    console.paths("files", list(result.files))
