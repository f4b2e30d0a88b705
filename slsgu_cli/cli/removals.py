"""`init`, `run`, `requests` and `evidence`: removal jobs, and their results as tables."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, astuple
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.formats import brief_state
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.figures.numbers import percent, roughly
from slsgu_cli.records.option_fields import OUTPUT, Option
from slsgu_cli.removals.recipe import EvidenceRequest

if TYPE_CHECKING:
    from slsgu_cli.records.ledger import LedgerRow
    from slsgu_cli.removals.planning import PlannedStage
    from slsgu_cli.removals.running import RunEvent, RunResult

RecipeFile = Annotated[Path, Option(metavar="RECIPE", help="Recipe, a TOML file.")]


@command("init")
def init(
    session: Session,
    path: Annotated[Path, Option(metavar="FILE", help="Recipe to write.")] = Path("recipe.toml"),
    demo: Annotated[
        bool, Option(("--demo",), "Write a recipe for three brands and the embedded CLIP.", OUTPUT)
    ] = False,
    overwrite: Annotated[bool, Option(("--overwrite",), "Replace FILE.", OUTPUT)] = False,
) -> None:
    """Example: slsgu init brands.toml --demo && slsgu run brands.toml"""
    from slsgu_cli.removals.template import recipe_text
    from slsgu_cli.store.atomic import replacing, require_regular

    require_regular(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already", hint="another FILE, or --overwrite")
    with replacing(path) as partial:
        partial.write_text(recipe_text(path, demo=demo), encoding="utf-8")
    session.console.paths("files", [str(path)])
    session.console.note(f"now: slsgu run {shlex.quote(str(path))} --plan")


@command("run")
def run(
    session: Session,
    recipe: RecipeFile,
    plan: Annotated[
        bool, Option(("--plan",), "Show which stages are done and which remain.", OUTPUT)
    ] = False,
    json_lines: Annotated[
        bool, Option(("--json-lines",), "Print one JSON event per line.", OUTPUT)
    ] = False,
) -> None:
    """Run the command again to resume after an interruption, or after you changed the recipe.
    Only stages whose options or inputs changed run again. The exit code is 5 if a bound does not
    hold.

    Example: slsgu run brands.toml --plan
    """
    from slsgu_cli.removals import planning, running
    from slsgu_cli.removals.job import Job

    console = session.console
    console.streams = json_lines
    if json_lines and (console.as_json or plan):
        raise UsageError(
            "--json-lines cannot be combined with --json or --plan", hint="leave one of them out"
        )
    if plan:
        show_plan(console, planning.plan(Job(recipe, session.store)))
        return

    def on_event(event: "RunEvent") -> None:
        if json_lines:
            console.value("event", json.dumps(asdict(event)))

    result = running.run(recipe, store=session.store, on_event=on_event)
    if json_lines:
        bounds = [{"request": row.name, **asdict(c)} for row in result.rows for c in row.checks]
        last = {"event": "result", "figures": result.figures, "bounds": bounds}
        console.value("event", json.dumps(last))
    else:
        show_run(console, result)
    running.require_met(result)


@command("requests")
def requests(session: Session, recipe: RecipeFile) -> None:
    """Example: slsgu requests brands.toml --json"""
    from slsgu_cli.removals.job import Job
    from slsgu_cli.removals.planning import request_rows

    show_requests(session.console, request_rows(Job(recipe, session.store)))


@command("evidence")
def evidence(session: Session, request: EvidenceRequest) -> None:
    """Writes a printable page, its content as JSON, the report, digests of the written models,
    the edits, and contact sheets.

    Example: slsgu evidence all --recipe brands.toml --out evidence
    """
    from slsgu_cli.removals.evidence import write_evidence
    from slsgu_cli.removals.job import Job

    console = session.console
    content = write_evidence(Job(request.recipe, session.store), request)
    columns = (
        Column("request", itemgetter("request")),
        Column("state", itemgetter("state"), shown=brief_state),
        Column("edit", itemgetter("edit in model"), label="its edit"),
        Column("verification", lambda each: "run" if each["verification"] else "not run"),
        Column("FA@1 before", lambda each: each["figures"][0]["before"], on_terminal=False),
        Column(
            "FA@1 after",
            lambda each: each["figures"][0]["after"],
            shown=roughly,
            label="FA@1 now",
        ),
    )
    rows = content["requests"]
    console.table("evidence", columns, rows, title=f"evidence: {request.out}")
    for model in content["models"]:
        for trouble in model["troubles"]:
            console.warn(trouble)
    console.paths("files", [str(request.out)])


def show_plan(console: Console, planned: "Sequence[PlannedStage]") -> None:
    """Print all stages of a recipe: which are done, which have to run and why."""
    columns = (
        Column("stage", "stage.kind"),
        Column("requests", lambda each: ",".join(each.stage.names), on_terminal=False),
        Column("for", "stage.about"),
        Column(
            "state",
            lambda each: "cannot" if each.trouble else "to do" if each.reason else "done",
        ),
        Column("seconds", shown=lambda s: f"{s:.0f}" if s else "", label="~ s"),
        Column("why", lambda each: each.trouble or each.reason),
    )
    to_do = [each for each in planned if each.reason]
    title = f"{len(planned) - len(to_do)} of {len(planned)} stages are done"
    console.table("plan", columns, planned, title=title)
    if seconds := sum(each.seconds or 0.0 for each in to_do):
        console.note(f"estimate from earlier runs in this store: {seconds:.0f} s")


def show_run(console: Console, result: "RunResult") -> None:
    """Print the figures, bounds and requests of a recipe after a run."""
    original = result.ledger.original.figures if result.ledger.original else {}
    rows = [
        (name, original[name], value, round(value - original[name], 6))
        for name, value in result.figures.items()
        if name not in ("fa1", "fa5") and not name.startswith("loss.")
    ]
    columns = (
        Column("figure"),
        *(Column(name, shown=percent) for name in ("original", "now", "change")),
    )
    console.table("figures", columns, rows, title="figures on test images")
    checks = [
        (row.name, check.bound, check.figure, "holds" if check.holds else "fails")
        for row in result.rows
        for check in row.checks
    ]
    if checks:
        head = ("request", "bound", Column("figure", shown=percent), "result")
        console.table("bounds", head, checks, title="bounds")
    show_requests(console, result.ledger.rows)
    places = astuple(result.recipe.outputs)
    if result.done or console.as_json:
        console.paths("files", [str(place) for place in places if place is not None])
    else:
        console.note("everything was done already")


def show_requests(console: Console, rows: "Sequence[LedgerRow]") -> None:
    """Print the requests of a ledger with their states."""
    columns = (
        Column("request", "name"),
        "id",
        "received",
        "reference",
        Column("state", shown=brief_state),
        Column("since", lambda row: row.events[-1].day if row.events else None),
        Column("layer", shown=known_as),
        Column("FA@1 before", lambda row: row.before and row.before.top1, on_terminal=False),
        Column(
            "FA@1 after",
            lambda row: row.after and row.after.top1,
            shown=roughly,
            label="FA@1 now",
        ),
        Column(
            "edit",
            lambda row: row.events[-1].digests.get("edit") if row.events else None,
            on_terminal=False,
        ),
        Column("note", on_terminal=False),
    )
    console.table("requests", columns, rows, title="requests", data=list(rows))
