"""The command `rank`."""

from collections import Counter
from collections.abc import Sequence

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.checkpoints.targets import prompt_note
from slsgu_cli.cli.app import Name, Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.formats import direction_format
from slsgu_cli.records.method import Ranking
from slsgu_cli.records.options import RankOptions


@command("rank")
def rank(session: Session, name: Name, options: RankOptions) -> None:
    """Example: slsgu rank facebook --tower vision --json"""
    from slsgu_cli.engine.plots import rank_and_plot

    ranking, plots = rank_and_plot(session.store, name, options=options)
    show_ranking(session.console, ranking, plots)


def show_ranking(
    console: Console, ranked: Ranking, plots: Sequence[str], *, front_only: bool = False
) -> None:
    """Print all candidate layers, each front first, or only the fronts."""
    ranked_along = ranked.by_direction()
    columns = (
        Column("layer", shown=known_as),
        Column("tower"),
        Column("front"),
        Column("importance"),
        Column("alignment"),
        Column("forget_norm", on_terminal=False),
        Column("retain_norm", on_terminal=False),
        Column("weight_norm", on_terminal=False),
        *([Column("direction", shown=direction_format(ranked_along))] * (len(ranked_along) > 1)),
    )
    front_only = front_only or console.brief
    rows = [
        score
        for scores in ranked_along.values()
        for score in scores
        if score.front or not front_only
    ]
    console.table("ranking", columns, rows, title=f"layers for {ranked.name}", data=ranked)
    if console.brief and len(rows) < len(ranked.scores):
        left_out = {s.layer for s in ranked.scores} - {s.layer for s in ranked.scores if s.front}
        console.note(f"{len(left_out)} layers are not on a front; -v shows them")
    for reason, count in sorted(Counter(ranked.unreached.values()).items()):
        console.note(f"{count} layers cannot influence {ranked.target}: {reason}")
    if note := prompt_note(str(ranked.target), ranked.readers):
        console.note(note)
    console.paths("plots", plots)
