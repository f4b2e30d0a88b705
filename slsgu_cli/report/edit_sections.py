"""What was requested, which layers, and how to check it: sections of the page."""

import math
from collections.abc import Sequence

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.engine.choice import best_of_each
from slsgu_cli.figures.html import (
    Child,
    Html,
    code,
    count,
    element,
    figure_of,
    front_chart,
    joined,
    legend,
    line_chart,
    lines,
    number,
    numeric,
    paragraph,
    percent,
    share,
    step_series,
    table,
    terms,
)
from slsgu_cli.records.method import (
    Alignment,
    Criterion,
    EditHeader,
    GradientHeader,
    GradientPointer,
    LayerScore,
    Move,
    Ranking,
    Tower,
    Trial,
    Trials,
)
from slsgu_cli.records.sets import DataRef, SetManifest
from slsgu_cli.report.gather import EditFacts, Section, SetRecords, commands, section


def request(records: SetRecords) -> Section:
    """Tell which captions made the forget set, and where every row came from."""
    return section("What was asked", records.manifest, _request)


def _request(manifest: SetManifest) -> Html:
    measured = (
        f"its rows in the evaluation set {manifest.forget_eval}, which no gradient saw"
        if manifest.forget_eval
        else "the forget set's own rows, which the gradient saw: not a held-out figure"
    )
    overview = terms(
        {
            "Concept": manifest.concept,
            "Captions with": lines([code(pattern) for pattern in manifest.patterns]),
            "Model": code(str(manifest.model)),
            "Forgetting is measured on": measured if manifest.evals else None,
            "Seed of the draws": str(manifest.seed),
        }
    )
    parts = [("forget", manifest.forget), ("retain", manifest.retain)]
    parts += [(f"evaluation: {name}", ref) for name, ref in manifest.evals.items()]
    rows = [
        (
            role,
            count(ref.rows),
            count(ref.seen),
            _left_out(ref),
            lines([code(source) for source in ref.sources]),
        )
        for role, ref in parts
    ]
    heads = ("rows for", *numeric("kept", "seen"), "left out", "from")
    digests = table(
        ("rows for", "fingerprint of the rows"),
        [(role, code(ref.fingerprint)) for role, ref in parts],
        caption="Fingerprints of the rows: pixels, tokens, labels, names and prompts",
    )
    return joined((overview, table(heads, rows, caption="Rows and their sources"), digests))


def _left_out(ref: DataRef) -> Html | None:
    if not ref.refused:
        return None
    ordered = sorted(ref.refused.items(), key=lambda item: (-item[1], item[0]))
    return lines([f"{count(rows)} {reason}" for reason, rows in ordered])


def front(records: SetRecords) -> Section:
    """Show importance against alignment, and the layers on the Pareto fronts."""
    return section(
        "Where the concept lies",
        records.ranking,
        lambda record: _front(record, records.edit.record),
    )


def _front(ranking: Ranking, edit: EditHeader | None) -> Html:
    size = "magnitude of the cosine" if ranking.alignment is Alignment.ABS else "cosine"
    intro = paragraph(
        "Importance is the length of the forget gradient over that of the layer; alignment is the "
        f"{size} between forget and retain gradient. ",
        f"Both are taken along {' and '.join(each.words for each in ranking.directions)}. ",
        "A layer is on its tower's Pareto front where no other layer has both more importance and "
        "less alignment.",
    )
    ranked_along = ranking.by_direction()
    groups = [
        (
            f"{tower} tower, {direction.kind}" if len(ranked_along) > 1 else f"{tower} tower",
            [score for score in scores if score.tower is tower],
        )
        for direction, scores in ranked_along.items()
        for tower in Tower
    ]
    groups = [(title, scores) for title, scores in groups if scores]
    charts = [
        figure_of(front_chart(scores, scores[0].tower), title.capitalize())
        for title, scores in groups
    ]
    rows: list[tuple[Child, ...]] = []
    marked: list[int] = []
    for title, scores in groups:
        for place, score in enumerate((s for s in scores if s.front), start=1):
            if edit is not None and score.layer == edit.layer:
                marked.append(len(rows))
            rows.append((title.replace(" tower", ""), str(place), *_figures(score)))
    heads = ("tower", *numeric("no."), *_HEADS)
    table_of_front = table(heads, rows, caption="Layers on the Pareto fronts", marked=marked)
    rest = [score for score in ranking.scores if not score.front]
    others = table(_HEADS, [_figures(score) for score in rest], caption="Layers on no front")
    more = element("details", element("summary", f"The other {count(len(rest))} layers"), others)
    grid = element("div", *charts, class_="charts")
    return joined((intro, grid, table_of_front, more if rest else None))


_HEADS = ("layer", *numeric("importance", "alignment", "shape"))


def _figures(score: LayerScore) -> tuple[Child, ...]:
    shape = " × ".join(map(str, score.shape))
    return (code(known_as(score.layer)), number(score.importance), number(score.alignment), shape)


def search(records: SetRecords) -> Section:
    """Show forgetting and keeping against the step, for every layer that was tried."""
    return section(
        "Search for the step", records.trials, lambda record: _search(record, records.edit.record)
    )


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
    """Draw accuracies against the step for every layer and direction, with a legend."""
    moves = list(dict.fromkeys(trial.move for trial in trials.trials))
    charts = [_steps(trials, move, edit) for move in moves]
    key = legend(step_series(trials, moves[0])) if moves else None
    return joined((key, element("div", *charts, class_="charts")))


def goal(trials: Trials) -> str:
    """Return in words what the search wanted to reach."""
    if trials.criterion is Criterion.MARGIN:
        return f"the name was a cosine of {trials.margin:g} below the fifth best for every image"
    return f"{'FA@5' if trials.criterion is Criterion.FA5 else 'FA@1'} was 0"


def _steps(trials: Trials, move: Move, edit: EditHeader | None) -> Html:
    chosen = edit is not None and (edit.layer, edit.direction) == move
    name = known_as(move[0])
    description = (
        f"Forget accuracy and kept accuracy against the step along {name}; the tables below "
        "have the figures."
    )
    caption = joined(
        (
            code(name),
            f", {move[1]}",
            " (chosen)" if chosen else None,
        )
    )
    drawn = line_chart(
        step_series(trials, move),
        "step, % of the layer's norm",
        chosen=100 * edit.share if edit is not None and chosen else None,
        description=description,
    )
    return figure_of(drawn, caption)


def _best(trials: Trials, edit: EditHeader | None) -> Html:
    chosen = next((trial for trial in trials.trials if _is_chosen(trial, edit)), None)
    best = best_of_each(trials, chosen)
    return _trials(trials, best, edit, caption="The best trial of each layer")


def _all(trials: Trials, edit: EditHeader | None) -> Html:
    ordered = sorted(
        trials.trials, key=lambda t: (t.tower != "vision", t.layer, t.direction.order, t.step)
    )
    every = _trials(trials, ordered, edit, caption="Every trial")
    return element("details", element("summary", "Every trial"), every)


def _is_chosen(trial: Trial, edit: EditHeader | None) -> bool:
    place = (edit.layer, edit.direction, edit.step) if edit is not None else None
    return place == (trial.layer, trial.direction, trial.step)


def _trials(
    trials: Trials, shown: Sequence[Trial], edit: EditHeader | None, *, caption: str
) -> Html:
    sets = sorted(trials.baseline_utility)
    of_sets = [f"TA@1 {name}" for name in sets]
    heads = ("layer", "direction", *numeric("step", "of its norm", "FA@1", "FA@5", *of_sets))
    rows: list[tuple[Child, ...]] = [
        (
            code(known_as(trial.layer)),
            str(trial.direction),
            number(trial.step),
            share(trial.share),
            percent(trial.forget.top1),
            percent(trial.forget.top5),
            *(
                percent(trial.utility[name].top1)
                if trial.utility and name in trial.utility
                else None
                for name in sets
            ),
        )
        for trial in shown
    ]
    marked = [index for index, trial in enumerate(shown) if _is_chosen(trial, edit)]
    return table(heads, rows, caption=caption, marked=marked)


def gradients(records: SetRecords) -> Section:
    """Tell which model and rows the gradients are of, by their fingerprints."""
    return section(
        "Model and gradients",
        records.pointer,
        lambda pointer: _gradients(pointer, records.gradients),
    )


def _gradients(pointer: GradientPointer, headers: dict[str, GradientHeader]) -> Html:
    overview = terms(
        {
            "Model": code(str(pointer.model)),
            "Fingerprint": code(pointer.model_fingerprint),
            "Mini-batches of": f"{pointer.batch_size} pairs",
            "Arithmetic": f"{pointer.precision}, sums in fp32",
        }
    )
    rows = [
        (
            role,
            header.loss,
            number(header.mean_loss),
            count(header.rows),
            count(header.batches),
            code(getattr(pointer, role)),
        )
        for role, header in headers.items()
    ]
    figures = numeric("mean loss", "pairs", "mini-batches")
    heads = ("gradient of", "loss", *figures, "name in the store")
    note = element(
        "p",
        "The fingerprint covers every weight and the architecture; the same weights in another "
        "container have the same one.",
        class_="quiet",
    )
    return joined((overview, table(heads, rows, caption="The two gradients"), note))


def the_edit(records: SetRecords) -> Section:
    """Tell the hash of the edit's file, and what it changes in the model."""
    return section("The edit", records.edit, lambda edit: _edit(edit, records))


def _edit(edit: EditHeader, records: SetRecords) -> Html:
    facts = records.facts
    overview = terms(
        {
            "File": code(records.edit.path),
            "SHA-256 of the file": code(records.edit.sha256 or ""),
            "Changes one layer": code(edit.layer),
            "Tower": str(edit.tower),
            "Values in it": _extent(facts, records.gradients.get("forget")) if facts else None,
            "Step": f"{number(edit.step)} times the {edit.direction.words}",
            "Moves the layer by": f"{share(edit.share)} of its norm",
            "Stands on the edits": ", ".join(edit.after) or None,
            "Made for": code(str(edit.model)),
            "Model's fingerprint": code(edit.model_fingerprint),
            "Written by": f"slsgu {edit.version}",
        }
    )
    if facts is None:
        return overview
    rows = [
        (precision, code(before), code(facts.after[precision]))
        for precision, before in facts.before.items()
    ]
    heads = ("precision", "original", "edited")
    caption = f"SHA-256 of {known_as(edit.layer)} before and after, by the checkpoint's precision"
    note = paragraph(
        "The digest is of the layer's values as fp32 numbers, little-endian, in order. With it, "
        "anyone can tell an edited checkpoint from an original one. ",
        "Every other tensor keeps its bytes.",
        class_="quiet",
    )
    return joined((overview, table(heads, rows, caption=caption), note))


def _extent(facts: EditFacts, header: GradientHeader | None) -> str:
    extent = f"{count(facts.values)}, of which {count(facts.changed)} move"
    if header is None:
        return extent
    whole = sum(math.prod(weight.shape) for weight in header.weights.values())
    return f"{extent}; {100 * facts.values / whole:.2g}% of the model's {count(whole)}"


def repeat(records: SetRecords, store: str) -> Section:
    """Tell the commands that do it again."""
    again = command_lines([f"export SLSGU_STORE={store}", *commands(records)])
    intro = paragraph(
        "Written from the records. The same sources, model and version give the same edit."
    )
    return Section("To repeat it", joined((intro, again)))


def command_lines(again: Sequence[str]) -> Html:
    """Return command lines as they are to be typed."""
    return element("pre", element("code", lines(again)))


def provenance(records: SetRecords) -> Section:
    """List every record this page was made from, with its hash and whether it still stands."""
    rows = [
        (
            evidence.what,
            code(evidence.path),
            str(evidence.state) if evidence.state else "none yet",
            code(evidence.sha256) if evidence.sha256 else None,
        )
        for evidence in records.evidence()
    ]
    heads = ("record", "path in the store", "state", "SHA-256")
    return Section(
        "Records behind this page", table(heads, rows, caption="Records and their state")
    )
