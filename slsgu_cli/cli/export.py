"""The command `export`."""

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import Session, command
from slsgu_cli.cli.console import Column
from slsgu_cli.figures.numbers import roughly
from slsgu_cli.records.options import ExportRequest


@command("export")
def export(session: Session, request: ExportRequest) -> None:
    """Example: slsgu export facebook --out facebook-lora.safetensors"""
    from slsgu_cli.engine.export import export as run

    result, console = run(session.store, request), session.console
    edits = (
        Column("edit", "name"),
        Column("layer", shown=known_as),
        "rank",
        Column("of", "full_rank"),
    )
    console.table("edits", edits, result.edits, title="rank of each edit")
    figures = (
        "strength",
        Column("set", "name"),
        Column("FA@1", "forget.top1", shown=roughly),
        Column("FA@5", "forget.top5", shown=roughly),
    )
    console.table("strengths", figures, result.figures, title="on the test split, by strength")
    console.paths("files", list(result.files))
