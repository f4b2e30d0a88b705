"""The command `search --joint`."""

from collections.abc import Sequence

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import Session
from slsgu_cli.cli.console import Column
from slsgu_cli.cli.formats import STEP, accuracies
from slsgu_cli.figures.numbers import roughly
from slsgu_cli.records.options import SearchOptions


def search_jointly(session: Session, names: Sequence[str], options: SearchOptions) -> None:
    """Search for edits that forget the concepts of several sets jointly."""
    from slsgu_cli.processes import refuse_several
    from slsgu_cli.store.artifacts import Artifact, joint_label
    from slsgu_cli.study.joint import joint_search, require_joint

    refuse_several("search --joint")
    result = joint_search(session.store, names, options=options)
    record, chosen = result.record, result.chosen
    concepts = (
        Column("set"),
        Column("layer", shown=known_as),
        Column("direction", on_terminal=False),
        Column("step", shown=STEP),
        Column("% of norm", shown=roughly, label="move"),
        *(
            Column(f"FA@{k} {when}", shown=roughly, label=f"FA@{k}\n{when}")
            for k in (1, 5)
            for when in ("before", "after")
        ),
    )
    rows = []
    for move in chosen.moves:
        before, after = record.baseline_forget[move.name], chosen.forget[move.name]
        fall = (before.top1, after.top1, before.top5, after.top5)
        rows.append(
            (move.name, move.layer, str(move.direction), move.step, 100 * move.share, *fall)
        )
    title = "all edits applied, each concept on its own images"
    session.console.table("edits", concepts, rows, title=title, data=record)
    sets = sorted(record.baseline_utility)
    hundredths = "{:.2f}".format
    columns = (
        Column("concepts"),
        Column("added"),
        Column("layer", shown=known_as),
        Column("FA@1 at most", shown=roughly, label="FA@1\nat most"),
        *(
            Column(
                f"{ta} {name}", shown=hundredths, label=f"{ta}\n{name}", of=("utility", name, ta)
            )
            for name in sets
            for ta in ("TA@1", "TA@5")
        ),
    )
    original = accuracies(record.baseline_utility, sets)
    stages: list[tuple[object, ...]] = [(0, None, None, None, *original)]
    for stage in record.stages:
        added = stage.moves[-1]
        worst = max(each.top1 for each in stage.forget.values())
        figures = accuracies(stage.utility or record.baseline_utility, sets)
        stages.append((len(stage.moves), added.name, added.layer, worst, *figures))
    title = "accuracy on other classes as concepts are added"
    session.console.table("stages", columns, stages, title=title)
    files = [*map(Artifact.EDIT.path, record.names), Artifact.JOINT.path(joint_label(record.names))]
    session.console.paths("files", [*map(session.store.where, files), *result.plots])
    if result.reused:
        session.console.note(f"{result.reused} recorded joint trials were reused")
    require_joint(result)
