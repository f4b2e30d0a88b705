"""A job: a recipe with its store, its ledger and the records that its stages read."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import slsgu_cli as slsgu
from slsgu_cli import Artifact, Catalog, Store
from slsgu_cli.records.codec import digest, encode
from slsgu_cli.records.ledger import Ledger, LedgerRow, StageKind
from slsgu_cli.removals.reading import read_recipe
from slsgu_cli.removals.recipe import Recipe

# Options that do not change results.
SPEED = ("device", "memory_budget", "cache_budget")
# Fields of a request that its row in the ledger repeats.
FIELDS_OF_ROW = ("name", "concept", "id", "received", "reference", "note")


class NotYetError(Exception):
    """An artifact that a stage reads is not in the store yet."""


class Job:
    """A recipe with its store and its ledger."""

    def __init__(self, recipe: Recipe | str | Path, store: Store | str) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe))
        self.store = Store(store) if isinstance(store, str) else store
        self.path = Artifact.LEDGER.path(self.recipe.name)
        # The identities of source files that were read before, while a plan is made.
        self.identities: dict[Any, Any] | None = None
        self.load()

    def load(self) -> None:
        """Read the ledger, or begin an empty one."""
        self.catalog = Catalog(self.store)
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

    @cached_property
    def device(self) -> str:
        """The name of the device that stages run on."""
        return slsgu.device_name(slsgu.pick_device(self.recipe.search.device))

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

    def checkpoint(self) -> str:
        """Return the digest of the written checkpoint; empty if there is none."""
        key = (StageKind.CHECKPOINT, (), str(self.recipe.outputs.checkpoint))
        record = self.ledger.stage(key)
        return record.output if record else ""

    def row(self, name: str) -> LedgerRow:
        """Return the ledger's row of a request, with its fields as the recipe has them now."""
        request = self.recipe.request(name)
        fields = {key: getattr(request, key) for key in FIELDS_OF_ROW}
        known = self.ledger.row(name)
        return replace(known, **fields) if known else LedgerRow(**fields)


def options_digest(record: Any) -> str:
    """Return a digest of the options that change results."""
    options = encode(record)
    return digest({key: value for key, value in options.items() if key not in SPEED})
