"""The command `sweep`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.formats import STEP, accuracies
from slsgu_cli.figures.numbers import roughly
from slsgu_cli.records.option_fields import ROWS, Option
from slsgu_cli.records.studies import SweepRequest


@command("sweep")
def sweep(
    session: Session,
    request: SweepRequest,
    classes: Annotated[
        Path, Option(("--classes",), "File of classes to forget, one per line.", ROWS)
    ],
) -> None:
    """Runs build-sets, grad, rank and search for each class. All classes, or those of a fold
    (--folds), are excluded from the retain set and share its gradient. `{}` in a --source
    stands for the class.

    Example: slsgu sweep objects --classes seven.txt -m local-dir:clip -s icons.parquet --eval ...
    """
    from slsgu_cli.sources.prompts import read_classes
    from slsgu_cli.store.artifacts import Artifact
    from slsgu_cli.study.series import require_swept
    from slsgu_cli.study.series import sweep as run

    listed = read_classes(str(classes))
    result = run(session.store, replace(request, classes=listed.names if listed else ()))
    console = session.console
    record = result.sweep
    sets = sorted(record.rows[0].baseline_utility)
    figures = [f"FA@{k}" for k in (1, 5)] + [f"TA@{k} {name}" for name in sets for k in (1, 5)]
    before = [accuracies(r.baseline_utility, sets, r.baseline_forget) for r in record.rows]
    after = [accuracies(r.utility, sets, r.forget) for r in record.rows]
    rows: list[list[object]] = [
        [
            row.name,
            row.layer,
            str(row.direction),
            row.step,
            100 * row.share,
            *_paired(console, one, other),
        ]
        for row, one, other in zip(record.rows, before, after, strict=True)
    ]
    means = [
        [sum(column) / len(column) for column in zip(*part, strict=True)]
        for part in (before, after)
    ]
    rows.append(["mean", None, None, None, None, *_paired(console, *means)])
    columns = [
        Column("class"),
        Column("layer", shown=known_as),
        Column("direction", on_terminal=False),
        Column("step", shown=STEP, on_terminal=False),
        Column("% of norm", shown=roughly, on_terminal=False),
    ]
    for figure in figures:
        if console.on_terminal:
            columns.append(Column(figure, label=figure.replace(" ", "\n")))
        else:
            columns += [Column(f"{figure} before"), Column(f"{figure} after")]
    title = f"sweep {record.name}: accuracies before and after each class is forgotten"
    console.table("sweep", columns, rows, title=title, data=record)
    console.paths("files", [session.store.where(Artifact.SWEEP.path(record.name))])
    if result.reused:
        console.note(f"reused the results of {result.reused} classes")
    require_swept(result)


def _paired(console: Console, before: Sequence[float], after: Sequence[float]) -> list[object]:
    """Return figures before and after: in one cell on a terminal, else in two."""
    pairs = zip(before, after, strict=True)
    if console.on_terminal:
        return [f"{one:.1f} {other:.1f}" for one, other in pairs]
    return [figure for pair in pairs for figure in pair]
