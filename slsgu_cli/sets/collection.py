"""Collections: the samples that metadata or shards hold of some concepts, brought together.

A collection is a folder of tar shards in the store, with a record. It is addressed by what
it was asked for and by the files it was taken from, so that asking again finds it, whole
or as far as it came.

Of shards, every file leaves a tar of what was wanted in it and, last, a record of its
counts. So work that was stopped goes on with the files that have no record. Files are
read by a process a core; image bytes are taken of wanted samples only, and none decoded.
"""

import io
import json
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from slsgu_cli import __version__, progress
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.machine import cores
from slsgu_cli.records.codec import digest, encode
from slsgu_cli.records.sets import Collection, CollectRequest, ConceptCounts, Origin
from slsgu_cli.sets.metadata import (
    BEYOND,
    EXCLUDED,
    Hit,
    Refused,
    Scan,
    download,
    finished,
    reason,
    retain_wanted,
    scan_metadata,
)
from slsgu_cli.sources.captions import ConceptIndex, matcher
from slsgu_cli.sources.opening import expand, open_sources, parse_source
from slsgu_cli.sources.rows import (
    Columns,
    Reader,
    Row,
    caption_of,
    file_identity,
    first_met,
    label_words,
    line_for,
    priority,
    tokenizable,
)
from slsgu_cli.sources.tar import ORIGIN_FILE, ORIGIN_ROW
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Collected:
    """A collection and the folder of its shards, as a path in the store."""

    record: Collection
    folder: str


def collect(store: Store, request: CollectRequest) -> Collected:
    """Bring the samples together that `request` asks for, or find them brought together.

    Raises UsageError, MissingError or InputError; what was done by then is kept, and the
    next call goes on from there.
    """
    if bool(request.metadata) == bool(request.sources):
        raise UsageError("a collection is made from --metadata or from --source, not from both")
    files = [path for text in request.metadata for path in expand(parse_source(text))]
    columns = Columns(
        image=request.image_column, caption=request.caption_column, needs=frozenset(["caption"])
    )
    readers = open_sources(request.sources, columns)
    identities = [file_identity(path) for path in files] + [r.identity() for r in readers]
    recipe = encode(request)
    del recipe["download"]
    address = digest({"format": FORMAT, "files": identities, **recipe})
    folder, record = Artifact.COLLECTION.beside(address), Artifact.COLLECTION.path(address)
    parts = f"{folder}/parts"
    if store.exists(record):
        progress.note(f"the samples of {len(identities)} files were collected before: {folder}")
        return Collected(store.read_record(record, Collection), parts)
    if request.metadata:
        collection = _from_metadata(store, folder, request, files)
    else:
        collection = _from_shards(store, folder, request, readers)
    digests = {shard: store.file_digest(f"{parts}/{shard}") for shard in collection.shards()}
    collection = replace(collection, digests=digests)
    store.write_record(record, collection)
    return Collected(collection, parts)


def _from_metadata(
    store: Store, folder: str, request: CollectRequest, files: Sequence[str]
) -> Collection:
    index = ConceptIndex(request.concepts, request.regex)
    scan = scan_metadata(files, request, index)
    hits, refused = _once(scan)
    hits = _limited(hits, request, refused)
    retain = scan.retain[: retain_wanted(request)]
    matches = Counter(number for hit in hits for number in hit.concepts)
    progress.note(f"{len(hits)} of {scan.seen} captions match; {len(retain)} more rows are drawn")
    fetched, retained = [Fetched() for _ in request.concepts], Fetched()
    if hits:
        rows, parts = [*hits, *retain], f"{folder}/parts"
        urls = _write_urls(store, folder, rows)
        download(store, parts, urls=urls, rows=len(rows), options=request.download)
        by_origin = {(hit.file, hit.row): [fetched[n] for n in hit.concepts] for hit in hits}
        by_origin |= {(hit.file, hit.row): [retained] for hit in retain}
        _count_fetched(store, parts, by_origin)
    return Collection(
        sources=request.metadata,
        files=len(files),
        seen=scan.seen,
        refused={"no caption": scan.no_caption} if scan.no_caption else {},
        concepts={
            concept.name: fetched[number].counts(matches[number], _reasons(refused, number))
            for number, concept in enumerate(request.concepts)
        },
        retain=retained.counts(len(retain), {}),
        examples=tuple(scan.examples),
        version=__version__,
    )


def _from_shards(
    store: Store, folder: str, request: CollectRequest, readers: Sequence[Reader]
) -> Collection:
    shards = collect_shards(store, folder, request, readers)
    refused = sum((Counter(counts.refused) for counts in shards), Counter[str]())
    concepts = {}
    for concept in request.concepts:
        found = [counts.found.get(concept.name, 0) for counts in shards]
        excluded = sum(counts.excluded.get(concept.name, 0) for counts in shards)
        left_out = {EXCLUDED: excluded} if excluded else {}
        concepts[concept.name] = ConceptCounts(sum(found), left_out, _tars(found))
    retain = [counts.retain for counts in shards]
    return Collection(
        sources=request.sources,
        files=len(readers),
        seen=sum(counts.seen for counts in shards),
        refused=dict(sorted(refused.items())),
        concepts=concepts,
        retain=ConceptCounts(sum(retain), {}, _tars(retain)),
        examples=tuple(text for counts in shards for text in counts.examples)[:3],
        version=__version__,
    )


def _tars(counts: Sequence[int]) -> tuple[str, ...]:
    """Return the tars of those files that rows were wanted of."""
    return tuple(f"{number:05}.tar" for number, count in enumerate(counts) if count)


@dataclass(slots=True)
class Fetched:
    """What a download brought of one concept, or of the rows to retain: shards and failures."""

    shards: set[str] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)

    def counts(self, found: int, refused: dict[str, int]) -> ConceptCounts:
        """Return the counts of `found` rows, of which some were refused before the download."""
        all_refused = refused | dict(sorted(self.refused.items()))
        return ConceptCounts(found, all_refused, tuple(sorted(self.shards)))


def _once(scan: Scan) -> tuple[list[Hit], Refused]:
    """Return each URL with its caption once, and what was left out, by concept."""
    refused = Counter(scan.refused)
    first: dict[tuple[str, str], Hit] = {}
    for hit in scan.hits:
        if first.setdefault((hit.url, hit.caption), hit) is not hit:
            refused.update((number, "duplicate") for number in hit.concepts)
    return list(first.values()), refused


def _limited(hits: Sequence[Hit], request: CollectRequest, refused: Refused) -> list[Hit]:
    """Return the hits that can come to be drawn where a concept has a limit of rows."""
    if request.max_forget is None:
        return list(hits)
    left = dict.fromkeys(range(len(request.concepts)), line_for(request.max_forget))
    order = sorted(hits, key=lambda hit: priority(request.seed, first_met(hit.file, hit.row)))
    kept = set()
    for hit in order:
        if any(left[number] > 0 for number in hit.concepts):
            kept.add((hit.file, hit.row))
            for number in hit.concepts:
                left[number] -= 1
        else:
            refused.update((number, BEYOND) for number in hit.concepts)
    return [hit for hit in hits if (hit.file, hit.row) in kept]


def _write_urls(store: Store, folder: str, hits: Sequence[Hit]) -> str:
    """Write what is to be downloaded; return the file's whole path."""
    table = pa.table(
        {
            "url": [hit.url for hit in hits],
            "caption": [hit.caption for hit in hits],
            "role": [FORGET if hit.concepts else RETAIN for hit in hits],
            ORIGIN_FILE: [hit.file for hit in hits],
            ORIGIN_ROW: [hit.row for hit in hits],
        }
    )
    path = f"{folder}/urls.parquet"
    with store.writing(path) as partial, fsspec.open(partial, "wb") as file:
        pq.write_table(table, file)
    return store.where(path)


def _count_fetched(
    store: Store, parts: str, by_origin: Mapping[tuple[str, int], Sequence[Fetched]]
) -> None:
    """Count what became of every URL, by the tables beside the shards."""
    columns = [ORIGIN_FILE, ORIGIN_ROW, "status", "error_message"]
    for shard in finished(store, parts):
        table = store.where(f"{parts}/{shard.removesuffix('.tar')}.parquet")
        try:
            with fsspec.open(table, "rb") as file:
                rows = pq.read_table(file, columns=columns).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"cannot read {table}, which img2dataset wrote: {error}",
                hint=f"remove {shard.removesuffix('.tar')}* beside it and run this again",
            ) from error
        for row in rows:
            for fetched in by_origin.get((row[ORIGIN_FILE], row[ORIGIN_ROW]), ()):
                if row["status"] == "success":
                    fetched.shards.add(shard)
                else:
                    fetched.refused[reason(row["error_message"])] += 1


def _reasons(refused: Refused, concept: int) -> dict[str, int]:
    """Return the counts of one concept, by reason."""
    return {why: count for (number, why), count in sorted(refused.items()) if number == concept}


FORGET, RETAIN = "forget", "retain"

# Of whatever format: what an image is, its first bytes say.
IMAGE = "img"


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """What one file held: samples wanted by concept, rows to retain, what was left out."""

    seen: int
    found: dict[str, int]
    excluded: dict[str, int]
    retain: int
    refused: dict[str, int]
    examples: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Task:
    """One file of the source: what to take out of it, and where that goes."""

    store: str
    tar: str
    record: str
    reader: Reader
    request: CollectRequest
    retain: bool


def collect_shards(
    store: Store, folder: str, request: CollectRequest, readers: Sequence[Reader]
) -> list[ShardCounts]:
    """Take the samples of every file of the sources into a tar, and return the files' counts.

    Rows to retain are all of the first files in a seeded order that suffice, as the paper
    takes them from one shard.
    """

    def task(number: int, *, retain: bool) -> _Task:
        tar, record = f"{folder}/parts/{number:05}.tar", f"{folder}/met/{number:05}.json"
        return _Task(store.url, tar, record, readers[number], request, retain)

    numbers = range(len(readers))
    left = sorted(numbers, key=lambda n: priority(request.seed, f"{readers[n].path}\0{n}"))
    counts: dict[int, ShardCounts] = {}
    with progress.bar("reading shards", len(readers)) as ticker:
        while left and sum(c.retain for c in counts.values()) < retain_wanted(request):
            number = left.pop(0)
            counts[number] = _collect(task(number, retain=True))
            ticker.advance()
        left.sort()
        tasks = [task(number, retain=False) for number in left]
        for number, result in zip(left, _spread(tasks), strict=True):
            counts[number] = result
            ticker.advance()
    return [counts[number] for number in numbers]


def _spread(tasks: Sequence[_Task]) -> Iterator[ShardCounts]:
    """Yield the tasks' results in order, on all cores where there is work for them."""
    workers = min(cores(), len(tasks))
    if workers < 2:
        yield from map(_collect, tasks)
        return
    # Forking would copy threads' locks in whatever state they are. Ctrl-C is left to this process.
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )
    try:
        yield from pool.map(_collect, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(task: _Task) -> ShardCounts:
    store = Store(task.store)
    if store.exists(task.record):
        return store.read_record(task.record, ShardCounts)
    sorter = _Sorter(task)
    with (
        store.writing(task.tar) as partial,
        fsspec.open(partial, "wb") as raw,
        tarfile.open(fileobj=raw, mode="w") as tar,
    ):
        for row, image in task.reader.select(sorter.wants, sorter.refused):
            _write(tar, task.reader, row, image, sorter.roles[row.index])
    counts = sorter.counts()
    store.write_record(task.record, counts)
    return counts


class _Sorter:
    """Decides which rows of one file are wanted, and counts."""

    def __init__(self, task: _Task) -> None:
        self.roles: dict[int, str] = {}
        self.refused: Counter[str] = Counter()
        self._index = ConceptIndex(task.request.concepts, task.request.regex)
        self._task = task
        self._left_out = matcher(task.request.retain_exclude, regex=task.request.regex)
        self._samples: Counter[str] = Counter()
        self._excluded: Counter[str] = Counter()
        self._examples: list[str] = []
        self._seen = 0

    def wants(self, row: Row) -> bool:
        """Return whether the row is about a concept, or to be retained."""
        self._seen += 1
        caption = tokenizable(caption_of(self._task.reader, row) or "")
        if not caption:
            self.refused["no caption"] += 1
            return False
        if len(self._examples) < 3:
            self._examples.append(caption)
        about = self._index.about(caption)
        wanted = [number for number in about if not self._index.excluded(number, caption)]
        names = [concept.name for concept in self._index.concepts]
        self._samples.update(names[number] for number in wanted)
        self._excluded.update(names[number] for number in about if number not in wanted)
        if wanted:
            self.roles[row.index] = FORGET
        elif self._task.retain and not self._index.touched(caption) | self._left_out(caption):
            self.roles[row.index] = RETAIN
        return row.index in self.roles

    def counts(self) -> ShardCounts:
        """Return the counts of the whole file."""
        return ShardCounts(
            self._seen,
            dict(sorted(self._samples.items())),
            dict(sorted(self._excluded.items())),
            sum(role == RETAIN for role in self.roles.values()),
            dict(sorted(self.refused.items())),
            self._examples,
        )


def _write(tar: tarfile.TarFile, reader: Reader, row: Row, image: bytes | None, role: str) -> None:
    """Add a sample, with its place in the source among its fields."""
    origin = row.origin or Origin(reader.path, row.index)
    caption = row.caption or label_words(row.label or "")
    fields: dict[str, object] = {"caption": caption, "role": role, "source_key": row.key}
    fields |= {ORIGIN_FILE: origin.file, ORIGIN_ROW: origin.row, "url": origin.url}
    members = {} if image is None else {IMAGE: image}
    members["json"] = json.dumps(fields).encode()
    for suffix, data in members.items():
        member = tarfile.TarInfo(f"{row.index:09}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
