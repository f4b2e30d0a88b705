"""The ledger of a removal job: stages that ran, and the state of each request."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from slsgu_cli.records.figures import Accuracy, PassTime
from slsgu_cli.records.sets import LOCAL, ModelSpec


class StageKind(StrEnum):
    """The kinds of stages, in the order of a run."""

    SET = "build-sets"
    GRADIENTS = "grad"
    RANKING = "rank"
    SEARCH = "search"
    CHECKPOINT = "apply"
    TARGET = "apply --target"
    EDITS = "edits"
    LORA = "export"
    FIGURES = "eval"
    VERIFICATION = "verify"
    REPORT = "report"
    EVIDENCE = "evidence"


# Identifies a stage between runs: its kind, its requests or else the place of its output.
StageKey = tuple[StageKind, tuple[str, ...], str | None]


@dataclass(frozen=True, slots=True)
class StageRecord:
    """A stage that ran: its requests, its inputs, and a digest of its output.

    `inputs` are digests of its options and of everything it read. `output` is empty from the
    moment an output file is begun until it is complete. A copy of a target model names its
    `origin`.
    """

    kind: StageKind
    names: tuple[str, ...]
    place: str | None
    inputs: dict[str, str]
    output: str
    took: PassTime
    origin: str | None

    @property
    def key(self) -> StageKey:
        """The identity of the stage. An output keeps its identity when requests change."""
        return self.kind, () if self.place else self.names, self.place


class RequestState(StrEnum):
    """The state of a removal request."""

    OPEN = "open"
    FORGOTTEN = "forgotten within bounds"
    OUT_OF_BOUNDS = "out of bounds"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """A change of a request's state, with digests of its edit and of all outputs that day."""

    day: str
    state: RequestState
    digests: dict[str, str]


@dataclass(frozen=True, slots=True)
class BoundCheck:
    """A bound and the figure it limits.

    `figure` is None if a check could not run on the model. Such a bound does not hold.
    """

    bound: str
    figure: float | None
    holds: bool


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """A request, in the recipe or withdrawn from it.

    `before` and `after` are the accuracy of the original and of the written model on the
    concept. `verified` has the figures of checks that bounds may name, such as
    `attack.prefix`.
    """

    name: str
    concept: str
    id: str | None
    received: str | None
    reference: str | None
    note: str | None
    state: RequestState = RequestState.OPEN
    events: tuple[RequestEvent, ...] = ()
    layer: str | None = None
    before: Accuracy | None = None
    after: Accuracy | None = None
    verified: dict[str, float] = field(default_factory=dict)
    checks: tuple[BoundCheck, ...] = ()

    def with_event(self, day: str, state: RequestState, digests: dict[str, str]) -> "LedgerRow":
        """Return the row with a new event, unless the last event is the same."""
        last = self.events[-1] if self.events else None
        if last is not None and (last.state, last.digests) == (state, digests):
            return replace(self, state=state)
        event = RequestEvent(day, state, digests)
        return replace(self, state=state, events=(*self.events, event))


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """One model of the last evaluation: figures as bounds name them, utility by evaluation set."""

    figures: dict[str, float]
    utility: dict[str, Accuracy]


@dataclass(frozen=True, slots=True)
class Ledger:
    """The record of a recipe's runs: stages, requests, and the last evaluation."""

    name: str
    model: ModelSpec
    stages: tuple[StageRecord, ...]
    rows: tuple[LedgerRow, ...]
    version: str
    original: MeasuredModel | None = None
    written: MeasuredModel | None = None

    def stage(self, key: StageKey) -> StageRecord | None:
        """Return the record of a stage; None if it never ran."""
        return next((each for each in self.stages if each.key == key), None)

    def row(self, name: str) -> LedgerRow | None:
        """Return the row of a request; None if there never was one."""
        return next((each for each in self.rows if each.name == name), None)

    def with_stage(self, record: StageRecord) -> "Ledger":
        """Return the ledger with this record in place of an earlier one of the stage."""
        others = tuple(each for each in self.stages if each.key != record.key)
        return replace(self, stages=(*others, record))

    def with_rows(self, rows: Iterable[LedgerRow]) -> "Ledger":
        """Return the ledger with these rows in place of earlier ones, sorted by name."""
        by_name = {row.name: row for row in (*self.rows, *rows)}
        return replace(self, rows=tuple(by_name[name] for name in sorted(by_name)))


def written_at(model: ModelSpec, place: Path) -> ModelSpec:
    """Return how to load a written copy of a model: from a folder, or from a weights file."""
    return ModelSpec(model.name, str(place)) if place.is_file() else ModelSpec(f"{LOCAL}{place}")
