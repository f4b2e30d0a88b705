"""Take the samples of many concepts out of many shards, each shard read once.

Every file of the source leaves a tar of what was wanted in it and, last, a record of its
counts. So work that was stopped goes on with the files that have no record. Files are
read by a process a core; image bytes are taken of wanted samples only, and none decoded.
"""

import io
import json
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import fsspec

from slsgu_cli import progress
from slsgu_cli.clip.inputs import cores
from slsgu_cli.records.sets import CollectRequest, Origin
from slsgu_cli.sets.metadata import retain_wanted
from slsgu_cli.sources.captions import ConceptIndex, matcher
from slsgu_cli.sources.opening import open_sources
from slsgu_cli.sources.rows import (
    Columns,
    Reader,
    Row,
    caption_of,
    label_words,
    priority,
    tokenizable,
)
from slsgu_cli.sources.tar import ORIGIN_FILE, ORIGIN_ROW, TarSource
from slsgu_cli.store.store import Store

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


def open_shards(request: CollectRequest) -> list[Reader]:
    """Return the readers of all files of the request's sources."""
    columns = Columns(
        image=request.image_column, caption=request.caption_column, needs=frozenset(["caption"])
    )
    return open_sources(request.sources, columns)


def collect_shards(
    store: Store, folder: str, request: CollectRequest, readers: Sequence[Reader]
) -> list[tuple[str, ShardCounts]]:
    """Return for every file of the sources the tar of its samples, and its counts.

    Rows to retain are all of the first files in a seeded order that suffice, as the paper
    takes them from one shard.
    """
    order = sorted(
        range(len(readers)),
        key=lambda number: priority(request.seed, f"{readers[number].path}\0{number}"),
    )
    counts: dict[int, ShardCounts] = {}
    left = list(order)
    with progress.bar("reading shards", len(readers)) as ticker:
        while left and sum(c.retain for c in counts.values()) < retain_wanted(request):
            number = left.pop(0)
            counts[number] = _collect(_task(store, folder, readers, request, number, retain=True))
            ticker.advance()
        tasks = [_task(store, folder, readers, request, n, retain=False) for n in sorted(left)]
        for number, result in zip(sorted(left), _spread(tasks), strict=True):
            counts[number] = result
            ticker.advance()
    return [(_name(number), counts[number]) for number in sorted(counts)]


def _name(number: int) -> str:
    return f"{number:05}"


def _task(
    store: Store,
    folder: str,
    readers: Sequence[Reader],
    request: CollectRequest,
    number: int,
    *,
    retain: bool,
) -> _Task:
    name = _name(number)
    tar, record = f"{folder}/parts/{name}.tar", f"{folder}/met/{name}.json"
    return _Task(store.url, tar, record, readers[number], request, retain)


def _spread(tasks: Sequence[_Task]) -> Iterator[ShardCounts]:
    """Yield the tasks' results in order, on all cores where there is work for them."""
    workers = min(cores(), len(tasks))
    if workers < 2:
        yield from map(_collect, tasks)
        return
    # Forking would copy threads' locks in whatever state they are.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_ignore_interrupts)
    try:
        yield from pool.map(_collect, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the process that waits for this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collect(task: _Task) -> ShardCounts:
    store = Store(task.store)
    if store.exists(task.record):
        return store.read_record(task.record, ShardCounts)
    sorter = _Sorter(ConceptIndex(task.request.concepts, task.request.regex), task)
    trouble: Counter[str] = Counter()
    with (
        store.writing(task.tar) as partial,
        fsspec.open(partial, "wb") as raw,
        tarfile.open(fileobj=raw, mode="w") as tar,
    ):
        for row, image in select(task.reader, sorter.wants, trouble):
            _write(tar, task.reader, row, image, sorter.roles[row.index])
    counts = sorter.counts(trouble)
    store.write_record(task.record, counts)
    return counts


def select(
    reader: Reader, wants: Callable[[Row], bool], trouble: Counter[str]
) -> Iterator[tuple[Row, bytes | None]]:
    """Yield the wanted rows with their encoded images; a tar shard is read only once."""
    if isinstance(reader, TarSource):
        yield from reader.select(wants, trouble)
        return
    rows = {row.index: row for row in reader.rows(trouble) if wants(row)}
    for index, data in reader.images(dict.fromkeys(rows)) if rows else ():
        yield rows[index], data


class _Sorter:
    """Decides which rows of one file are wanted, and counts."""

    def __init__(self, index: ConceptIndex, task: _Task) -> None:
        self.roles: dict[int, str] = {}
        self._index = index
        self._task = task
        self._left_out = matcher(task.request.retain_exclude, regex=task.request.regex)
        self._samples: Counter[str] = Counter()
        self._excluded: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._examples: list[str] = []
        self._seen = self._retain = 0

    def wants(self, row: Row) -> bool:
        """Return whether the row is about a concept, or to be retained."""
        self._seen += 1
        caption = tokenizable(caption_of(self._task.reader, row) or "")
        if not caption:
            self._refused["no caption"] += 1
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
            self._retain += 1
        return row.index in self.roles

    def counts(self, trouble: Counter[str]) -> ShardCounts:
        """Return the counts of the whole file."""
        return ShardCounts(
            self._seen,
            dict(sorted(self._samples.items())),
            dict(sorted(self._excluded.items())),
            self._retain,
            dict(sorted((self._refused + trouble).items())),
            self._examples,
        )


def _write(tar: tarfile.TarFile, reader: Reader, row: Row, image: bytes | None, role: str) -> None:
    """Add a sample, with its place in the source among its fields."""
    origin = row.origin or Origin(reader.path, row.index)
    caption = row.caption or label_words(row.label or "")
    fields: dict[str, object] = {"caption": caption, "role": role, "source_key": row.key}
    fields |= {ORIGIN_FILE: origin.file, ORIGIN_ROW: origin.row, "url": origin.url}
    members = {"json": json.dumps(fields).encode()}
    if image is not None:
        members = {IMAGE: image, **members}
    for suffix, data in members.items():
        member = tarfile.TarInfo(f"{row.index:09}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
