"""Which layers could be edited, which were tried, and at which step the concept was gone."""

from collections.abc import Sequence

from slsgu_cli.naming import known_as
from slsgu_cli.records import (
    Alignment,
    EditHeader,
    LayerScore,
    Ranking,
    Steer,
    Tower,
    Trial,
    Trials,
)
from slsgu_cli.report.charts import front_chart, legend, step_chart, step_series
from slsgu_cli.report.figures import count, number, percent, share
from slsgu_cli.report.gather import Dossier
from slsgu_cli.report.grids import Head, code, figure, paragraph, table
from slsgu_cli.report.markup import Child, Html, element, joined
from slsgu_cli.report.sections import Section, section
from slsgu_cli.stepsize import best_of_each

WHITENED = (
    "Both are taken of the gradient whitened by the layer's inputs on the retain set, with a "
    "ridge of {ridge:g}, and measured by what a change does to those inputs. "
)


def front(dossier: Dossier) -> Section:
    """Show importance against alignment, and the layers on the Pareto fronts."""
    return section(
        "Where the concept lies",
        dossier.ranking,
        lambda record: _front(record, dossier.edit.record),
    )


def search(dossier: Dossier) -> Section:
    """Show forgetting and keeping against the step, for every layer that was tried."""
    return section(
        "Search for the step", dossier.trials, lambda record: _search(record, dossier.edit.record)
    )


def _front(ranking: Ranking, edit: EditHeader | None) -> Html:
    size = "magnitude of the cosine" if ranking.alignment is Alignment.ABS else "cosine"
    intro = paragraph(
        "Importance is the length of the forget gradient over that of the layer; alignment is the "
        f"{size} between forget and retain gradient. ",
        WHITENED.format(ridge=ranking.ridge) if ranking.ridge is not None else None,
        "A layer is on its tower's Pareto front where no other layer has both more importance and "
        "less alignment.",
    )
    towers = [tower for tower in Tower if any(s.tower is tower for s in ranking.scores)]
    charts = [
        figure(front_chart(ranking.scores, tower), f"{tower.capitalize()} tower")
        for tower in towers
    ]
    rows: list[tuple[Child, ...]] = []
    marked: list[int] = []
    for tower in towers:
        own = [score for score in ranking.scores if score.tower is tower and score.front]
        for place, score in enumerate(own, start=1):
            if edit is not None and score.layer == edit.layer:
                marked.append(len(rows))
            rows.append((str(tower), str(place), *_figures(score)))
    heads = (Head("tower", False), Head("no."), *_HEADS)
    table_of_front = table(heads, rows, caption="Layers on the Pareto fronts", marked=marked)
    rest = [score for score in ranking.scores if not score.front]
    others = table(_HEADS, [_figures(score) for score in rest], caption="Layers on no front")
    more = element("details", element("summary", f"The other {count(len(rest))} layers"), others)
    grid = element("div", *charts, class_="charts")
    return joined((intro, grid, table_of_front, more if rest else None))


_HEADS = (Head("layer", False), Head("importance"), Head("alignment"), Head("shape"))


def _figures(score: LayerScore) -> tuple[Child, ...]:
    shape = " × ".join(map(str, score.shape))
    return (code(known_as(score.layer)), number(score.importance), number(score.alignment), shape)


def _search(trials: Trials, edit: EditHeader | None) -> Html:
    layers = {trial.layer for trial in trials.trials}
    intro = paragraph(
        f"{count(len(trials.trials))} trials on {len(layers)} layers, in "
        f"{trials.precision}. Of each layer the step was doubled until {goal(trials)}, then halved "
        "between what was too little and what was enough. TA was measured where it could decide "
        "the choice.",
    )
    drawn = step_charts(trials, edit)
    return joined((intro, drawn, _best(trials, edit), _all(trials, edit)))


def step_charts(trials: Trials, edit: EditHeader | None) -> Html:
    """Draw accuracies against the step for every layer and ridge, with what the lines mean."""
    lines = list(dict.fromkeys((trial.layer, trial.ridge) for trial in trials.trials))
    charts = [_steps(trials, layer, ridge, edit) for layer, ridge in lines]
    key = legend(step_series(trials, *lines[0])) if lines else None
    return joined((key, element("div", *charts, class_="charts")))


def goal(trials: Trials) -> str:
    """Return in words what the search wanted to reach."""
    if trials.steer is Steer.MARGIN:
        return f"the name was a cosine of {trials.margin:g} below the fifth best for every image"
    return f"{'FA@5' if trials.steer is Steer.FA5 else 'FA@1'} was 0"


def _steps(trials: Trials, layer: str, ridge: float | None, edit: EditHeader | None) -> Html:
    """Draw the trials of one layer with one ridge."""
    chosen = edit is not None and (edit.layer, edit.ridge) == (layer, ridge)
    name = known_as(layer)
    told = (
        f"Forget accuracy and kept accuracy against the step along {name}; the tables below "
        "have the figures."
    )
    caption = joined(
        (
            code(name),
            f", ridge {ridge:g}" if ridge is not None else None,
            " (chosen)" if chosen else None,
        )
    )
    share_chosen = edit.share if edit is not None and chosen else None
    return figure(step_chart(step_series(trials, layer, ridge), chosen=share_chosen, told=told),
                  caption)  # fmt: skip


def _best(trials: Trials, edit: EditHeader | None) -> Html:
    chosen = next((trial for trial in trials.trials if _is_chosen(trial, edit)), None)
    best = best_of_each(trials, chosen)
    return _trials(trials, best, edit, caption="The best trial of each layer")


def _all(trials: Trials, edit: EditHeader | None) -> Html:
    ordered = sorted(
        trials.trials, key=lambda t: (t.tower != "vision", t.layer, -(t.ridge or 0), t.step)
    )
    every = _trials(trials, ordered, edit, caption="Every trial")
    return element("details", element("summary", "Every trial"), every)


def _is_chosen(trial: Trial, edit: EditHeader | None) -> bool:
    met = (trial.layer, trial.ridge, trial.step)
    return edit is not None and met == (edit.layer, edit.ridge, edit.step)


def _trials(
    trials: Trials, shown: Sequence[Trial], edit: EditHeader | None, *, caption: str
) -> Html:
    sets = sorted(trials.baseline_utility)
    whitened = [Head("ridge")] * any(trial.ridge is not None for trial in shown)
    heads = (Head("layer", False), *whitened, Head("step"), Head("of its norm"), Head("FA@1"),
             Head("FA@5"), *(Head(f"TA@1 {name}") for name in sets))  # fmt: skip
    rows: list[tuple[Child, ...]] = [
        (
            code(known_as(trial.layer)),
            *(number(trial.ridge or 0) for _ in whitened),
            number(trial.step),
            share(trial.share),
            percent(trial.forget.top1),
            percent(trial.forget.top5),
            *(
                percent(trial.utility[name].top1) if trial.utility and name in trial.utility
                else None
                for name in sets
            ),
        )
        for trial in shown
    ]  # fmt: skip
    marked = [index for index, trial in enumerate(shown) if _is_chosen(trial, edit)]
    return table(heads, rows, caption=caption, marked=marked)
