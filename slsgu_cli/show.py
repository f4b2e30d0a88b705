"""How each command's result is printed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slsgu_cli.console import Console
from slsgu_cli.layout import edit_path, trials_path
from slsgu_cli.records import Accuracy, GradientHeader, Ranking, SetManifest
from slsgu_cli.store import Store

if TYPE_CHECKING:
    from slsgu_cli.apply import AppliedResult
    from slsgu_cli.gradients import GradResult
    from slsgu_cli.listing import Entry
    from slsgu_cli.measure import Measured
    from slsgu_cli.search import SearchResult


# A model's label, its forget accuracy and its utility by evaluation set.
Figures = dict[str, tuple[Accuracy, dict[str, Accuracy]]]


def manifest(console: Console, built: SetManifest) -> None:
    """Print a set's parts: rows kept, rows seen, rows left out by reason."""
    parts = {"forget": built.forget, "retain": built.retain}
    parts |= {f"eval {name}": ref for name, ref in sorted(built.evals.items())}
    rows = [
        (
            part,
            ref.rows,
            ref.seen,
            ", ".join(f"{count} {reason}" for reason, count in ref.refused.items() if count),
            ref.path,
        )
        for part, ref in parts.items()
    ]
    columns = ("part", "rows", "seen", "left out", "path")
    console.table("set", columns, rows, title=f"set {built.name}", data=built)


def gradients(console: Console, result: "GradResult") -> None:
    """Print both gradients of a set and whether they were computed now."""
    pointer = result.pointer

    def row(role: str, header: GradientHeader) -> tuple[Any, ...]:
        made = "computed" if role in result.computed else "cached"
        digest = pointer.forget if role == "forget" else pointer.retain
        return (role, header.loss, header.mean_loss, header.rows, header.batches, digest, made)

    rows = [row(role, header) for role, header in result.headers.items()]
    columns = ("role", "loss", "mean loss", "rows", "batches", "gradient", "made")
    console.table("gradients", columns, rows, title=f"gradients of {pointer.name}")


def ranking(
    console: Console, ranked: Ranking, plots: Sequence[str], *, front_only: bool = False
) -> None:
    """Print every candidate layer, each tower's front first; or the fronts alone."""
    columns = (
        "layer",
        "tower",
        "front",
        "importance",
        "alignment",
        "forget_norm",
        "retain_norm",
        "weight_norm",
    )
    rows = [
        tuple(getattr(score, column) for column in columns)
        for score in ranked.scores
        if score.front or not front_only
    ]
    console.table("ranking", columns, rows, title=f"layers for {ranked.name}", data=ranked)
    console.paths("plots", plots)


def chosen_figures(result: "SearchResult") -> Figures:
    """Return the figures of the original model and of the chosen step."""
    trials, chosen = result.trials, result.chosen
    return {
        "original": (trials.baseline_forget, trials.baseline_utility),
        "edited": (chosen.forget, chosen.utility or {}),
    }


def search(console: Console, store: Store, result: "SearchResult", *, brief: bool = False) -> None:
    """Print the trials by layer and step, and the chosen one with its figures.

    In `brief`, only the trials whose utility was measured are shown, without the figures.
    """
    trials, chosen = result.trials, result.chosen
    sets = sorted(trials.baseline_utility)
    columns = ("layer", "step", "% of norm", "FA@1", "FA@5", *(f"TA@1 {name}" for name in sets))
    rows = [
        (
            trial.layer,
            trial.step,
            100 * trial.share,
            trial.forget.top1,
            trial.forget.top5,
            *(trial.utility[name].top1 if trial.utility else None for name in sets),
        )
        for trial in sorted(trials.trials, key=lambda t: (t.tower != "vision", t.layer, t.step))
        if trial.utility or not brief
    ]
    console.table("trials", columns, rows, title=f"trials for {trials.name}", data=trials)
    console.value("chosen", f"chosen\t{chosen.layer}\tstep {chosen.step:.6g}", data=chosen)
    if not brief:
        before_after(console, chosen_figures(result))
    console.paths(
        "files",
        [store.where(edit_path(trials.name)), store.where(trials_path(trials.name))],
    )
    if result.reused:
        console.note(f"{result.reused} recorded trials were used again")
    if trials.baseline_forget.top1 < 20:
        console.warn(
            f"the original model recognises {trials.name} in only "
            f"{trials.baseline_forget.top1:.0f}% of its images: there is little to forget"
        )


def applied(console: Console, result: "AppliedResult") -> None:
    """Print the files that were written, or would be, and what changed in each."""
    rows = [
        (file.path, change.layer, change.dtype, change.share, file.nbytes)
        for file in result.files
        for change in file.changes
    ]
    title = "would write" if result.dry_run else "written"
    columns = ("file", "layer", "dtype", "relative change", "bytes")
    console.table("files", columns, rows, title=title, data=result)
    if result.model and not result.dry_run:
        console.note(f"open_clip loads it as {result.model}")


def measured(console: Console, result: "Measured") -> None:
    """Print the accuracies of each model that was measured."""
    before_after(console, {m.label: (m.forget, m.utility) for m in result.models})
    console.paths("plots", [result.plot])


def before_after(console: Console, models: dict[str, tuple[Accuracy, dict[str, Accuracy]]]) -> None:
    """Print forget accuracy and utility, a column for each model."""
    labels = list(models)
    sets = sorted(next(iter(models.values()))[1])
    rows: list[tuple[Any, ...]] = []
    for k, attribute in ((1, "top1"), (5, "top5")):
        rows.append((f"FA@{k}", *(getattr(models[label][0], attribute) for label in labels)))
    for name in sets:
        for k, attribute in ((1, "top1"), (5, "top5")):
            figures = (models[label][1].get(name) for label in labels)
            rows.append(
                (f"TA@{k} {name}", *(getattr(f, attribute) if f else None for f in figures))
            )
    if len(labels) == 2:
        rows = [(*row, None if row[2] is None else round(row[2] - row[1], 2)) for row in rows]
        labels = [*labels, "change"]
    console.table("accuracy", ("figure", *labels), rows, title="accuracy in percent")


def listing(console: Console, found: "Sequence[Entry]") -> None:
    """Print what the store holds."""
    rows = [
        (entry.kind, entry.name, entry.size, _state(entry), entry.summary() or None)
        for entry in found
    ]
    console.table("store", ("kind", "name", "bytes", "state", "made from"), rows, data=found)


def _state(entry: "Entry") -> str:
    return f"{entry.state}: {entry.reason}" if entry.reason else str(entry.state)
