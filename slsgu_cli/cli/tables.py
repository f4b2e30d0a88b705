"""Results of the five steps as tables."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.checkpoints.targets import prompt_note
from slsgu_cli.errors import AbsentError, AssertionsError, InputError
from slsgu_cli.figures.numbers import percent, roughly
from slsgu_cli.records.figures import Accuracy, Assertion, Report, Share
from slsgu_cli.records.method import GradientHeader, Ranking
from slsgu_cli.records.sets import SetManifest

if TYPE_CHECKING:
    from slsgu_cli.checkpoints.model_copy import AppliedResult
    from slsgu_cli.cli.console import Console
    from slsgu_cli.engine.evaluate import EvalResult
    from slsgu_cli.engine.find_edits import FoundEdit
    from slsgu_cli.engine.gradients import GradResult
    from slsgu_cli.engine.search import SearchResult
    from slsgu_cli.sets.replay import Replayed
    from slsgu_cli.store.catalog import Entry
    from slsgu_cli.store.check import Checked, Finding
    from slsgu_cli.store.store import Store


# Points of accuracy on an evaluation set that an edit should not cost unnoticed.
COSTLY = 5.0
# Classes that a person is shown without -v, of those harmed and of those with near names.
HARM_SHOWN = 5

# A model's label, its forget accuracy (or that of each set's concept), its utility by
# evaluation set.
Figures = Mapping[str, tuple[Accuracy | dict[str, Accuracy], dict[str, Accuracy]]]


def _change(value: float) -> str:
    return f"{value:+.2f}"


def _artifact(name: str) -> str:
    """Return an artifact's name with digests and the names of layers cut short."""
    if re.fullmatch(r"[0-9a-f]{24}", name):
        return name[:12]
    return known_as(name)


def step_size(value: float) -> str:
    """Return a step size to four digits."""
    return f"{value:.4g}"


def brief_state(state: str) -> str:
    """Return the state of a request as a terminal has it: without its bounds."""
    return state.partition(" within")[0]


def manifest(console: "Console", built: SetManifest) -> None:
    """Print a set's parts: rows kept, rows seen, rows left out by reason."""
    from slsgu_cli.cli.console import Column

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
    columns = ("part", "rows", "seen", "left out", Column("path", on_terminal=False))
    console.table("set", columns, rows, title=f"set {built.name}", data=built)


def manifests(console: "Console", built: Sequence[SetManifest]) -> None:
    """Print the sets that were built for many names."""
    from slsgu_cli.sets.context import counted

    cells = [(m.name, m.forget.rows, m.retain.rows, counted(m.forget.refused)) for m in built]
    columns = ("set", "forget", "retain", "left out of forget")
    console.table("sets", columns, cells, title="sets", data=list(built))


def replayed(console: "Console", result: "Replayed") -> None:
    """Print whether a set that was built again is what it was."""
    cells = [(part, "same rows" if same else "other rows") for part, same in result.same.items()]
    title = f"set {result.manifest.name}, built again"
    console.table("replayed", ("part", "rows"), cells, title=title)
    for part, same in result.same.items():
        if not same:
            console.warn(f"the {part} rows are not those they were: a source has changed")


def gradients(console: "Console", result: "GradResult") -> None:
    """Print both gradients of a set and whether they were computed now."""
    from slsgu_cli.cli.console import Column

    pointer = result.pointer

    def row(role: str, header: GradientHeader) -> tuple[Any, ...]:
        made = "computed" if role in result.computed else "cached"
        digest = pointer.forget if role == "forget" else pointer.retain
        return (role, header.loss, header.mean_loss, header.rows, header.batches, digest, made)

    rows = [row(role, header) for role, header in result.headers.items()]
    digest = Column("gradient", shown=_artifact)
    columns: list[str | Column] = ["role", "loss", "mean loss", "rows", "batches", digest, "made"]
    if result.squared is not None:
        made = ["computed" if role in result.squared else "cached" for role in result.headers]
        rows = [(*row, word) for row, word in zip(rows, made, strict=True)]
        columns.append("squares")
    names = [column if isinstance(column, str) else column.name for column in columns]
    data = [{"squares": None} | dict(zip(names, row, strict=True)) for row in rows]
    console.table("gradients", columns, rows, title=f"gradients of {pointer.name}", data=data)


def ranking(
    console: "Console", ranked: Ranking, plots: Sequence[str], *, front_only: bool = False
) -> None:
    """Print every candidate layer, each tower's front first; or the fronts alone."""
    from slsgu_cli.cli.console import Column

    ranked_along = ranked.by_direction()
    several = len(ranked_along) > 1
    figures = (
        Column("layer", shown=known_as),
        Column("tower"),
        Column("front"),
        Column("importance"),
        Column("alignment"),
        Column("forget_norm", on_terminal=False),
        Column("retain_norm", on_terminal=False),
        Column("weight_norm", on_terminal=False),
    )
    columns = (*figures, *([Column("direction")] if several else []))
    front_only = front_only or console.brief
    rows = [
        (*(getattr(score, figure.name) for figure in figures), *([direction] if several else []))
        for direction, scores in ranked_along.items()
        for score in scores
        if score.front or not front_only
    ]
    console.table("ranking", columns, rows, title=f"layers for {ranked.name}", data=ranked)
    if console.brief and len(rows) < len(ranked.scores):
        left_out = {s.layer for s in ranked.scores} - {s.layer for s in ranked.scores if s.front}
        console.note(f"{len(left_out)} layers are on no front; -v shows them too")
    for reason, count in sorted(Counter(ranked.unreached.values()).items()):
        console.note(f"{count} layers cannot influence {ranked.target}: {reason}")
    if note := prompt_note(str(ranked.target), ranked.readers):
        console.note(note)
    console.paths("plots", plots)


def chosen_figures(result: "SearchResult") -> Figures:
    """Return what the original model and the edited one make of images that chose nothing.

    Between them stands the model with the edits that came before.
    """
    report = result.report
    models = {"original": report.before, "edited": report.after}
    if report.base_edits is not None:
        models = {
            "original": report.before,
            "before": report.base_edits.figures,
            "after": report.after,
        }
    return {label: (figures.forget, figures.utility) for label, figures in models.items()}


def search(
    console: "Console", store: "Store", result: "SearchResult", *, brief: bool = False
) -> None:
    """Print the chosen trial, and its figures on images that chose nothing.

    All trials are shown as well where they are not for a person to read, or with -v. In
    `brief`, neither is.
    """
    from slsgu_cli.cli.console import Column
    from slsgu_cli.store.artifacts import Artifact

    trials, chosen = result.trials, result.chosen
    sets = sorted(trials.baseline_utility)
    utility = [Column(f"TA@1 {n}", shown=roughly, label=f"TA@1\n{n}") for n in sets]
    columns = (
        Column("layer", shown=known_as),
        Column("direction", on_terminal=len({trial.direction for trial in trials.trials}) > 1),
        Column("step", shown=step_size),
        Column("% of norm", shown=roughly, label="move"),
        Column("FA@1", shown=roughly),
        Column("FA@5", shown=roughly),
        *utility,
        Column("chosen"),
    )
    order = sorted(
        trials.trials, key=lambda t: (t.tower != "vision", t.layer, t.direction.order, t.step)
    )
    rows = [
        (
            trial.layer,
            str(trial.direction),
            trial.step,
            100 * trial.share,
            trial.forget.top1,
            trial.forget.top5,
            *(trial.utility[name].top1 if trial.utility else None for name in sets),
            trial == chosen,
        )
        for trial in order
    ]
    title = f"trials for {trials.name}, on the images to choose by"
    if console.as_json or not (brief or console.brief):
        console.table("trials", columns, rows, title=title, data=trials)
    console.value(
        "chosen",
        f"chosen\t{chosen.layer}\t{chosen.step:.10g}",
        data=chosen,
        shown=f"\nchosen of {len(trials.trials)} trials: {chosen.layer} at step "
        f"{step_size(chosen.step)}, a move by {100 * chosen.share:.1f}% of the layer's norm "
        f"along the direction {chosen.direction}",
    )
    if not brief:
        before_after(console, chosen_figures(result))
        earlier(console, result.report)
        harm(console, result.report)
    files = (Artifact.EDIT, Artifact.TRIALS)
    console.paths("files", [store.where(kind.path(trials.name)) for kind in files])
    if result.reused:
        console.note(f"{result.reused} recorded trials were used again")
    before, after, base_edits = result.report.before, result.report.after, result.report.base_edits
    if before.forget.top1 < 20:
        console.warn(
            f"the original model recognises {trials.name} in only "
            f"{before.forget.top1:.0f}% of its images: there is little to forget"
        )
    for name, was in sorted((base_edits.figures if base_edits else before).utility.items()):
        lost = was.top1 - after.utility[name].top1
        if lost > COSTLY:
            console.warn(
                f"the edit costs {lost:.1f} points of top-1 accuracy on {name}: "
                "look at other layers, or criterion on fa1"
            )


def earlier(console: "Console", report: Report) -> None:
    """Print how well the concepts of earlier edits are recognised; nothing where there are none."""
    from slsgu_cli.cli.console import Column

    if report.base_edits is None:
        return
    figures = [(k, when) for k in (1, 5) for when in ("original", "before", "after")]
    rows = [
        (name, *(getattr(getattr(edit, when), f"top{k}") for k, when in figures))
        for name, edit in report.base_edits.edits.items()
    ]
    columns = (
        Column("edit"),
        *(Column(f"FA@{k} {when}", shown=percent, label=f"FA@{k}\n{when}") for k, when in figures),
    )
    title = "concepts of the edits that came before"
    console.table("earlier", columns, rows, title=title, data=report.base_edits)
    for name, edit in report.base_edits.edits.items():
        console.note(recognised(name, edit.after))


def harm(console: "Console", report: Report) -> None:
    """Print the classes that an edit harms most, and those of the nearest names."""
    from slsgu_cli.cli.console import Column

    columns = (
        Column("class"),
        Column("images"),
        Column("original", shown=percent),
        Column("edited", shown=percent),
        Column("change", shown=_change),
    )
    for key, losses, title in (
        ("harmed", report.harmed, "most harmed classes"),
        ("nearest", report.nearest, "classes with the nearest names"),
    ):
        rows = [
            (loss.name, loss.rows, loss.before, loss.after, loss.after - loss.before)
            for loss in (losses[:HARM_SHOWN] if console.brief else losses)
        ]
        console.table(key, columns, rows, title=f"{title}, TA@1", data=list(losses))


def applied(console: "Console", result: "AppliedResult") -> None:
    """Print the files that were written, or would be, and what changed in each."""
    from slsgu_cli.cli.console import Column

    rows = [
        (file.path, change.layer, change.dtype, change.share, file.nbytes)
        for file in result.files
        for change in file.changes
    ]
    title = f"{'would write' if result.dry_run else 'written'}: {result.out}"
    alike = len({Path(file.path).name for file in result.files}) < len(result.files)

    def named(path: str) -> str:
        # The two encoders of a pipeline lie in files of one name.
        return str(Path(path).relative_to(result.out)) if alike else Path(path).name

    columns = (
        Column("file", shown=named),
        Column("layer", shown=known_as),
        "dtype",
        Column("relative change", shown=lambda share: f"{100 * share:.3g}%", label="moved by"),
        Column("bytes", shown=_size, label="size"),
    )
    console.table("applied", columns, rows, title=title, data=result)
    if result.model and not result.dry_run:
        console.note(f"{result.client} loads it as {result.model}")


def evaluated(console: "Console", result: "EvalResult") -> None:
    """Print the accuracies of each model that was measured."""
    single = result.names[0] if len(result.names) == 1 else None
    figures: Figures = {
        model.label: (model.forget[single] if single else model.forget, model.utility)
        for model in result.models
    }
    before_after(console, figures)
    console.paths("plots", [result.plot] if result.plot else [])


def asserted(console: "Console", result: "EvalResult", assertions: Sequence[Assertion]) -> None:
    """Print each assertion with its figure. Raises AssertionsError where one does not hold."""
    from slsgu_cli.cli.console import Column

    if not assertions:
        return
    figures = result.figures()
    values = [figures.get(each.figure, math.nan) for each in assertions]
    rows = [
        (str(each), value, "holds" if each.holds(value) else "fails")
        for each, value in zip(assertions, values, strict=True)
    ]
    columns = (Column("assertion"), Column("figure", shown=roughly), Column("result"))
    console.table("assertions", columns, rows, title="assertions")
    if failed := [f"{words} is {value:.4g}" for words, value, holds in rows if holds == "fails"]:
        raise AssertionsError(f"{len(failed)} of {len(rows)} assertions fail: {'; '.join(failed)}")


def before_after(console: "Console", models: Figures) -> None:
    """Print forget accuracy and utility, a column for each model."""
    from slsgu_cli.cli.console import Column

    labels = list(models)
    sets = sorted(next(iter(models.values()))[1])
    rows: list[tuple[Any, ...]] = []
    data: list[dict[str, Any]] = []
    forgets = {
        label: {f" {name}": accuracy for name, accuracy in forget.items()}
        if isinstance(forget, dict)
        else {"": forget}
        for label, (forget, _) in models.items()
    }
    for name in forgets[labels[0]]:
        for k in (1, 5):
            figures = (getattr(forgets[label][name], f"top{k}") for label in labels)
            rows.append((f"FA@{k}{name}", *figures))
    for name in sets:
        known = [models[label][1].get(name) for label in labels]
        for k in (1, 5):
            figures = (getattr(each, f"top{k}") if each else None for each in known)
            rows.append((f"TA@{k} {name}", *figures))
    columns = [Column("figure"), *(Column(label, shown=percent) for label in labels)]
    for name, first, *others in rows:
        before, edited = others[0] if others[1:] else None, others[-1] if others else None
        change = None if edited is None else round(edited - first, 2)
        figures_of = {"original": first, "before": before, "edited": edited, "change": change}
        data.append({"figure": name, **figures_of, "model": labels[-1]})
    if len(labels) == 2:
        rows = [(*row, None if row[2] is None else round(row[2] - row[1], 2)) for row in rows]
        columns.append(Column("change", shown=_change))
    title = "accuracy: FA on the concept to forget, TA on everything else"
    console.table("accuracy", columns, rows, title=title, data=data)
    for forget in forgets[labels[-1]].items():
        console.note(recognised(*forget))


def recognised(name: str, forget: Accuracy) -> str:
    """Return in words how often a concept is recognised, and on which images that was seen."""
    images = "unseen images" if forget.unseen else "images, which the edit was chosen by"
    share = Share.of(forget.top1, forget.rows)
    return f"{name.strip() or 'the concept'} is recognised in {share.in_words(images)}"


def listing(console: "Console", entries: "Sequence[Entry]") -> None:
    """Print what the store holds."""
    from slsgu_cli.cli.console import Column

    rows = [
        (entry.kind, entry.name, entry.size, entry.state, entry.reason, _origin(console, entry))
        for entry in entries
    ]
    columns = (
        Column("kind"),
        Column("name", shown=_artifact),
        Column("bytes", shown=_size, label="size"),
        Column("state"),
        Column("reason", on_terminal=False),
        Column("made from"),
    )
    console.table("store", columns, rows, data=entries)


def checked(console: "Console", result: "Checked") -> None:
    """Print what is wrong with a store. Raises InputError where something is damaged."""
    from slsgu_cli.store.check import State

    _findings(console, "check", result.findings)
    counts = Counter(str(found.state) for found in result.findings if not found.removed)
    summary = ", ".join(f"{count} {state}" for state, count in counts.items()) or "all is well"
    read = f"read {result.artifacts} artifacts, {_size(result.size)}"
    removed = sum(found.removed for found in result.findings)
    console.note(f"{read}: {summary}" + (f"; {removed} removed" if removed else ""))
    damaged = [one for one in result.findings if one.state is State.DAMAGED and not one.removed]
    if not damaged:
        return
    again = any(found.removable for found in damaged)
    raise InputError(
        f"{len(damaged)} of them {'is' if len(damaged) == 1 else 'are'} damaged",
        hint="`slsgu check --repair` removes what is made again, then run the commands listed"
        if again
        else "run the commands listed, or put copies back; "
        "--repair --irreplaceable removes what cannot be read",
    )


def presence(console: "Console", found: "Sequence[FoundEdit]", model: Path) -> None:
    """Print whether edits are in a model. Raises AbsentError or InputError where one is not."""
    from slsgu_cli.cli.console import Column
    from slsgu_cli.engine.find_edits import Presence

    rows = [(one.name, one.presence, one.layer, one.dtype, one.file) for one in found]
    columns = ("edit", "is", Column("layer", shown=known_as), "dtype", "file")
    console.table("edits", columns, rows, title=f"edits in {model}", data=list(found))
    others = [one for one in found if one.presence is Presence.OTHER]
    for one in others[:1]:
        along = one.share is not None
        raise InputError(
            f"{one.file} holds other weights in {one.layer} than the edit {one.name} makes or met",
            hint=f"they lie {one.share:.4g} of the way along it: --scale {one.share:.4g}"
            if along
            else "name all edits of this layer, with the --scale or --rank they had",
        )
    absent = [one for one in found if one.presence is Presence.ABSENT]
    for one in absent[:1]:
        raise AbsentError(
            f"the edit {one.name} is not in {one.file}: {one.layer} is the original one"
        )


def unused(console: "Console", found: "Sequence[Finding]") -> None:
    """Print what nothing in a store refers to, and whether it was removed."""
    _findings(console, "unused", found)
    size = _size(sum(one.size for one in found))
    if any(one.removed for one in found):
        console.note(f"removed {size}")
    elif found:
        console.note(f"{size} to be freed; --yes removes them")


def _findings(console: "Console", key: str, found: "Sequence[Finding]") -> None:
    from slsgu_cli.cli.console import Column

    rows = [
        (one.state, one.kind, one.name, one.size, one.reason, one.mend, one.removed)
        for one in found
    ]
    columns = (
        Column("state"),
        Column("kind"),
        Column("name", shown=_artifact),
        Column("bytes", shown=_size, label="size"),
        Column("reason"),
        Column("to mend it"),
        Column("removed"),
    )
    console.table(key, columns, rows, data=list(found))


def _origin(console: "Console", entry: "Entry") -> str:
    # On a terminal there is no room for the reasons in a column of their own.
    reason = f"{entry.reason}; " if entry.reason and console.on_terminal else ""
    return reason + entry.summary()


def _size(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)
