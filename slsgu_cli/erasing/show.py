"""How a comparison on a pipeline is printed."""

from slsgu_cli.console import Console
from slsgu_cli.erasing.records import PipelineComparison
from slsgu_cli.erasing.sheet import LABELS
from slsgu_cli.tables import Column


def comparison(console: Console, found: PipelineComparison, sheet: str) -> None:
    """Print a row for each method and learning rate."""

    def percent(name: str) -> Column:
        return Column(name, shown=lambda value: f"{value:.1f}%")

    columns: list[str | Column] = [
        Column("method", shown=lambda method: LABELS[method]),
        Column("lr", shown=lambda rate: f"{rate:g}"),
        Column("iterations", on_terminal=False),
        percent("UA"),
        percent("IRA"),
        Column("distance", shown=lambda value: f"{value:.3f}"),
        Column("seconds", shown=lambda value: f"{value:.0f}", label="s"),
    ]
    rows = [
        (
            row.method,
            row.plan.rate if row.plan else None,
            row.plan.iterations if row.plan else None,
            row.effect.ua,
            row.effect.ira,
            row.distance,
            row.seconds,
        )
        for row in found.outcomes
    ]
    title = (
        f"forgetting {found.concept} on {found.target}: {found.budget.concept} pictures of it, "
        f"{found.budget.others} of other classes"
    )
    console.table("comparison", columns, rows, title=title, data=found)
    console.paths("sheets", [sheet])
