"""List the artifacts of a store, their inputs, and whether they are up to date.

Only records and headers are read: no tensors, no images, and no models. An artifact that
cannot be read is listed with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from slsgu_cli.errors import (
    ForeignError,
    FormatError,
    InputError,
    MissingError,
    SlsguError,
    StaleError,
    once,
)
from slsgu_cli.records.codec import digest, parse_json, require_seal
from slsgu_cli.records.method import EditHeader, GradientPointer
from slsgu_cli.records.sets import Collection, SetManifest
from slsgu_cli.records.studies import Sweep
from slsgu_cli.records.verification import Verification
from slsgu_cli.store.artifacts import FOLDERS, SWEPT, TABLE, Artifact, changed, digests_of, set_of
from slsgu_cli.store.store import Store
from slsgu_cli.text import reason_of


class Standing(StrEnum):
    """Whether an artifact can be used as it is; the worst problem first."""

    OK = "ok"
    DAMAGED = "damaged"
    FOREIGN = "foreign"
    STALE = "stale"
    UNFINISHED = "unfinished"
    UNREFERENCED = "unreferenced"


# An artifact's standing, and the reason where it is not ok.
Verdict = tuple[Standing, str | None]
GOOD: Verdict = (Standing.OK, None)
PARTIAL = "a write in progress, or one that a killed process left behind"
RESUMABLE = "unfinished; run the same command to resume it"


class Catalog:
    """The records of a store, each read once, when it is needed."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._records: dict[tuple[Artifact, str], Any] = {}
        self._names: dict[Artifact, list[str]] = {}
        self._blocks: dict[str, dict[str, Any] | SlsguError] = {}

    def read(self, kind: Artifact, name: str) -> Any:
        """Return a record, the error that reading it raised, or None where there is none."""
        if (kind, name) not in self._records:
            row, path = TABLE[kind], kind.place(name)
            reader = self.store.read_record if row.suffix == ".json" else self.store.read_header
            try:
                self._records[kind, name] = reader(path, row.record)
            except FormatError:
                raise
            except MissingError:
                self._records[kind, name] = None
            except SlsguError as error:
                self._records[kind, name] = error
        return self._records[kind, name]

    def get(self, kind: Artifact, name: str) -> Any:
        """Return a record that could be read, else None."""
        record = self.read(kind, name)
        return None if isinstance(record, SlsguError) else record

    def digest(self, kind: Artifact, name: str) -> str:
        """Return the digest of a record that could be read."""
        return digest(self.get(kind, name))

    def block(self, path: str) -> dict[str, Any]:
        """Return the attributes of a block of rows. Raises SlsguError."""
        return once(self._blocks, path, partial(attributes, self.store, path))

    def all(self, kind: Artifact) -> dict[str, Any]:
        """Return every record of a kind by its name, or the error that reading it raised."""
        if kind not in self._names:
            self._names[kind] = kind.names(self.store)
        records = {name: self.read(kind, name) for name in self._names[kind]}
        return {name: record for name, record in records.items() if record is not None}

    def readable(self, kind: Artifact) -> dict[str, Any]:
        """Return every record of a kind that could be read, by its name."""
        return {n: r for n, r in self.all(kind).items() if not isinstance(r, SlsguError)}

    def unread(self) -> list[str]:
        """Return the paths of sets and gradients that cannot be read: what they use is unknown."""
        return [
            kind.place(name)
            for kind in (Artifact.SET, Artifact.POINTER)
            for name in sorted(set(self.all(kind)) - set(self.readable(kind)))
        ]

    def owners(self, kind: Artifact, name: str) -> list[str]:
        """Return the sets that an artifact belongs to.

        A file whose header cannot be read may belong to every set that has gradients.
        """
        if TABLE[kind].made_with is None:
            return [set_of(part) for part in name.split("+")]
        manifests, pointers = self.readable(Artifact.SET), self.readable(Artifact.POINTER)
        if kind is Artifact.DATA:
            path = kind.place(name)
            return [
                n for n, m in manifests.items() if path in [r.path for r in m.blocks().values()]
            ]
        if kind in (Artifact.GRADIENT, Artifact.SQUARES):
            return [n for n, p in pointers.items() if name in (p.forget, p.retain)]
        header = self.get(kind, name)
        if header is None:
            return list(pointers)
        if kind is Artifact.COVARIANCE:
            return [n for n, p in pointers.items() if header.is_of(p)]
        both = [n for n in pointers if n in manifests]
        return [n for n in both if header.is_of(pointers[n], manifests[n])]

    def maker(self, kind: Artifact, name: str) -> str | None:
        """Return the command that makes an artifact, if it is known."""
        made_with = TABLE[kind].made_with
        if made_with is not None:
            owners = self.owners(kind, name)
            squares = " --squares" if kind is Artifact.SQUARES else ""
            return f"{made_with.command_again(owners[0])}{squares}" if owners else None
        if kind is Artifact.SET and self.get(kind, name) is None:
            return kind.command(name)
        return kind.command_again(name)

    def standing(self, kind: Artifact, name: str, record: Any) -> Verdict:
        """Return whether a readable record can be used, and if not, the reason."""
        if kind in FURTHER_CHECKS and (flaw := FURTHER_CHECKS[kind](self, name, record)):
            return flaw
        if kind in UNUSED and not self.owners(kind, name) and not self.unread():
            return Standing.UNREFERENCED, UNUSED[kind]
        needs = TABLE[kind].needs
        needed = needs and self.get(needs, record.name)
        if needs and needed is None:
            verb = "is" if needs is Artifact.SET else "are"
            lacks = f"the {needs.called(record.name)} {verb} not in the store or cannot be read"
            return Standing.STALE, lacks
        if change := kind.changed(record, self._now(kind, record)):
            return Standing.STALE, change.reason
        if needs is Artifact.POINTER:
            state, reason = self.standing(needs, record.name, needed)
            if state is not Standing.OK:
                return Standing.STALE, f"its gradients are {state}: {reason}"
        return GOOD

    def _now(self, kind: Artifact, record: Any) -> dict[str, Any]:
        """Return the current digests of a record's inputs."""
        if not TABLE[kind].digests:
            return {}
        if kind in (Artifact.GENERATION, Artifact.ANSWERS):
            # Edits read from files outside the store cannot be looked up, and need not be.
            edits = [name for name in record.edits if self.get(Artifact.EDIT, name)]
            return {"edits": {name: self.digest(Artifact.EDIT, name) for name in edits}}
        if kind is Artifact.JOINT:
            # With several sets, any difference counts.
            manifests = [self.get(Artifact.SET, name) for name in record.names]
            pointers = {name: self.get(Artifact.POINTER, name) for name in record.names}
            models = {p.model_fingerprint for p in pointers.values() if p}
            evals = [item for m in manifests if m for item in m.measured_on().items()]
            return {
                "gradients": {name: p and p.forget for name, p in pointers.items()},
                "model_fingerprint": min(models - {record.model_fingerprint}, default=None),
                "evals": {name: rows for name, rows in evals if rows != record.evals.get(name)},
            }
        # An edit carries all it needs; without gradients of its name it is not out of date.
        manifest = None if kind is Artifact.EDIT else self.get(Artifact.SET, record.name)
        pointer = None if kind is Artifact.POINTER else self.get(Artifact.POINTER, record.name)
        now = digests_of(manifest, pointer)
        if kind in (Artifact.EDIT, Artifact.TRIALS):
            now["after"] = {
                name: self.get(Artifact.EDIT, name) and self.digest(Artifact.EDIT, name)
                for name in record.after
            }
        return now


def attributes(store: Store, path: str) -> dict[str, Any]:
    """Return the attributes of a block, read without zarr. Raises SlsguError."""
    content = store.read_bytes(f"{path}/zarr.json")
    try:
        said = parse_json(content)["attributes"]
        if said.get("complete") is not True:
            raise ValueError("it is not complete")
        require_seal(said)
        return {"rows": int(said["rows"]), "fingerprint": said["fingerprint"]}
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{store.where(path)} is damaged: {reason_of(error)}") from error


def _missing_shard(catalog: Catalog, name: str, collection: Collection) -> Verdict | None:
    parts = set(catalog.store.names(f"{Artifact.COLLECTION.folder_of(name)}/parts"))
    missing = [shard for shard in collection.shards() if shard not in parts]
    return (Standing.DAMAGED, f"its shard {missing[0]} is missing") if missing else None


def _other_block(catalog: Catalog, _name: str, manifest: SetManifest) -> Verdict | None:
    for role, ref in manifest.blocks().items():
        try:
            fingerprint = catalog.block(ref.path)["fingerprint"]
        except SlsguError as error:
            return Standing.DAMAGED, f"its {role} rows cannot be read: {error.message}"
        if fingerprint != ref.fingerprint:
            return Standing.STALE, f"its {role} rows have been rebuilt since"
    return None


def _missing_gradient(catalog: Catalog, _name: str, pointer: GradientPointer) -> Verdict | None:
    for role, address in (("forget", pointer.forget), ("retain", pointer.retain)):
        if catalog.get(Artifact.GRADIENT, address) is None:
            return Standing.DAMAGED, f"its {role} gradient {address} is missing or damaged"
    return None


def _foreign_layer(catalog: Catalog, _name: str, edit: EditHeader) -> Verdict | None:
    """Return the verdict on an edit of a layer that the model of its gradient does not have."""
    gradient = catalog.get(Artifact.GRADIENT, edit.gradient)
    names = gradient.weights if gradient else ()
    # A q, k or v slice of a fused weight is named after the weight, with a letter at the end.
    if not names or edit.layer in names or edit.layer.rpartition(".")[0] in names:
        return None
    return Standing.DAMAGED, f"it names {edit.layer}, and {edit.model} has no such layer"


def _other_gradient(catalog: Catalog, _name: str, sweep: Sweep) -> Verdict | None:
    for row in sweep.rows:
        pointer = catalog.get(Artifact.POINTER, row.name)
        if pointer is None or changed(SWEPT, row, digests_of(None, pointer)):
            return Standing.STALE, SWEPT["gradient"].format(row.name)
    return None


def _other_edit(catalog: Catalog, name: str, verification: Verification) -> Verdict | None:
    edit = catalog.get(Artifact.EDIT, name)
    edits = [subject.edit for subject in verification.subjects if subject.edit is not None]
    if edit and edits and edit not in edits:
        return Standing.STALE, "the edit has been remade since"
    return None


# Further checks, next to the digests in the table.
FURTHER_CHECKS: dict[Artifact, Callable[[Catalog, str, Any], Verdict | None]] = {
    Artifact.COLLECTION: _missing_shard,
    Artifact.SET: _other_block,
    Artifact.POINTER: _missing_gradient,
    Artifact.SUMS: lambda *_: (Standing.UNFINISHED, RESUMABLE),
    Artifact.EDIT: _foreign_layer,
    Artifact.SWEEP: _other_gradient,
    Artifact.VERIFICATION: _other_edit,
}

# Why an artifact that is named by a digest is unused.
UNUSED = {
    Artifact.DATA: "no set refers to it",
    Artifact.GRADIENT: "no set uses it",
    Artifact.SQUARES: "no set uses it",
    Artifact.COVARIANCE: "no set has gradients of this model and these retain rows",
    Artifact.FEATURES: "no set with gradients of this model is measured on these rows",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One artifact: its path in the store, its size in bytes, its inputs and its state.

    `made_from` describes the inputs by kind; `reason` says why it is not ok.
    """

    kind: Artifact
    name: str
    path: str
    size: int
    made_from: dict[str, str]
    state: Standing = Standing.OK
    reason: str | None = None

    def summary(self) -> str:
        """Return the inputs on one line."""
        return ", ".join(f"{what} {words}" for what, words in self.made_from.items())


def entries(store: Store, catalog: Catalog | None = None) -> list[Entry]:
    """Return every artifact of the store, ordered by kind and name.

    Records are read through `catalog`, if there is one already.
    """
    catalog = catalog or Catalog(store)
    plots = {name: Artifact.PLOT.place(name) for name in Artifact.PLOT.names(store)}
    listed = [*_records(catalog), *_data(catalog), *_unfinished(store)]
    listed += [Entry(Artifact.PLOT, n, path, _size(store, path), {}) for n, path in plots.items()]
    order = list(Artifact)
    return sorted(listed, key=lambda entry: (order.index(entry.kind), entry.name))


def _records(catalog: Catalog) -> Iterator[Entry]:
    """Yield an entry for every artifact that carries a record."""
    for kind, row in TABLE.items():
        for name, record in catalog.all(kind).items() if row.record_name else ():
            path = kind.place(name)
            size = _size(catalog.store, path)
            if row.has_folder:
                size += _size(catalog.store, kind.folder_of(name))
            shown = Artifact.UNFINISHED if kind is Artifact.SUMS else kind
            if isinstance(record, SlsguError):
                foreign = isinstance(record, ForeignError | StaleError)
                state = Standing.FOREIGN if foreign else Standing.DAMAGED
                yield Entry(shown, name, path, size, {}, state, record.message)
                continue
            verdict = catalog.standing(kind, name, record)
            yield Entry(shown, name, path, size, _inputs(record, row.inputs), *verdict)


def _inputs(record: Any, fields: Sequence[str]) -> dict[str, str]:
    values = {name: getattr(record, name) for name in fields}
    for name, value in values.items():
        if isinstance(value, tuple | dict):
            values[name] = ", ".join(map(str, value))
        elif isinstance(value, float):
            values[name] = f"{value:g}"
    return {name.replace("_", " "): str(value) for name, value in values.items() if value}


def _data(catalog: Catalog) -> Iterator[Entry]:
    """Yield an entry for every block of rows."""
    store, kind = catalog.store, Artifact.DATA
    users: dict[str, list[str]] = {}
    for manifest in catalog.readable(Artifact.SET).values():
        for role, ref in manifest.blocks().items():
            users.setdefault(ref.path, []).append(f"{manifest.name} ({role})")
    for name in kind.names(store):
        path = kind.place(name)
        made_from = {"for": ", ".join(users[path])} if path in users else {}
        try:
            made_from = {"rows": str(catalog.block(path)["rows"]), **made_from}
            verdict = catalog.standing(kind, name, None)
        except SlsguError as error:
            if isinstance(error, MissingError) and not store.is_local:
                # A remote block arrives file by file, and the missing file comes last.
                yield _unfinished_entry(store, path, PARTIAL)
                continue
            verdict = Standing.DAMAGED, error.message
        yield Entry(kind, name, path, _size(store, path), made_from, *verdict)


def _unfinished(store: Store) -> Iterator[Entry]:
    for folder in FOLDERS:
        for name in store.unfinished(folder):
            yield _unfinished_entry(store, f"{folder}/{name}", PARTIAL)
    for kind, row in TABLE.items():
        complete = kind.names(store) if row.has_folder else []
        for name in store.names(row.folder) if row.has_folder else ():
            if name not in complete and not Path(name).suffix:
                yield _unfinished_entry(store, f"{row.folder}/{name}", RESUMABLE)


def _unfinished_entry(store: Store, path: str, reason: str) -> Entry:
    name, size = path.partition("/")[2], _size(store, path)
    return Entry(Artifact.UNFINISHED, name, path, size, {}, Standing.UNFINISHED, reason)


def _size(store: Store, path: str) -> int:
    """Return the bytes at `path`; 0 if nothing is there or another process has just removed it."""
    try:
        return store.size(path)
    except OSError:
        return 0
