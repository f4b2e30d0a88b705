"""What other methods do to the same concept, beside the edit."""

from slsgu_cli.baselines.records import Comparison, Method
from slsgu_cli.baselines.show import LABELS
from slsgu_cli.baselines.table import Row, better, mean_rows
from slsgu_cli.report.figures import percent
from slsgu_cli.report.gather import Dossier
from slsgu_cli.report.grids import Head, paragraph, table
from slsgu_cli.report.markup import Child, Html, joined
from slsgu_cli.report.sections import Section, section


def comparison(dossier: Dossier) -> Section:
    """Show each method's figures and what they cost."""
    return section("Other methods", dossier.comparison, _comparison)


def _comparison(record: Comparison) -> Html:
    rows = mean_rows({record.name: record.outcomes}, None)
    sets = sorted({name for row in rows for name in row.utility})
    cells: list[tuple[Child, ...]] = [
        (
            LABELS[row.method],
            row.words,
            percent(row.forget.top1),
            percent(row.forget.top5),
            *(percent(row.utility[name].top1) for name in sets),
            f"{row.seconds:.0f}",
            f"{row.forget_passes:g}",
            f"{row.retain_passes:g}",
        )
        for row in rows
    ]
    heads = (Head("method", False), Head("setting", False), Head("FA@1"), Head("FA@5"),
             *(Head(f"TA@1 {name}") for name in sets), Head("seconds"), Head("forget passes"),
             Head("retain passes"))  # fmt: skip
    ours = [index for index, row in enumerate(rows) if row.method is Method.OURS]
    marked = table(heads, cells, caption="Methods on the same model and rows", marked=ours)
    return joined((_verdict(rows), marked))


def _verdict(rows: list[Row]) -> Html:
    beaten = ", ".join(f"{LABELS[row.method]} ({row.words})" for row in better(rows))
    told = (
        f"No worse on FA@1 and on mean TA@1, and better on one of them: {beaten}. "
        if beaten
        else "No other method is at least as good on both FA@1 and mean TA@1. "
    )
    return paragraph(told, "Passes count gradient passes over the forget and the retain set.")
