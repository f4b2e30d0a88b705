"""`verify` and `report`, and their results as tables."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from textwrap import fill
from typing import TYPE_CHECKING, Any

from slsgu_cli.cli.app import Name, Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.figures.numbers import roughly
from slsgu_cli.records.figures import STRUCTURE, Accuracy
from slsgu_cli.records.options import ReportRequest
from slsgu_cli.records.verification import Check, VerifiedModel, VerifyRequest

if TYPE_CHECKING:
    from slsgu_cli.verification.verdicts import VerdictRow
    from slsgu_cli.verification.verify import Verified

# Columns of a terminal for sentences, and rows of a short table of classes.
WIDTH, SHORT = 79, 5


def show_verified(console: Console, result: "Verified") -> None:
    """Print the findings in tables, and the conclusion."""
    from slsgu_cli.verification.results import conclusion, verdict_rows
    from slsgu_cli.verification.verdicts import Verdict

    original, *others = result.models
    verdicts = [(subject, row) for subject in others for row in verdict_rows(original, subject)]
    _verdicts(console, verdicts, several=len(others) > 1)
    _neighbourhood(console, result.models)
    _losses(console, original, others)
    _look_alikes(console, original, others)
    _neutral_prompts(console, others)
    _classifiers(console, original, others)
    _retrieved(console, original, others)
    _membership(console, original, others)
    _attempts(console, result.models)
    if not console.brief:
        _curves(console, result.models)
    for subject in others:
        of_model = [row for known, row in verdicts if known is subject]
        counts = Counter(row.verdict for row in of_model if not row.detail)
        words = ", ".join(f"{verdict} {counts[verdict]}" for verdict in Verdict if counts[verdict])
        _sentence(console, "verdicts", subject, f"{subject.label}: {words}")
        notes = [(row.check, row.note) for row in of_model if row.note]
        notes += [(f.check, f"skipped: {f.skipped}") for f in subject.findings if f.skipped]
        for check, note in notes:
            _sentence(console, "notes", subject, f"{check}: {note}", check)
    for subject in others:
        found = conclusion(result.record.concept, original, subject)
        text = f"{subject.label}: {found.text}"
        console.row("conclusions", text, data=found, shown="\n" + fill(text, WIDTH))
    console.paths("files", result.files)
    if result.reused:
        console.note(f"reused {result.reused} recorded findings")


def _sentence(
    console: Console, key: str, subject: VerifiedModel, text: str, check: Check | None = None
) -> None:
    data = {"model": subject.label, "check": check, "text": text}
    console.row(key, text, data, shown=fill(text, WIDTH))


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a table on a `model`: a value, and the original's or another `reference`."""

    model: str
    reference: Any
    value: Any


def _verdicts(
    console: Console, verdicts: "Sequence[tuple[VerifiedModel, VerdictRow]]", *, several: bool
) -> None:
    shown = [
        _Row(subject.label, None, row)
        for subject, row in verdicts
        if not (console.brief and row.detail)
    ]
    sets = sorted({name for row in shown for name in row.value.utility_after or {}})
    utility = [
        Column(
            f"{model}TA@1 {name}",
            partial(_utility, side, name),
            on_terminal=False,
            of=("utility", name, f"{model}TA@1"),
        )
        for name in sets
        for model, side in (("original ", "utility_before"), ("", "utility_after"))
    ]
    columns = [
        Column("check", "value.check"),
        Column("variant", "value.variant"),
        Column("model", on_terminal=several),
        Column("original FA@1", "value.before.top1", shown=roughly, label="FA@1\noriginal"),
        Column("FA@1", "value.after.top1", shown=roughly, label="FA@1\nnow"),
        Column("original FA@5", "value.before.top5", on_terminal=False),
        Column("FA@5", "value.after.top5", shown=roughly, label="FA@5\nnow"),
        Column(
            "control FA@1",
            lambda row: _top1(row.value.control),
            shown=roughly,
            label="FA@1\ncontrol",
        ),
        *utility,
        Column("TA change", "value.utility_change", shown="{:+.1f}".format, label="TA@1\nchange"),
        Column("verdict", "value.verdict"),
        Column(
            "original control", lambda row: _top1(row.value.original_control), on_terminal=False
        ),
        Column("added", partial(_added, "points"), on_terminal=False),
        Column("added from", partial(_added, "low"), on_terminal=False),
        Column("added to", partial(_added, "high"), on_terminal=False),
        Column("note", "value.note", on_terminal=False),
    ]
    title = "does it stay forgotten? FA on the concept, TA on everything else"
    console.table("verification", columns, shown, title=title)


def _utility(side: str, name: str, row: _Row) -> float | None:
    return _top1((getattr(row.value, side) or {}).get(name))


def _added(end: str, row: _Row) -> float | None:
    return getattr(row.value.added, end, None)


def _top1(accuracy: Accuracy | None) -> float | None:
    return None if accuracy is None else accuracy.top1


def _neighbourhood(console: Console, subjects: Sequence[VerifiedModel]) -> None:
    """Print the nearest names and the first guesses of each model, side by side."""
    known = [
        (subject, finding.neighbourhood)
        for subject in subjects
        if (finding := subject.finding(Check.NEIGHBOURS)) and finding.neighbourhood
    ]
    lists = {
        "nearest name": [[(near.name, near.cosine) for near in b.nearest] for _, b in known],
        "taken for": [
            [(guess.name, 100 * guess.rows / b.rows) for guess in b.guesses] for _, b in known
        ],
    }
    shown = {"nearest name": "{} {:.2f}", "taken for": "{} {:.0f}%"}
    cells = [
        (f"{what} {place}", *(shown[what].format(*each) if each else None for each in row))
        for what, of_models in lists.items()
        for place, row in enumerate(zip_longest(*of_models), start=1)
    ]
    data = [
        {"model": subject.label, "what": what, "place": place, "name": name, "figure": figure}
        for index, (subject, _) in enumerate(known)
        for what, of_models in lists.items()
        for place, (name, figure) in enumerate(of_models[index], start=1)
    ]
    columns = [Column("what"), *(Column(subject.label) for subject, _ in known)]
    if known:
        console.table("neighbourhood", columns, cells, title="what the concept became", data=data)


def _losses(console: Console, original: VerifiedModel, others: Sequence[VerifiedModel]) -> None:
    """Print the losses of the classes with the nearest names, and of those that lost most."""
    from slsgu_cli.engine.utility import LEAST_ROWS
    from slsgu_cli.verification.checks.nearest import losses, most_harmed, nearest_names

    most = SHORT if console.brief else None
    rows = []
    for subject in others:
        known = losses(original, subject)
        kinds = [("nearest name", each[:most]) for each in nearest_names(known).values()]
        kinds.append(("lost most", most_harmed(known)[:most]))
        rows += [_Row(subject.label, what, loss) for what, each in kinds for loss in each]
    columns = [
        Column("what", "reference"),
        Column("set", "value.evaluation"),
        Column("class", "value.name"),
        Column("model", on_terminal=len(others) > 1),
        Column("cosine", "value.cosine", shown="{:.2f}".format),
        Column("rows", "value.rows"),
        Column("original TA@1", "value.before", shown=roughly, label="TA@1\noriginal"),
        Column("TA@1", "value.after", shown=roughly, label="TA@1\nnow"),
        Column("change", lambda row: 0.0 - row.value.lost, shown="{:+.1f}".format),
    ]
    title = f"losses of other classes; those that lost most have at least {LEAST_ROWS} images"
    if rows:
        console.table("classes", columns, rows, title=title)


def _look_alikes(
    console: Console, original: VerifiedModel, others: Sequence[VerifiedModel]
) -> None:
    """Print what classes like the concept lost, next to random ones."""
    from slsgu_cli.verification.checks.look_alikes import group_losses

    rows = [
        _Row(each.label, None, loss) for each in others for loss in group_losses(original, each)
    ]
    columns = [
        Column("classes", "value.group"),
        Column("model", on_terminal=len(others) > 1),
        Column("number", "value.classes"),
        Column("rows", "value.rows", on_terminal=False),
        Column("original TA@1", "value.before", shown=roughly, label="TA@1\noriginal"),
        Column("TA@1", "value.after", shown=roughly, label="TA@1\nnow"),
        Column("lost", "value.lost", shown="{:z.1f}".format),
        Column("from", "value.low", shown="{:z.1f}".format, label="95%\nfrom"),
        Column("to", "value.high", shown="{:z.1f}".format, label="\nto"),
        Column("lost most", partial(_worst, "name")),
        Column("most", partial(_worst, "lost"), shown="{:z.1f}".format, label="points\nlost"),
        *(
            Column(f"beyond {label}", partial(_beyond, end), on_terminal=False)
            for label, end in (("control", "points"), ("from", "low"), ("to", "high"))
        ),
    ]
    title = "accuracy that classes like the concept lost; means over classes"
    if rows:
        console.table("look-alikes", columns, rows, title=title)


def _worst(field: str, row: _Row) -> Any:
    return getattr(row.value.worst, field, None)


def _beyond(end: str, row: _Row) -> float | None:
    return getattr(row.value.beyond, end, None)


def _neutral_prompts(console: Console, others: Sequence[VerifiedModel]) -> None:
    """Print how much of the structure of text embeddings remains, next to a random change."""
    rows = [
        _Row(each.label, what, structure)
        for each in others
        if (finding := each.finding(Check.NEUTRAL_PROMPTS))
        for what, structure in (finding.structure or {}).items()
    ]
    columns = [
        Column("after", "reference"),
        Column("model", on_terminal=len(others) > 1),
        Column("prompts", "value.prompts"),
        *(Column(name, f"value.{name}", shown=roughly) for name in STRUCTURE),
    ]
    title = "neutral prompts: spread of their text embeddings, overlap of the nearest prompts"
    if rows:
        console.table("neutral-prompts", columns, rows, title=title)


def _classifiers(
    console: Console, original: VerifiedModel, others: Sequence[VerifiedModel]
) -> None:
    """Print how well classifiers on image features find the concept."""
    from slsgu_cli.verification.checks.probe import score_pairs

    rows = [_Row(each.label, *pair) for each in others for pair in score_pairs(original, each)]
    columns = [
        Column("classifier", "value.classifier"),
        Column("looks for", "value.subject"),
        Column("model", on_terminal=len(others) > 1),
        Column("images", "value.images"),
        Column(
            "original accuracy", "reference.accuracy", shown=roughly, label="accuracy\noriginal"
        ),
        Column("accuracy", "value.accuracy", shown=roughly, label="\nnow"),
        Column("original recall", "reference.recall", shown=roughly, label="recall\noriginal"),
        Column("recall", "value.recall", shown=roughly, label="\nnow"),
        Column("rows", "value.rows", on_terminal=False),
        Column("others", "value.others", on_terminal=False),
    ]
    title = "classifiers on image features; recall at 1% false positives"
    if rows:
        console.table("classifiers", columns, rows, title=title)


def _retrieved(console: Console, original: VerifiedModel, others: Sequence[VerifiedModel]) -> None:
    """Print retrieval by its images and its name, and how far an index moved."""
    from slsgu_cli.verification.checks.retrieval import retrievals

    found = [(each.label, pair) for each in others if (pair := retrievals(original, each))]
    if not found:
        return
    model = Column("model", on_terminal=len(others) > 1)
    queries = [
        _Row(label, *pair)
        for label, (before, after) in found
        for pair in zip(before.queries, after.queries, strict=True)
    ]
    columns = [
        Column("query", "value.query"),
        Column("index", "value.index"),
        model,
        Column("original mAP", "reference.precision", shown=roughly, label="mAP\noriginal"),
        Column("mAP", "value.precision", shown=roughly, label="\nnow"),
        Column("original recall@1", "reference.recall1", shown=roughly, label="R@1\noriginal"),
        Column("recall@1", "value.recall1", shown=roughly, label="\nnow"),
        Column("recall@5", "value.recall5", on_terminal=False),
        Column("recall@10", "value.recall10", shown=roughly, label="R@10\nnow"),
        Column("queries", "value.queries", on_terminal=False),
        Column("gallery", "value.gallery", on_terminal=False),
    ]
    console.table("retrieval", columns, queries, title="retrieval of its images among all others")
    shifts = [_Row(label, None, each) for label, (_, after) in found for each in after.shifts]
    columns = [
        Column("features of", "value.images"),
        model,
        Column("rows", "value.rows"),
        Column("identical", lambda row: 100 * row.value.identical / row.value.rows, shown=roughly),
        Column(
            "moved",
            lambda row: 100 * row.value.far / row.value.rows,
            shown=roughly,
            label="moved by\n> 0.01",
        ),
        Column("mean", "value.mean", shown="{:.4f}".format, label="mean\nmove"),
        Column("largest", "value.largest", shown="{:.4f}".format, label="largest\nmove"),
    ]
    console.table("index", columns, shifts, title="how far an image index moved, as 1 - cosine")


def _membership(console: Console, original: VerifiedModel, others: Sequence[VerifiedModel]) -> None:
    from slsgu_cli.verification.checks.membership import exposure

    before = original.finding(Check.MEMBERSHIP)
    if before is None:
        return
    rows = [
        _Row(subject.label, *pair)
        for subject in others
        if (after := subject.finding(Check.MEMBERSHIP))
        for pair in zip(before.membership, after.membership, strict=True)
    ]
    columns = [
        Column("figure", "value.figure"),
        Column("against", "value.against"),
        Column("model", on_terminal=len(others) > 1),
        Column("original mean", "reference.mean", shown=roughly, label="mean\noriginal"),
        Column("original sd", "reference.deviation", shown="{:.1f}".format, label="\nsd"),
        Column("mean", "value.mean", shown=roughly, label="\nmean"),
        Column("sd", "value.deviation", shown="{:.1f}".format, label="\nsd"),
        Column("members", "value.members", on_terminal=False),
        Column("others", "value.others", on_terminal=False),
        Column("verdict", lambda row: exposure(row.reference, row.value)),
    ]
    title = "membership inference: accuracy of separating the forget set from other pairs"
    console.table("membership", columns, rows, title=title)


def _attempts(console: Console, subjects: Sequence[VerifiedModel]) -> None:
    """Print the texts that attacks found or learnt; in a brief table, only the best of each."""
    attempts = [
        _Row(subject.label, finding, attempt)
        for subject in subjects
        for finding in subject.findings
        for attempt in finding.attempts
        if not console.brief or attempt == finding.best(attempt.name)
    ]
    columns = (
        Column("check", "reference.check"),
        "model",
        Column("looked for", "value.name"),
        Column("text", "value.text"),
        Column("loss", "value.loss", on_terminal=False),
        Column("FA@1", "value.forget.top1", shown=roughly),
        Column("FA@5", "value.forget.top5", shown=roughly),
    )
    if attempts:
        title = "texts found in place of the name, and their accuracy"
        console.table("attempts", columns, attempts, title=title)


def _curves(console: Console, subjects: Sequence[VerifiedModel]) -> None:
    cells = [
        (finding.check, subject.label, curve.target, p.step, p.forget.top1, p.forget.top5)
        for subject in subjects
        for finding in subject.findings
        for curve in finding.curves
        for p in curve.points
    ]
    if cells:
        columns = ("check", "model", "trained name", "step", "FA@1", "FA@5")
        console.table("curves", columns, cells, title="forget accuracy during training")


@command("verify")
def verify(session: Session, name: Name, request: VerifyRequest) -> None:
    """Compares the original model with --model, with each --edit, or else with the set's edit.

    Example: slsgu verify facebook --checks typos,relearn --alias 'the social network'
    """
    from slsgu_cli.verification.verify import verify as run

    show_verified(session.console, run(session.store, name, request))


@command("report")
def report(session: Session, request: ReportRequest) -> None:
    """The page is self-contained: it fetches nothing and can be sent as it is.

    Example: slsgu report facebook --out report.html
    """
    from slsgu_cli.report.page import write_report

    sections_by_name = write_report(session.store, request)
    rows = [
        (name, section.title, section.state, section.run)
        for name, sections in sections_by_name.items()
        for section in sections
    ]
    columns = ("name", "section", "state", Column("run", label="to add it"))
    session.console.table("sections", columns, rows, title=f"report: {request.out}")
    session.console.paths("files", [str(request.out)])
