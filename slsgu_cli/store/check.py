"""Find damaged and unused artifacts in a store, and remove those that are safe to remove.

`ls` reads records and headers; a check reads everything and compares it with its digests. An
artifact that a command can make again may be removed; the others stay until the user asks.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path

from slsgu_cli import progress
from slsgu_cli.errors import ForeignError, InputError, MissingError, SlsguError, StaleError
from slsgu_cli.records.method import GradientPointer
from slsgu_cli.records.sets import ModelSpec, SetManifest
from slsgu_cli.sources.grammar import expand, parse_source
from slsgu_cli.store.artifacts import FOLDERS, TABLE, TENSORS, Artifact, set_of, verify
from slsgu_cli.store.atomic import UNFINISHED, writer_lives
from slsgu_cli.store.catalog import Catalog, Entry, Standing, entries
from slsgu_cli.store.locks import FOLDER, holder
from slsgu_cli.store.store import Store
from slsgu_cli.text import near

# A write whose process cannot be identified counts as abandoned after this time without a change.
ABANDONED_SECONDS = 3600.0
UNDER_WAY = "a write in progress"

# The sums of an unfinished pass are removable after this time.
FORGOTTEN_SECONDS = 7 * 86400.0
# The artifacts that sums become, and what a finding says once they exist.
MADE_OF_SUMS = {Artifact.GRADIENT: "its gradient is", Artifact.COVARIANCE: "its covariances are"}
REPAIR = "slsgu check --repair"
BLOCK, PICTURE = TABLE[Artifact.DATA].suffix, TABLE[Artifact.PLOT].suffix

# Whether a model exists, with the weights of this fingerprint (None for any weights).
HasModel = Callable[[ModelSpec, str | None], bool]


class State(StrEnum):
    """What may be wrong with something in a store, worst first."""

    DAMAGED = "damaged"
    FOREIGN = "foreign"
    STALE = "stale"
    UNFINISHED = "unfinished"
    UNREFERENCED = "unreferenced"


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem in a store: where, how large, why, and the command that fixes it.

    `removable` things may be removed without asking: they are unused, or a command makes them
    again.
    """

    state: State
    kind: Artifact | None
    name: str
    path: str
    size: int
    reason: str
    mend: str | None = None
    removable: bool = False
    removed: bool = False


@dataclass(frozen=True, slots=True)
class Checked:
    """How many artifacts and bytes were read, and the problems found, worst first."""

    artifacts: int
    size: int
    findings: tuple[Finding, ...]


def check(
    store: Store,
    names: Sequence[str] = (),
    *,
    repair: bool = False,
    irreplaceable: bool = False,
    has_model: HasModel = lambda _model, _fingerprint: False,
) -> Checked:
    """Read all of a store, or only what belongs to the sets, edits and files of `names`.

    `repair` removes damaged artifacts that a command makes again, and leftovers of dead processes;
    `irreplaceable` also removes damaged artifacts that no command makes. Raises
    MissingError for a name that is not there, and InputError where something cannot be removed.
    """
    run = _Check(store, has_model)
    chosen, outside = run.chosen(names)
    found = [finding for path in outside if (finding := _of_file(path)) is not None]
    with progress.bar("checking", len(chosen)) as ticker:
        for entry in chosen:
            found += run.of_entry(entry)
            ticker.advance()
    if not names:
        found += [*run.foreign(), *run.locks()]
    if repair:
        found = [run.repaired(finding, irreplaceable=irreplaceable) for finding in found]
    order = list(State)
    found.sort(key=lambda finding: (order.index(finding.state), finding.path))
    size = sum(entry.size for entry in chosen) + sum(_file_size(path) for path in outside)
    return Checked(len(chosen) + len(outside), size, tuple(found))


def garbage(store: Store) -> list[Finding]:
    """Return unreferenced data, gradients, covariances and squares, and abandoned writes.

    While another process writes, recent files may be part of its work and are left out.
    Raises InputError where a record cannot be read, because its references are unknown.
    """
    run = _Check(store, lambda _model, _fingerprint: False)
    for kind in (Artifact.SET, Artifact.POINTER):
        if unread := sorted(set(run.catalog.all(kind)) - set(run.catalog.readable(kind))):
            raise InputError(
                f"cannot tell what {store.where(kind.path(unread[0]))} refers to: it is damaged",
                hint="run `slsgu check`",
            )
    found = [finding for entry in run.entries for finding in run.unused(entry)]
    found += run.locks()
    busy = any(finding.reason.startswith(UNDER_WAY) for finding in found)
    since = time.time() - ABANDONED_SECONDS
    return [
        finding
        for finding in found
        if finding.removable and not (busy and _last_change(store, finding.path) > since)
    ]


def remove(store: Store, findings: Sequence[Finding]) -> list[Finding]:
    """Remove findings from a store; return them as removed."""
    for finding in findings:
        store.remove(finding.path)
    return [replace(finding, removed=True) for finding in findings]


class _Check:
    """One pass over a store: its records, and the damage found so far."""

    def __init__(self, store: Store, has_model: HasModel) -> None:
        self.store = store
        self.catalog = Catalog(store)
        self.entries = entries(store, self.catalog)
        self._sets: dict[str, SetManifest] = self.catalog.readable(Artifact.SET)
        self._pointers: dict[str, GradientPointer] = self.catalog.readable(Artifact.POINTER)
        self._damaged: set[str] = set()
        self._has_model = cache(has_model)

    def chosen(self, names: Sequence[str]) -> tuple[list[Entry], list[Path]]:
        """Return the entries that belong to `names` (default: all), and files outside the store."""
        if not names:
            return self.entries, []
        chosen: set[str] = set()
        outside: list[Path] = []
        for name in names:
            paths = {entry.path for entry in self.entries if self._belongs(entry, name)}
            if not paths and Path(name).exists():
                outside.append(Path(name))
            elif not paths:
                known = sorted({*Artifact.SET.names(self.store), *Artifact.EDIT.names(self.store)})
                raise MissingError(
                    f"{self.store.url} has no set or edit {name}, and there is no such file",
                    hint=near(name, known) or f"it has {', '.join(known[:10]) or 'none'}",
                )
            chosen |= paths
        return [entry for entry in self.entries if entry.path in chosen], outside

    def _belongs(self, entry: Entry, name: str) -> bool:
        """Return whether an entry has this name or path, or belongs to the set of this name."""
        if entry.path == name or self.store.where(entry.path) == str(Path(name).absolute()):
            return True
        if name in (entry.name, set_of(entry.name)) or name in entry.name.split("+"):
            return True
        if entry.kind is Artifact.PLOT:
            return entry.name.startswith(f"{name}-")
        is_known = name in self._sets or name in self._pointers
        return is_known and self.catalog.is_of(entry.kind, entry.name, name)

    def of_entry(self, entry: Entry) -> Iterator[Finding]:
        """Read all of an entry, and yield its problems."""
        error = self._unreadable(entry)
        if isinstance(error, ForeignError | StaleError):
            yield _finding(entry, State.FOREIGN, error.message)
            return
        if entry.kind is Artifact.UNFINISHED:
            yield self._of_unfinished(entry)
            return
        try:
            if error is not None:
                raise error
            verify(self.store, entry.kind, entry.path)
            self._read_folder(entry)
        except SlsguError as damage:
            self._damaged.add(entry.path)
            again = self._is_made_again(entry)
            maker = self.catalog.maker(entry.kind, entry.name)
            yield _finding(entry, State.DAMAGED, _why(damage), maker, removable=again)
            return
        if entry.state is not Standing.OK:
            is_unused = entry.state is Standing.UNREFERENCED
            mend = "slsgu gc" if is_unused else self.catalog.maker(entry.kind, entry.name)
            yield _finding(entry, State(entry.state), entry.reason, mend)

    def unused(self, entry: Entry) -> Iterator[Finding]:
        """Yield an entry if nothing refers to it, damaged or not, without reading it."""
        if entry.kind is Artifact.UNFINISHED:
            yield self._of_unfinished(entry)
            return
        kinds = (Artifact.DATA, Artifact.GRADIENT, Artifact.SQUARES)
        is_unused = entry.state is Standing.UNREFERENCED
        if entry.state is Standing.DAMAGED and entry.kind in kinds:
            is_unused = not self.catalog.users(entry.kind, entry.name)
        if is_unused:
            yield _finding(entry, State.UNREFERENCED, entry.reason, removable=True)

    def repaired(self, finding: Finding, *, irreplaceable: bool) -> Finding:
        """Return a finding, removed if it may be."""
        unreadable = finding.state is State.DAMAGED and finding.path in self._damaged
        if not (finding.removable or (irreplaceable and unreadable)):
            return finding
        return remove(self.store, [finding])[0]

    def foreign(self) -> Iterator[Finding]:
        """Yield files in the artifact folders that are not artifacts; hidden files are skipped."""
        known = {entry.path for entry in self.entries}
        for folder in FOLDERS:
            works = [kind for kind, row in TABLE.items() if row.folder == folder and row.has_folder]
            known |= {kind.folder_of(name) for kind in works for name in kind.names(self.store)}
            for name in self.store.names(folder):
                path = f"{folder}/{name}"
                if path in known or name.startswith("."):
                    continue
                under_way = bool(works) and not Path(name).suffix
                state = State.UNFINISHED if under_way else State.FOREIGN
                reason = "it belongs to an unfinished artifact" if under_way else "no artifact"
                yield Finding(state, None, name, path, self.store.size(path), reason)

    def locks(self) -> Iterator[Finding]:
        """Yield the locks of processes that compute something, and those that dead ones left."""
        for name in self.store.names(FOLDER) if self.store.is_local else ():
            path = f"{FOLDER}/{name}"
            by = holder(Path(self.store.where(path)))
            reason = f"{UNDER_WAY}: {by}" if by else "the process that held this lock has ended"
            mend = None if by else REPAIR
            yield Finding(State.UNFINISHED, None, name, path, 0, reason, mend, not by)

    def _unreadable(self, entry: Entry) -> SlsguError | None:
        """Return the error that the catalog met in reading an entry."""
        if entry.kind is Artifact.DATA:
            return InputError(entry.reason or "") if entry.state is Standing.DAMAGED else None
        if entry.kind not in TABLE or not TABLE[entry.kind].record_name:
            return None
        record = self.catalog.read(entry.kind, entry.name)
        return record if isinstance(record, SlsguError) else None

    def _read_folder(self, entry: Entry) -> None:
        """Read the pictures in the folder of a record; compare those that have a digest."""
        folder = entry.kind.folder_of(entry.name)
        if entry.kind is Artifact.GENERATION:
            generation = self.catalog.read(entry.kind, entry.name)
            for name, known in sorted(generation.digests.items()):
                self.store.require_digest(f"{folder}/{name}", known)
        for name in self.store.names(folder) if TABLE[entry.kind].has_folder else ():
            if name.endswith(PICTURE):
                verify(self.store, Artifact.PLOT, f"{folder}/{name}")

    def _of_unfinished(self, entry: Entry) -> Finding:
        """Return an incomplete write, removable if its process is dead."""
        name = entry.path.rpartition("/")[2]
        arriving = entry.path == Artifact.DATA.place(Path(name).stem)
        if not (arriving or name.startswith(UNFINISHED)):
            return self._of_sums(entry)
        lives = writer_lives(name)
        if lives is None:
            lives = _last_change(self.store, entry.path) > time.time() - ABANDONED_SECONDS
        if lives:
            return _finding(entry, State.UNFINISHED, UNDER_WAY)
        gone = "the process that wrote it has ended"
        return _finding(entry, State.UNFINISHED, gone, REPAIR, removable=True)

    def _of_sums(self, entry: Entry) -> Finding:
        """Return work that the same command resumes, removable if it is done or abandoned."""
        found = _finding(entry, State.UNFINISHED, entry.reason)
        if entry.path != Artifact.SUMS.place(entry.name):
            return found
        old = _last_change(self.store, entry.path) < time.time() - FORGOTTEN_SECONDS
        made = [kind for kind in MADE_OF_SUMS if self.store.exists(kind.place(entry.name))]
        header = self.catalog.get(Artifact.SUMS, entry.name)
        if header and header.squares and not self.store.exists(Artifact.SQUARES.place(entry.name)):
            # The gradient may have existed before; these sums will become its squares.
            made = []
        if entry.state is Standing.DAMAGED:
            return replace(found, mend=REPAIR, removable=True)
        if not (made or old):
            return found
        why = f"{MADE_OF_SUMS[made[0]]} complete" if made else "it has not changed for a week"
        return replace(found, reason=why, mend=REPAIR, removable=True)

    def _is_made_again(self, entry: Entry) -> bool:
        """Return whether a command can make an artifact again from what still exists.

        A user's choices (sets, edits), the work of many commands (sweeps) and remote things
        (shards, other models) cannot be made again, so they are never removed without asking.
        """
        kind, name = entry.kind, entry.name
        match kind:
            case Artifact.DATA:
                users = self.catalog.users(kind, name)
                return any(self._has_sources(self._sets[user]) for user in users)
            case Artifact.GRADIENT | Artifact.SQUARES:
                return any(map(self._is_graded_again, self.catalog.users(kind, name)))
            case Artifact.COVARIANCE | Artifact.FEATURES:
                return bool(self._pointers) and all(map(self._is_graded_again, self._pointers))
            case Artifact.POINTER:
                manifest = self._sets.get(name)
                return manifest is not None and self._has_model(manifest.model, None)
            case Artifact.RANKING | Artifact.TRIALS | Artifact.TRAJECTORY | Artifact.COMPARISON:
                return self._is_graded_again(name)
            case Artifact.VERIFICATION:
                return bool(self.catalog.get(Artifact.EDIT, name)) and self._is_graded_again(name)
            case Artifact.JOINT:
                return all(map(self._is_graded_again, name.split("+")))
        return kind is Artifact.PLOT

    def _is_graded_again(self, name: str) -> bool:
        """Return whether `grad` can compute the same gradients of a set again."""
        pointer, manifest = self._pointers.get(name), self._sets.get(name)
        if pointer is None or manifest is None:
            return False
        blocks = (manifest.forget.path, manifest.retain.path)
        lost = [p for p in blocks if p in self._damaged or not self.store.exists(p)]
        has_rows = not lost or self._has_sources(manifest)
        return has_rows and self._has_model(pointer.model, pointer.model_fingerprint)

    def _has_sources(self, manifest: SetManifest) -> bool:
        """Return whether every source that a set was built from still exists."""
        try:
            texts = {text for ref in manifest.blocks().values() for text in ref.sources}
            return bool(manifest.request) and all(expand(parse_source(each)) for each in texts)
        except SlsguError:
            return False


def _finding(
    entry: Entry, state: State, reason: str | None, mend: str | None = None, removable: bool = False
) -> Finding:
    place = (entry.kind, entry.name, entry.path, entry.size)
    return Finding(state, *place, reason or "", mend, removable)


def _of_file(path: Path) -> Finding | None:
    """Return the problem of an artifact outside any store, if it has one."""
    kinds = {TENSORS: Artifact.EDIT, BLOCK: Artifact.DATA, PICTURE: Artifact.PLOT}
    store, kind = Store(str(path.parent)), kinds.get(path.suffix, Artifact.RANKING)
    size = _file_size(path)
    try:
        verify(store, kind, path.name)
    except SlsguError as error:
        return Finding(State.DAMAGED, None, path.name, str(path), size, _why(error))
    return None


def _why(damage: SlsguError) -> str:
    """Return why something is damaged, without its path, which is printed separately."""
    return damage.message.rpartition(" is damaged: ")[2]


def _file_size(path: Path) -> int:
    return Store(str(path.parent)).size(path.name)


def _last_change(store: Store, path: str) -> float:
    """Return when something was last written; now if it has just been removed."""
    try:
        return store.changed(path)
    except SlsguError:
        return time.time()
