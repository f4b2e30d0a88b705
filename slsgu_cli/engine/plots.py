"""Rankings and searches with their plots."""

from collections import Counter

from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import SearchResult, search
from slsgu_cli.records.method import (
    Ranking,
    Tower,
)
from slsgu_cli.records.options import (
    RankOptions,
    SearchOptions,
)
from slsgu_cli.store.artifacts import plot_path
from slsgu_cli.store.store import Store


def rank_and_plot(store: Store, name: str, *, options: RankOptions) -> tuple[Ranking, list[str]]:
    """Rank the layers of a set and draw each tower's front; return where the plots are."""
    from slsgu_cli.figures.curves import pareto_plot

    ranking = rank(store, name, options=options)
    plots = []
    ranked_along = ranking.by_direction()
    for direction, scores in ranked_along.items():
        along = "" if len(ranked_along) == 1 else f", {direction.kind}"
        for tower in Tower:
            if any(score.tower is tower for score in scores):
                path = plot_path(name, f"front-{tower}" + along.replace(", ", "-"))
                title = f"{name}: {tower} layers{along}"
                store.write_bytes(path, pareto_plot(scores, tower=tower, title=title))
                plots.append(store.where(path))
    return ranking, plots


def search_and_plot(store: Store, name: str, *, options: SearchOptions) -> SearchResult:
    """Search a set's layers and draw the accuracies against the step for each."""
    result = search(store, name, options=options)
    draw_steps(store, result)
    return result


def draw_steps(store: Store, result: SearchResult) -> None:
    """Draw the accuracies against the step for each layer that was searched."""
    from slsgu_cli.figures.curves import step_plot

    name = result.trials.name
    chosen, trials = result.chosen, result.trials
    moves = dict.fromkeys(trial.move for trial in trials.trials)
    several = Counter(layer for layer, _ in moves)
    for layer, direction in sorted(moves, key=lambda move: (move[0], move[1].order)):
        step = chosen.step if (layer, direction) == chosen.move else None
        along = f"-{direction.slug}" if several[layer] > 1 else ""
        picture = step_plot(trials, move=(layer, direction), chosen=step)
        store.write_bytes(plot_path(name, f"steps-{layer}{along}"), picture)
