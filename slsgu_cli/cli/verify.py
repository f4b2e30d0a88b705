"""`verify` and `report`, and their results as tables."""

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from textwrap import fill
from typing import TYPE_CHECKING, Any

from slsgu_cli.cli.app import Name, Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.figures.numbers import roughly
from slsgu_cli.records.options import ReportRequest
from slsgu_cli.records.verification import Check, VerifiedModel, VerifyRequest

if TYPE_CHECKING:
    from slsgu_cli.verification.verdicts import VerdictRow
    from slsgu_cli.verification.verify import Verified

Cells = list[tuple[Any, ...]]

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


def _verdicts(
    console: Console, verdicts: "Sequence[tuple[VerifiedModel, VerdictRow]]", *, several: bool
) -> None:

    shown = [(subject, row) for subject, row in verdicts if not (console.brief and row.detail)]
    sets = sorted({name for _, row in shown for name in row.utility_after or {}})
    columns = [
        Column("check"),
        Column("variant"),
        Column("model", on_terminal=several),
        Column("original FA@1", shown=roughly, label="FA@1\noriginal"),
        Column("FA@1", shown=roughly, label="FA@1\nnow"),
        Column("original FA@5", on_terminal=False),
        Column("FA@5", shown=roughly, label="FA@5\nnow"),
        Column("control FA@1", shown=roughly, label="FA@1\ncontrol"),
        *(
            Column(f"{side}TA@1 {name}", on_terminal=False, of=("utility", name, f"{side}TA@1"))
            for name in sets
            for side in ("original ", "")
        ),
        Column("TA change", shown=lambda value: f"{value:+.1f}", label="TA@1\nchange"),
        Column("verdict"),
        *(
            Column(name, on_terminal=False)
            for name in ("original control", "added", "added from", "added to", "note")
        ),
    ]
    cells: Cells = [
        (
            row.check,
            row.variant,
            subject.label,
            row.before.top1,
            row.after.top1,
            row.before.top5,
            row.after.top5,
            row.control.top1 if row.control else None,
            *(
                side[name].top1 if side and name in side else None
                for name in sets
                for side in row.utilities
            ),
            row.utility_change,
            row.verdict,
            *_added(row),
            row.note,
        )
        for subject, row in shown
    ]
    title = "does it stay forgotten? FA on the concept, TA on everything else"
    console.table("verification", columns, cells, title=title)


def _added(row: "VerdictRow") -> tuple[float | None, ...]:
    """Return the original's control, and the difference to the control with its interval."""
    if row.original_control is None or row.added is None:
        return None, None, None, None
    return row.original_control.top1, row.added.points, row.added.low, row.added.high


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
    cells: Cells = [
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
    cells: Cells = []
    for subject in others:
        known = losses(original, subject)
        kinds = [("nearest name", rows[:most]) for rows in nearest_names(known).values()]
        kinds.append(("lost most", most_harmed(known)[:most]))
        cells += [
            (
                what,
                row.evaluation,
                row.name,
                subject.label,
                row.cosine,
                row.rows,
                row.before,
                row.after,
                row.after - row.before,
            )
            for what, rows in kinds
            for row in rows
        ]
    columns = [
        Column("what"),
        Column("set"),
        Column("class"),
        Column("model", on_terminal=len(others) > 1),
        Column("cosine", shown=lambda value: f"{value:.2f}"),
        Column("rows"),
        Column("original TA@1", shown=roughly, label="TA@1\noriginal"),
        Column("TA@1", shown=roughly, label="TA@1\nnow"),
        Column("change", shown=lambda value: f"{value:+.1f}"),
    ]
    title = f"losses of other classes; those that lost most have at least {LEAST_ROWS} images"
    if cells:
        console.table("classes", columns, cells, title=title)


def _classifiers(
    console: Console, original: VerifiedModel, others: Sequence[VerifiedModel]
) -> None:
    """Print how well classifiers on image features find the concept."""
    from slsgu_cli.verification.checks.probe import score_pairs

    cells: Cells = [
        (
            now.classifier,
            now.subject,
            subject.label,
            now.images,
            was.accuracy,
            now.accuracy,
            was.recall,
            now.recall,
            now.rows,
            now.others,
        )
        for subject in others
        for was, now in score_pairs(original, subject)
    ]
    columns = [
        Column("classifier"),
        Column("looks for"),
        Column("model", on_terminal=len(others) > 1),
        Column("images"),
        Column("original accuracy", shown=roughly, label="accuracy\noriginal"),
        Column("accuracy", shown=roughly, label="\nnow"),
        Column("original recall", shown=roughly, label="recall\noriginal"),
        Column("recall", shown=roughly, label="\nnow"),
        Column("rows", on_terminal=False),
        Column("others", on_terminal=False),
    ]
    title = "classifiers on image features; recall at 1% false positives"
    if cells:
        console.table("classifiers", columns, cells, title=title)


def _retrieved(console: Console, original: VerifiedModel, others: Sequence[VerifiedModel]) -> None:
    """Print retrieval by its images and its name, and how far an index moved."""
    from slsgu_cli.verification.checks.retrieval import retrievals

    pairs = [(s, found) for s in others if (found := retrievals(original, s)) is not None]
    if not pairs:
        return
    several = len(others) > 1
    cells: Cells = [
        (
            now.query,
            now.index,
            subject.label,
            was.precision,
            now.precision,
            was.recall1,
            now.recall1,
            now.recall5,
            now.recall10,
            now.queries,
            now.gallery,
        )
        for subject, (before, after) in pairs
        for was, now in zip(before.queries, after.queries, strict=True)
    ]
    columns = [
        Column("query"),
        Column("index"),
        Column("model", on_terminal=several),
        Column("original mAP", shown=roughly, label="mAP\noriginal"),
        Column("mAP", shown=roughly, label="\nnow"),
        Column("original recall@1", shown=roughly, label="R@1\noriginal"),
        Column("recall@1", shown=roughly, label="\nnow"),
        Column("recall@5", on_terminal=False),
        Column("recall@10", shown=roughly, label="R@10\nnow"),
        Column("queries", on_terminal=False),
        Column("gallery", on_terminal=False),
    ]
    console.table("retrieval", columns, cells, title="retrieval of its images among all others")
    moved: Cells = [
        (
            side.images,
            subject.label,
            side.rows,
            100 * side.identical / side.rows,
            100 * side.far / side.rows,
            side.mean,
            side.largest,
        )
        for subject, (_, after) in pairs
        for side in after.shifts
    ]
    columns = [
        Column("features of"),
        Column("model", on_terminal=several),
        Column("rows"),
        Column("identical", shown=roughly),
        Column("moved", shown=roughly, label="moved by\n> 0.01"),
        Column("mean", shown=lambda value: f"{value:.4f}", label="mean\nmove"),
        Column("largest", shown=lambda value: f"{value:.4f}", label="largest\nmove"),
    ]
    console.table("index", columns, moved, title="how far an image index moved, as 1 - cosine")


def _membership(console: Console, original: VerifiedModel, others: Sequence[VerifiedModel]) -> None:
    from slsgu_cli.verification.checks.membership import exposure

    before = original.finding(Check.MEMBERSHIP)
    if before is None:
        return
    findings = [(subject, subject.finding(Check.MEMBERSHIP)) for subject in others]
    cells: Cells = [
        (
            now.figure,
            now.against,
            subject.label,
            was.mean,
            was.deviation,
            now.mean,
            now.deviation,
            now.members,
            now.others,
            exposure(was, now),
        )
        for subject, after in findings
        for was, now in zip(before.membership, after.membership if after else (), strict=True)
    ]
    columns = [
        Column("figure"),
        Column("against"),
        Column("model", on_terminal=len(others) > 1),
        Column("original mean", label="mean\noriginal", shown=roughly),
        Column("original sd", shown=lambda value: f"{value:.1f}", label="\nsd"),
        Column("mean", label="\nmean", shown=roughly),
        Column("sd", shown=lambda value: f"{value:.1f}", label="\nsd"),
        Column("members", on_terminal=False),
        Column("others", on_terminal=False),
        Column("verdict"),
    ]
    title = "membership inference: accuracy of separating the forget set from other pairs"
    console.table("membership", columns, cells, title=title)


def _attempts(console: Console, subjects: Sequence[VerifiedModel]) -> None:
    """Print the texts that attacks found or learnt; in a brief table, only the best of each."""

    cells: Cells = [
        (
            finding.check,
            subject.label,
            attempt.name,
            attempt.text,
            attempt.loss,
            attempt.forget.top1,
            attempt.forget.top5,
        )
        for subject in subjects
        for finding in subject.findings
        for attempt in finding.attempts
        if not console.brief or attempt == finding.best(attempt.name)
    ]
    columns = (
        "check",
        "model",
        "looked for",
        "text",
        Column("loss", on_terminal=False),
        Column("FA@1", shown=roughly),
        Column("FA@5", shown=roughly),
    )
    if cells:
        title = "texts found in place of the name, and their accuracy"
        console.table("attempts", columns, cells, title=title)


def _curves(console: Console, subjects: Sequence[VerifiedModel]) -> None:
    cells: Cells = [
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
    """The original model is compared with --model, with each --edit, or else with the set's edit.

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
