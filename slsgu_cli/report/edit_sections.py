"""Sections on how an edit was made: the request, the layers, the search, and how to repeat it."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.engine.choice import best_of_each
from slsgu_cli.figures.numbers import count, norm_percent, number, percent
from slsgu_cli.records.method import (
    Alignment,
    Criterion,
    EditHeader,
    GradientHeader,
    GradientPointer,
    LayerScore,
    Ranking,
    Tower,
    Trial,
    Trials,
)
from slsgu_cli.records.sets import DataRef, SetManifest
from slsgu_cli.report.charts import front_chart, step_chart
from slsgu_cli.report.gather import EditFacts, SetRecords
from slsgu_cli.report.sections import (
    Cell,
    Table,
    codes,
    figures,
    fill,
    tables,
    texts,
)

# A term, the kind of its value as for columns, and the value.
Term = tuple[str, str, Cell]


def request(manifest: SetManifest) -> Markup:
    """Show which captions select the forget set, and where all rows come from."""
    measured = (
        f"held-out rows of the evaluation set {manifest.forget_eval}"
        if manifest.forget_eval
        else "the rows of the forget set, which the gradient used as well: no held-out figure"
    )
    overview: list[Term] = [
        ("Concept", "", manifest.concept),
        ("Captions with", "code", manifest.patterns),
        ("Model", "code", str(manifest.model)),
        ("Forgetting is measured on", "", measured if manifest.evals else None),
        ("Seed of the draws", "", str(manifest.seed)),
    ]
    parts = [("forget", manifest.forget), ("retain", manifest.retain)]
    parts += [(f"evaluation: {name}", ref) for name, ref in manifest.evals.items()]
    contents = [
        Table(
            "Rows and their sources",
            [
                *texts("rows for"),
                *figures("used", "considered"),
                *texts("rejected"),
                *codes("source"),
            ],
            [
                (role, count(ref.rows), count(ref.seen), _rejected(ref), ref.sources)
                for role, ref in parts
            ],
        ),
        Table(
            "Fingerprints of the rows: pixels, tokens, labels, names and prompts",
            [*texts("rows for"), *codes("fingerprint of the rows")],
            [(role, ref.fingerprint) for role, ref in parts],
        ),
    ]
    return fill("request.html", overview=overview, tables=contents)


def _rejected(ref: DataRef) -> list[str] | None:
    ordered = sorted(ref.refused.items(), key=lambda item: (-item[1], item[0]))
    return [f"{count(rows)} {reason}" for reason, rows in ordered] or None


LAYER_COLUMNS = [*codes("layer"), *figures("importance", "alignment", "shape")]


def front(ranking: Ranking, edit: EditHeader | None) -> Markup:
    """Show importance against alignment, and the layers on the Pareto fronts."""
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
    rows: list[tuple[Cell, ...]] = []
    marked: list[int] = []
    for title, scores in groups:
        for place, score in enumerate((s for s in scores if s.front), start=1):
            if edit is not None and score.layer == edit.layer:
                marked.append(len(rows))
            rows.append((title.replace(" tower", ""), str(place), *_layer_cells(score)))
    rest = [_layer_cells(score) for score in ranking.scores if not score.front]
    return fill(
        "front.html",
        ranking=ranking,
        alignment="absolute cosine" if ranking.alignment is Alignment.ABS else "cosine",
        charts=[(title.capitalize(), front_chart(scores, title)) for title, scores in groups],
        front=Table(
            "Layers on the Pareto fronts",
            [*texts("tower"), *figures("no."), *LAYER_COLUMNS],
            rows,
            marked,
        ),
        rest=Table("Layers on no front", LAYER_COLUMNS, rest),
    )


def _layer_cells(score: LayerScore) -> tuple[Cell, ...]:
    shape = " × ".join(map(str, score.shape))
    return known_as(score.layer), number(score.importance), number(score.alignment), shape


def search(trials: Trials, edit: EditHeader | None) -> Markup:
    """Show forget and retained accuracy against the step, for every layer of the search."""
    chosen = next((trial for trial in trials.trials if _is_chosen(trial, edit)), None)
    best = best_of_each(trials, chosen)
    ordered = sorted(
        trials.trials, key=lambda t: (t.tower != "vision", t.layer, t.direction.order, t.step)
    )
    return fill(
        "search.html",
        trials=count(len(trials.trials)),
        layers=len({trial.layer for trial in trials.trials}),
        precision=trials.precision,
        goal=goal(trials),
        charts=step_charts(trials, edit),
        best=_trials(trials, best, edit, caption="The best trial of each layer"),
        every=_trials(trials, ordered, edit, caption="All trials"),
    )


def step_charts(trials: Trials, edit: EditHeader | None) -> list[tuple[str, Markup]]:
    """Draw accuracies against the step for every move; return captions and charts."""
    charts = []
    for move in dict.fromkeys(trial.move for trial in trials.trials):
        layer, direction = move
        chosen = edit is not None and (edit.layer, edit.direction) == move
        caption = f"{known_as(layer)}, {direction}{' (chosen)' if chosen else ''}"
        step = edit.step if edit is not None and chosen else None
        charts.append((caption, step_chart(trials, move, chosen=step)))
    return charts


def goal(trials: Trials) -> str:
    """Return the goal of the search in words."""
    if trials.criterion is Criterion.MARGIN:
        return f"the name was a cosine of {trials.margin:g} below the fifth best for every image"
    return f"{'FA@5' if trials.criterion is Criterion.FA5 else 'FA@1'} was 0"


def _is_chosen(trial: Trial, edit: EditHeader | None) -> bool:
    place = (edit.layer, edit.direction, edit.step) if edit is not None else None
    return place == (trial.layer, trial.direction, trial.step)


def _trials(
    trials: Trials, shown: Sequence[Trial], edit: EditHeader | None, *, caption: str
) -> Table:
    sets = sorted(trials.baseline_utility)
    rows: list[tuple[Cell, ...]] = [
        (
            known_as(trial.layer),
            str(trial.direction),
            number(trial.step),
            norm_percent(trial.share),
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
    columns = [
        *codes("layer"),
        *texts("direction"),
        *figures("step", "of its norm", "FA@1", "FA@5"),
        *figures(*(f"TA@1 {name}" for name in sets)),
    ]
    marked = [index for index, trial in enumerate(shown) if _is_chosen(trial, edit)]
    return Table(caption, columns, rows, marked)


def gradients(pointer: GradientPointer, headers: dict[str, GradientHeader]) -> Markup:
    """Show the model and the rows of the gradients, with their fingerprints."""
    overview: list[Term] = [
        ("Model", "code", str(pointer.model)),
        ("Fingerprint", "code", pointer.model_fingerprint),
        ("Mini-batches of", "", f"{pointer.batch_size} pairs"),
        ("Arithmetic", "", f"{pointer.precision}, sums in fp32"),
    ]
    columns = [
        *texts("gradient of", "loss"),
        *figures("mean loss", "pairs", "mini-batches"),
        *codes("name in the store"),
    ]
    rows = [
        (
            role,
            header.loss,
            number(header.mean_loss),
            count(header.rows),
            count(header.batches),
            getattr(pointer, role),
        )
        for role, header in headers.items()
    ]
    return fill(
        "gradients.html", overview=overview, table=Table("The two gradients", columns, rows)
    )


def the_edit(edit: EditHeader, records: SetRecords) -> Markup:
    """Show the digest of the edit's file, and what the edit changes in the model."""
    facts = records.facts
    extent = _extent(facts, records.gradients.get("forget")) if facts else None
    overview: list[Term] = [
        ("File", "code", records.edit.path),
        ("SHA-256 of the file", "code", records.edit.sha256),
        ("Edited layer", "code", edit.layer),
        ("Tower", "", str(edit.tower)),
        ("Size", "", extent),
        ("Step", "", f"{number(edit.step)} along {edit.direction.words}"),
        ("Norm of the change", "", f"{norm_percent(edit.share)} of the layer's norm"),
        ("Needs the edits", "", ", ".join(edit.after) or None),
        ("Made for", "code", str(edit.model)),
        ("Fingerprint of the model", "code", edit.model_fingerprint),
        ("Written by", "", f"slsgu {edit.version}"),
    ]
    digests = facts and Table(
        f"SHA-256 of {known_as(edit.layer)} before and after, by the checkpoint's precision",
        [*texts("precision"), *codes("original", "edited")],
        [(precision, before, facts.after[precision]) for precision, before in facts.before.items()],
    )
    return fill("edit.html", overview=overview, digests=digests)


def _extent(facts: EditFacts, header: GradientHeader | None) -> str:
    extent = f"{count(facts.values)} values, of which {count(facts.changed)} change"
    if header is None:
        return extent
    whole = sum(math.prod(weight.shape) for weight in header.weights.values())
    return f"{extent}; {100 * facts.values / whole:.2g}% of the model's {count(whole)}"


def provenance(records: SetRecords) -> Markup:
    """List every record behind this page with its digest and its state."""
    rows = [
        (stored.noun, stored.path, str(stored.state or "none yet"), stored.sha256)
        for stored in records.all()
    ]
    columns = [*texts("record"), *codes("path in the store"), *texts("state"), *codes("SHA-256")]
    return tables(Table("Records and their state", columns, rows))
