"""A job: a recipe with its store, its ledger and the records that its stages read."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import slsgu_cli as slsgu
from slsgu_cli import Artifact, Store
from slsgu_cli.records.codec import digest, encode
from slsgu_cli.records.ledger import BoundCheck, Ledger, LedgerRow, RequestState, StageKind
from slsgu_cli.removals.reading import read_recipe
from slsgu_cli.removals.recipe import Recipe, figure_of

# Options that do not change results.
SPEED = ("device", "memory_budget", "cache_budget")
# Fields of a request that its row in the ledger repeats.
FIELDS_OF_ROW = ("name", "concept", "id", "received", "reference", "note")


class NotYetError(Exception):
    """An artifact that a stage reads is not in the store yet."""


class Job:
    """A recipe with its store and its ledger.

    `identities` are those of the source files, each read once.
    """

    def __init__(self, recipe: Recipe | str | Path, store: Store | str) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe))
        self.store = Store(store) if isinstance(store, str) else store
        self.path = Artifact.LEDGER.path(self.recipe.name)
        self.identities: dict[Any, Any] = {}
        self.load()

    def load(self) -> None:
        """Read the ledger, or begin an empty one."""
        self.catalog = slsgu.Catalog(self.store)
        if self.store.exists(self.path):
            self.ledger: Ledger = self.store.read_record(self.path, Ledger)
        else:
            name, model = self.recipe.name, self.recipe.model
            self.ledger = Ledger(name, model, (), (), slsgu.__version__)

    def save(self, ledger: Ledger) -> None:
        """Write the ledger."""
        self.ledger = ledger
        self.store.write_record(self.path, ledger)

    @cached_property
    def weights(self) -> str:
        """The fingerprint of the original model. Raises InputError, MissingError."""
        return slsgu.fingerprint(slsgu.resolve(self.recipe.model))

    def record(self, kind: Artifact, name: str) -> Any:
        """Return a record of the store. Raises NotYetError."""
        record = self.catalog.get(kind, name)
        if record is None:
            raise NotYetError(kind.called(name))
        return record

    def digest(self, kind: Artifact, name: str) -> str:
        """Return the digest of a record of the store. Raises NotYetError."""
        self.record(kind, name)
        return self.catalog.digest(kind, name)

    def edits(self, names: Sequence[str]) -> str:
        """Return a digest of the edits of these requests. Raises NotYetError."""
        return digest({name: self.digest(Artifact.EDIT, name) for name in names})

    def evaluation_rows(self, names: Sequence[str]) -> str:
        """Return a digest of the evaluation sets of these requests. Raises NotYetError."""
        return digest([self.record(Artifact.SET, name).evaluation_blocks() for name in names])

    def measured_inputs(self, names: Sequence[str]) -> dict[str, str]:
        """Return digests of the written model and of the evaluation sets. Raises NotYetError."""
        key = (StageKind.CHECKPOINT, (), str(self.recipe.outputs.checkpoint))
        written = self.ledger.stage(key)
        return {
            "edits": self.edits(self.recipe.names),
            "weights": self.weights,
            "evaluation rows": self.evaluation_rows(names),
            "checkpoint": written.output if written else "",
        }

    def row(self, name: str) -> LedgerRow:
        """Return the ledger's row of a request, with its fields as the recipe has them now."""
        request = self.recipe.request(name)
        fields = {key: getattr(request, key) for key in FIELDS_OF_ROW}
        known = self.ledger.row(name)
        return replace(known, **fields) if known else LedgerRow(**fields)

    def enter(self) -> None:
        """Enter new requests in the ledger as open, and missing ones as withdrawn."""
        rows = []
        for name in self.recipe.names:
            row = self.row(name)
            is_new = not row.events or row.state is RequestState.WITHDRAWN
            rows.append(row.with_event(_today(), RequestState.OPEN, {}) if is_new else row)
        for row in self._withdrawn():
            if row.state is not RequestState.WITHDRAWN:
                rows.append(row.with_event(_today(), RequestState.WITHDRAWN, {}))
        self.save(self.ledger.with_rows(rows))

    def settle(self) -> None:
        """Check the bounds of each request, and enter its state with digests of the outputs."""
        outputs = {
            each.place: each.output
            for each in self.ledger.stages
            # The evidence shows these digests, so its own cannot be one of them.
            if each.place and each.output and each.kind is not StageKind.EVIDENCE
        }
        rows = []
        for name in self.recipe.names:
            row = self.row(name)
            checks = tuple(self._checks(row))
            edit = self.record(Artifact.EDIT, name)
            met = all(check.holds for check in checks) if checks else bool(edit.forgotten)
            state = RequestState.FORGOTTEN if met else RequestState.OUT_OF_BOUNDS
            digests = {"edit": self.digest(Artifact.EDIT, name), **outputs}
            rows.append(replace(row, checks=checks).with_event(_today(), state, digests))
        self.save(self.ledger.with_rows(rows))

    def current_rows(self, undone: Collection[str]) -> list[LedgerRow]:
        """Return the rows of all requests as they stand now; those of `undone` stages are open."""
        rows = [replace(row, state=RequestState.WITHDRAWN) for row in self._withdrawn()]
        for name in self.recipe.names:
            row = self.row(name)
            rows.append(replace(row, state=RequestState.OPEN) if name in undone else row)
        return [*self.ledger.with_rows(rows).rows]

    def _withdrawn(self) -> list[LedgerRow]:
        return [row for row in self.ledger.rows if row.name not in self.recipe.names]

    def _checks(self, row: LedgerRow) -> Iterator[BoundCheck]:
        measured = self.ledger.written.figures if self.ledger.written else {}
        figures = measured | row.verified
        for bound in self.recipe.bounds_of(self.recipe.request(row.name)):
            value = figures.get(figure_of(bound, row.name))
            yield BoundCheck(str(bound), value, value is not None and bound.holds(value))


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def options_digest(record: Any) -> str:
    """Return a digest of the options that change results."""
    options = encode(record)
    return digest({key: value for key, value in options.items() if key not in SPEED})
