"""Sections on what an edit did: to the CLIP, and to models built on it."""

from markupsafe import Markup

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.figures.numbers import change, count, interval, percent
from slsgu_cli.records.figures import Accuracy, Share
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.report.sections import Cell, Table, figures, fill, texts


def result(edit: EditHeader, manifest: SetManifest | None, doubt: str | None) -> Markup:
    """Show in words and numbers what the edit did; `doubt` says why that may have changed."""
    rows = [
        _row(f"TA@{k} {name}" if name else f"FA@{k}", was, now, attribute)
        for name, was, now in [("", edit.baseline_forget, edit.forget), *retained(edit)]
        for k, attribute in ((1, "top1"), (5, "top5"))
    ]
    return fill(
        "result.html",
        edit=edit,
        doubt=doubt,
        lead=lead(edit),
        accuracies=Table(
            f"Accuracy with the original and the edited {known_as(edit.layer)}",
            [
                *texts("figure"),
                *figures("original", "edited", "change, points", "images", "95% interval, edited"),
            ],
            rows,
        ),
        held_out=manifest is None or manifest.forget_eval,
        losses=_losses(edit),
    )


def lead(edit: EditHeader) -> Markup:
    """Return the result in a few sentences."""
    before, after = edit.baseline_forget, edit.forget
    if before is None or after is None:
        return fill("lead.html", after=None)
    worst = edit.harmed[0] if edit.harmed else None
    return fill(
        "lead.html",
        edit=edit,
        after=after,
        rows=count(after.rows),
        seen=Share.of(after.top1, after.rows),
        top1=[percent(each.top1) for each in (before, after)],
        top5=[percent(each.top5) for each in (before, after)],
        utility=[
            (name, count(now.rows), percent(was.top1), percent(now.top1))
            for name, was, now in retained(edit)
            if now is not None
        ],
        worst=worst,
        worst_rows=worst and count(worst.rows),
        worst_before=worst and percent(worst.before),
        worst_after=worst and percent(worst.after),
    )


def retained(edit: EditHeader) -> list[tuple[str, Accuracy, Accuracy | None]]:
    """Return each evaluation set with the accuracy on it before and after the edit."""
    after = edit.utility or {}
    before = sorted((edit.baseline_utility or {}).items())
    return [(name, accuracy, after.get(name)) for name, accuracy in before]


def _row(
    figure: str, was: Accuracy | None, now: Accuracy | None, attribute: str
) -> tuple[Cell, ...]:
    before = None if was is None else getattr(was, attribute)
    after = None if now is None else getattr(now, attribute)
    return (
        figure,
        None if before is None else percent(before),
        None if after is None else percent(after),
        None if before is None or after is None else change(after - before),
        count(was.rows) if was else None,
        interval(Share.of(getattr(now, attribute), now.rows)) if now and now.rows else None,
    )


def _losses(edit: EditHeader) -> list[Table]:
    """Return the classes with the largest losses, and those with the nearest names."""
    columns = [*texts("class"), *figures("images", "original", "edited", "change")]
    return [
        Table(
            caption,
            columns,
            [
                (
                    loss.name,
                    count(loss.rows),
                    percent(loss.before),
                    percent(loss.after),
                    change(0.0 - loss.lost),
                )
                for loss in losses
            ],
        )
        for losses, caption in (
            (edit.words, "Words of the concept, FA@1"),
            (edit.harmed, "Classes with the largest losses, TA@1"),
            (edit.nearest, "Classes with the nearest names, TA@1"),
        )
        if losses
    ]


def on_target(edit: EditHeader) -> Markup:
    """Show what an edit that was searched on a model built on CLIP did to that model."""
    target = edit.target
    if target is None:
        return fill("target.html", edit=edit, table=None)
    rows: list[tuple[Cell, ...]] = []
    for by in target.by_judge:
        for figure, was, now in (
            ("UA", by.before.unlearned, by.after.unlearned),
            ("IRA", by.before.others, by.after.others),
        ):
            before, after = was.percent or 0.0, now.percent or 0.0
            cells = percent(before), percent(after), change(after - before)
            rows.append((by.judge, figure, *cells, count(now.total), interval(now)))
    columns = [
        *texts("judged by", "figure"),
        *figures("original", "edited", "change, points", "of", "95% interval, edited"),
    ]
    measured_on = (
        "test prompts or images" if target.is_test else "the prompts or images of the search"
    )
    table = Table(f"{target.target}, measured on {measured_on}", columns, rows)
    return fill("target.html", edit=edit, table=table, layer=known_as(edit.layer))
