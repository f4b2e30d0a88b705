"""Find damaged and unused artifacts in a store, and remove those that are safe to remove.

`ls` reads records and headers; a check reads everything and compares it with its digests. An
artifact that a command can make again may be removed; the others stay until the user asks.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from slsgu_cli import progress
from slsgu_cli.errors import InputError, MissingError, SlsguError
from slsgu_cli.records.sets import ModelSpec, SetManifest
from slsgu_cli.sources.grammar import expand, parse_source
from slsgu_cli.store.artifacts import FOLDERS, TABLE, TENSORS, Artifact, verify
from slsgu_cli.store.atomic import UNFINISHED, writer_lives
from slsgu_cli.store.catalog import Catalog, Entry, Standing, entries
from slsgu_cli.store.locks import FOLDER, holder
from slsgu_cli.store.store import Store
from slsgu_cli.text import near

# A write whose process cannot be identified counts as abandoned after this time without a change.
ABANDONED_SECONDS = 3600.0
UNDER_WAY = "a write in progress"
# The sums of an unfinished pass are removable after a week.
RESUMABLE_SECONDS = 7 * 86400.0
REPAIR = "slsgu check --repair"
BLOCK, PICTURE = TABLE[Artifact.DATA].suffix, TABLE[Artifact.PLOT].suffix
# The kinds of files outside a store by their suffix; others are JSON.
KINDS = {TENSORS: Artifact.EDIT, BLOCK: Artifact.DATA, PICTURE: Artifact.PLOT}

# Artifacts that commands make again from a set and its model. A user's choices (sets, edits), the
# work of many commands (sweeps) and remote things (shards, other models) are not among them.
RECOMPUTABLE = (
    Artifact.POINTER,
    Artifact.GRADIENT,
    Artifact.SQUARES,
    Artifact.COVARIANCE,
    Artifact.FEATURES,
    Artifact.RANKING,
    Artifact.TRIALS,
    Artifact.TRAJECTORY,
    Artifact.COMPARISON,
    Artifact.VERIFICATION,
    Artifact.JOINT,
)

# Whether a model exists, with the weights of this fingerprint (None for any weights).
HasModel = Callable[[ModelSpec, str | None], bool]


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem in a store: where, how large, why, and the command that fixes it.

    `removable` things may be removed without asking: they are unused, or a command makes them
    again.
    """

    state: Standing
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
    run = _Check(store, has_model, irreplaceable=irreplaceable)
    chosen, files = run.chosen(names)
    findings = [finding for file in files for finding in _of_file(file)]
    with progress.bar("checking", len(chosen)) as ticker:
        for entry in chosen:
            findings += run.of_entry(entry)
            ticker.advance()
    if not names:
        findings += [*run.foreign(), *run.locks()]
    if repair:
        removed = remove(store, [finding for finding in findings if finding.removable])
        findings = [*(finding for finding in findings if not finding.removable), *removed]
    order = list(Standing)
    findings.sort(key=lambda finding: (order.index(finding.state), finding.path))
    size = sum(entry.size for entry in (*chosen, *files))
    return Checked(len(chosen) + len(files), size, tuple(findings))


def garbage(store: Store) -> list[Finding]:
    """Return unreferenced data, gradients, covariances and squares, and abandoned writes.

    While another process writes, recent files may be part of its work and are left out.
    Raises InputError where a record cannot be read, because its references are unknown.
    """
    run = _Check(store, lambda _model, _fingerprint: False)
    if unread := run.catalog.unread():
        raise InputError(
            f"{store.where(unread[0])} is damaged, so what it refers to is unknown",
            hint="run `slsgu check`",
        )
    findings = [finding for entry in run.entries for finding in run.unused(entry)]
    findings += run.locks()
    busy = any(finding.reason.startswith(UNDER_WAY) for finding in findings)
    since = time.time() - ABANDONED_SECONDS
    return [
        finding
        for finding in findings
        if finding.removable and not (busy and _last_change(store, finding.path) > since)
    ]


def remove(store: Store, findings: Sequence[Finding]) -> list[Finding]:
    """Remove findings from a store; return them as removed."""
    for finding in findings:
        store.remove(finding.path)
    return [replace(finding, removed=True) for finding in findings]


class _Check:
    """One pass over a store: its records, and the damage found so far."""

    def __init__(self, store: Store, has_model: HasModel, *, irreplaceable: bool = False) -> None:
        self.store = store
        self.catalog = Catalog(store)
        self.entries = entries(store, self.catalog)
        self._irreplaceable = irreplaceable
        self._damaged: set[str] = set()
        self._has_model = cache(has_model)

    def chosen(self, names: Sequence[str]) -> tuple[list[Entry], list[Entry]]:
        """Return the entries that belong to `names` (default: all), and files outside the store."""
        if not names:
            return self.entries, []
        chosen: set[str] = set()
        files: list[Entry] = []
        for name in names:
            paths = {entry.path for entry in self.entries if self._belongs(entry, name)}
            if not paths and Path(name).exists():
                kind = KINDS.get(Path(name).suffix, Artifact.RANKING)
                size = Store(str(Path(name).parent)).size(Path(name).name)
                files.append(Entry(kind, Path(name).name, name, size, {}))
            elif not paths:
                known = sorted({*Artifact.SET.names(self.store), *Artifact.EDIT.names(self.store)})
                raise MissingError(
                    f"{self.store.url} has no set or edit {name}, and there is no such file",
                    hint=near(name, known) or f"it has {', '.join(known[:10]) or 'none'}",
                )
            chosen |= paths
        return [entry for entry in self.entries if entry.path in chosen], files

    def _belongs(self, entry: Entry, name: str) -> bool:
        """Return whether an entry has this name or path, or belongs to the set of this name."""
        if name in (entry.path, entry.name) or entry.kind is Artifact.UNFINISHED:
            return name in (entry.path, entry.name)
        if self.store.where(entry.path) == str(Path(name).absolute()):
            return True
        if entry.kind is Artifact.PLOT:
            return entry.name.startswith(f"{name}-")
        return name in self.catalog.owners(entry.kind, entry.name)

    def of_entry(self, entry: Entry) -> Iterator[Finding]:
        """Read all of an entry, and yield its problems."""
        if entry.kind is Artifact.UNFINISHED:
            yield self._of_unfinished(entry)
            return
        if entry.state is Standing.FOREIGN:
            yield _finding(entry)
            return
        try:
            verify(self.store, entry.kind, entry.path)
            self._verify_folder(entry)
        except SlsguError as error:
            self._damaged.add(entry.path)
            damaged = replace(entry, state=Standing.DAMAGED, reason=_reason(error))
            removable = self._irreplaceable or self._is_recomputable(entry)
            maker = self.catalog.maker(entry.kind, entry.name)
            yield _finding(damaged, maker, removable=removable)
            return
        if entry.state is Standing.UNREFERENCED:
            yield _finding(entry, "slsgu gc")
        elif entry.state is not Standing.OK:
            yield _finding(entry, self.catalog.maker(entry.kind, entry.name))

    def unused(self, entry: Entry) -> Iterator[Finding]:
        """Yield an entry if nothing refers to it, without reading it."""
        if entry.kind is Artifact.UNFINISHED:
            yield self._of_unfinished(entry)
        elif entry.state is Standing.UNREFERENCED:
            yield _finding(entry, removable=True)

    def foreign(self) -> Iterator[Finding]:
        """Yield files in the artifact folders that are not artifacts; hidden files are skipped."""
        known = {entry.path for entry in self.entries}
        folders = [kind for kind, row in TABLE.items() if row.has_folder]
        known |= {kind.folder_of(name) for kind in folders for name in kind.names(self.store)}
        for folder in FOLDERS:
            for name in self.store.names(folder):
                path = f"{folder}/{name}"
                if path not in known and not name.startswith("."):
                    size = self.store.size(path)
                    yield Finding(Standing.FOREIGN, None, name, path, size, "no artifact")

    def locks(self) -> Iterator[Finding]:
        """Yield the locks of processes that compute something, and those that dead ones left."""
        for name in self.store.names(FOLDER) if self.store.is_local else ():
            path = f"{FOLDER}/{name}"
            by = holder(Path(self.store.where(path)))
            reason = f"{UNDER_WAY}: {by}" if by else "the process that held this lock has ended"
            mend = None if by else REPAIR
            yield Finding(Standing.UNFINISHED, None, name, path, 0, reason, mend, not by)

    def _verify_folder(self, entry: Entry) -> None:
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
        """Return an incomplete write or pass, removable if it is abandoned."""
        name = entry.path.rpartition("/")[2]
        age = time.time() - _last_change(self.store, entry.path)
        unfinished = replace(entry, state=Standing.UNFINISHED)
        if name.startswith(UNFINISHED) or name.endswith(BLOCK):
            lives = writer_lives(name)
            if lives or (lives is None and age < ABANDONED_SECONDS):
                return _finding(replace(unfinished, reason=UNDER_WAY))
            ended = "the process that wrote it has ended"
            return _finding(replace(unfinished, reason=ended), REPAIR, removable=True)
        if entry.path == Artifact.SUMS.place(entry.name) and age > RESUMABLE_SECONDS:
            old = "it has not changed for a week"
            return _finding(replace(unfinished, reason=old), REPAIR, removable=True)
        return _finding(unfinished)

    def _is_recomputable(self, entry: Entry) -> bool:
        """Return whether a command can make an artifact again, or nothing uses it."""
        if entry.kind is Artifact.PLOT:
            return True
        if entry.kind is not Artifact.DATA and entry.kind not in RECOMPUTABLE:
            return False
        owners = self.catalog.owners(entry.kind, entry.name)
        if not owners:
            return not self.catalog.unread()
        test = self._has_sources if entry.kind is Artifact.DATA else self._can_compute_gradients
        return all(map(test, owners))

    def _can_compute_gradients(self, name: str) -> bool:
        """Return whether `grad` can compute the gradients of a set again."""
        manifest = self.catalog.get(Artifact.SET, name)
        pointer = self.catalog.get(Artifact.POINTER, name)
        if manifest is None or not self._has_model(
            manifest.model, pointer and pointer.model_fingerprint
        ):
            return False
        blocks = (manifest.forget.path, manifest.retain.path)
        lost = [p for p in blocks if p in self._damaged or not self.store.exists(p)]
        return not lost or self._has_sources(name)

    def _has_sources(self, name: str) -> bool:
        """Return whether every source that a set was built from still exists."""
        manifest: SetManifest = self.catalog.get(Artifact.SET, name)
        try:
            texts = {text for ref in manifest.blocks().values() for text in ref.sources}
            return bool(manifest.request) and all(expand(parse_source(each)) for each in texts)
        except SlsguError:
            return False


def _finding(entry: Entry, mend: str | None = None, *, removable: bool = False) -> Finding:
    place = (entry.kind, entry.name, entry.path, entry.size)
    return Finding(entry.state, *place, entry.reason or "", mend, removable)


def _of_file(entry: Entry) -> Iterator[Finding]:
    """Read an artifact outside any store, and yield its problem."""
    path = Path(entry.path)
    try:
        verify(Store(str(path.parent)), entry.kind, path.name)
    except SlsguError as error:
        place = (None, entry.name, entry.path, entry.size)
        yield Finding(Standing.DAMAGED, *place, _reason(error))


def _reason(damage: SlsguError) -> str:
    """Return why something is damaged, without its path, which is printed separately."""
    return damage.message.rpartition(" is damaged: ")[2]


def _last_change(store: Store, path: str) -> float:
    """Return when something was last written; now if it has just been removed."""
    try:
        return store.changed(path)
    except SlsguError:
        return time.time()
