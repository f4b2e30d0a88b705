"""The state of each request: open, forgotten within its bounds, out of bounds or withdrawn."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from datetime import UTC, datetime

from slsgu_cli import Artifact
from slsgu_cli.records.ledger import BoundCheck, LedgerRow, RequestState, StageKind
from slsgu_cli.removals.job import Job
from slsgu_cli.removals.recipe import figure_of


def enter(job: Job) -> None:
    """Enter new requests in the ledger as open, and missing ones as withdrawn."""
    rows = []
    for name in job.recipe.names:
        row = job.row(name)
        is_new = not row.events or row.state is RequestState.WITHDRAWN
        rows.append(row.with_event(_today(), RequestState.OPEN, {}) if is_new else row)
    for row in _withdrawn(job):
        if row.state is not RequestState.WITHDRAWN:
            rows.append(row.with_event(_today(), RequestState.WITHDRAWN, {}))
    job.save(job.ledger.with_rows(rows))


def settle(job: Job) -> None:
    """Check the bounds of each request, and enter its state with digests of the outputs."""
    outputs = {
        each.place: each.output
        for each in job.ledger.stages
        # The evidence shows these digests, so its own cannot be one of them.
        if each.place and each.output and each.kind is not StageKind.EVIDENCE
    }
    rows = []
    for name in job.recipe.names:
        row = job.row(name)
        checks = tuple(_checks(job, row))
        edit = job.record(Artifact.EDIT, name)
        met = all(check.holds for check in checks) if checks else bool(edit.forgotten)
        state = RequestState.FORGOTTEN if met else RequestState.OUT_OF_BOUNDS
        digests = {"edit": job.digest(Artifact.EDIT, name), **outputs}
        rows.append(replace(row, checks=checks).with_event(_today(), state, digests))
    job.save(job.ledger.with_rows(rows))


def current_rows(job: Job, undone: Collection[str]) -> list[LedgerRow]:
    """Return the rows of all requests as they stand now; those of `undone` stages are open."""
    rows = [replace(row, state=RequestState.WITHDRAWN) for row in _withdrawn(job)]
    for name in job.recipe.names:
        row = job.row(name)
        rows.append(replace(row, state=RequestState.OPEN) if name in undone else row)
    return [*job.ledger.with_rows(rows).rows]


def _withdrawn(job: Job) -> list[LedgerRow]:
    return [row for row in job.ledger.rows if row.name not in job.recipe.names]


def _checks(job: Job, row: LedgerRow) -> Iterator[BoundCheck]:
    measured = job.ledger.written.figures if job.ledger.written else {}
    figures = measured | row.attacks
    for bound in job.recipe.bounds_of(job.recipe.request(row.name)):
        value = figures.get(figure_of(bound, row.name))
        yield BoundCheck(str(bound), value, value is not None and bound.holds(value))


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
