"""Rankings and searches with their plots."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from slsgu_cli.engine.ranking import rank
from slsgu_cli.figures.curves import pareto_plot, step_plot
from slsgu_cli.records.method import Move, Ranking, Tower, Trials
from slsgu_cli.records.options import RankOptions, SearchOptions
from slsgu_cli.store.artifacts import plot_path
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from slsgu_cli.engine.search import SearchResult


def rank_and_plot(store: Store, name: str, *, options: RankOptions) -> tuple[Ranking, list[str]]:
    """Rank the layers of a set and draw each tower's front; return where the plots are."""
    ranking = rank(store, name, options=options)
    drawn = {}
    ranked_along = ranking.by_direction()
    for direction, scores in ranked_along.items():
        along = "" if len(ranked_along) == 1 else f", {direction.kind}"
        for tower in Tower:
            if any(score.tower is tower for score in scores):
                title = f"{name}: {tower} layers{along}"
                kind = f"front-{tower}" + along.replace(", ", "-")
                drawn[kind] = pareto_plot(scores, tower=tower, title=title)
    return ranking, write_plots(store, name, drawn)


def search_and_plot(store: Store, name: str, *, options: SearchOptions) -> "SearchResult":
    """Search a set's layers and draw the accuracies against the step for each."""
    from slsgu_cli.engine.search import search  # Loads PyTorch, which a ranking may not need.

    result = search(store, name, options=options)
    draw_steps(store, result)
    return result


def draw_steps(store: Store, result: "SearchResult") -> None:
    """Draw the accuracies against the step for each layer that was searched."""
    trials = result.trials
    moves = {trial.move for trial in trials.trials}
    ordered = sorted(moves, key=lambda move: (move[0], move[1].order))
    drawn = step_plots(trials, ordered, "steps", {result.chosen.move: result.chosen.step})
    write_plots(store, trials.name, drawn)


def step_plots(
    trials: Trials, moves: Sequence[Move], kind: str, chosen: Mapping[Move, float] | None = None
) -> dict[str, bytes]:
    """Return a plot of the steps of each move, by `kind` and layer."""
    several = Counter(layer for layer, _ in moves)
    return {
        f"{kind}-{layer}" + (f"-{direction.slug}" if several[layer] > 1 else ""): step_plot(
            trials, move=(layer, direction), chosen=(chosen or {}).get((layer, direction))
        )
        for layer, direction in moves
    }


def write_plots(store: Store, name: str, drawn: Mapping[str, bytes]) -> list[str]:
    """Write plots of a set by kind; return where they are."""
    paths = {kind: plot_path(name, kind) for kind in drawn}
    for kind, path in paths.items():
        store.write_bytes(path, drawn[kind])
    return [store.where(path) for path in paths.values()]
