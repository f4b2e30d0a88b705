"""Collecting samples from many source files, each into a tar of its own.

A record of its counts is written after each tar, so that an interrupted collection resumes
with the files that have no record. Each core reads a file; only the images of selected samples
are read, and none is decoded.
"""

import io
import json
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import fsspec

from slsgu_cli import progress
from slsgu_cli.machine import cores
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import Concept, Origin
from slsgu_cli.sets.sampling import priority
from slsgu_cli.sets.scan import retain_candidates
from slsgu_cli.sources.concept_index import ConceptIndex
from slsgu_cli.sources.matching import matcher
from slsgu_cli.sources.reader import Reader, Row
from slsgu_cli.sources.tar import ORIGIN_FILE, ORIGIN_ROW
from slsgu_cli.sources.texts import label_words, tokenizable
from slsgu_cli.store.store import Store

FORGET, RETAIN = "forget", "retain"

# The suffix of images of any format, which the decoder recognises by their first bytes.
IMAGE = "img"


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """The counts of one file: samples by concept, retain rows, and refused rows."""

    seen: int
    rows: dict[str, int]
    excluded: dict[str, int]
    retain: int
    refused: dict[str, int]
    examples: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Task:
    """One file of the source, the samples to take, and the tar to write."""

    store: str
    tar: str
    record: str
    reader: Reader
    request: BuildRequest
    concepts: Sequence[Concept]
    retain: bool


def collect_shards(
    store: Store,
    folder: str,
    request: BuildRequest,
    concepts: Sequence[Concept],
    readers: Sequence[Reader],
) -> list[ShardCounts]:
    """Write the samples of every source file into a tar, and return the files' counts.

    Retain rows come from as few files as suffice, in a seeded order, as the paper takes them
    from one shard.
    """

    def task(number: int, *, retain: bool) -> _Task:
        tar, record = f"{folder}/parts/{number:05}.tar", f"{folder}/counts/{number:05}.json"
        return _Task(store.url, tar, record, readers[number], request, concepts, retain)

    numbers = range(len(readers))
    remaining = sorted(numbers, key=lambda n: priority(request.seed, f"{readers[n].path}\0{n}"))
    counts: dict[int, ShardCounts] = {}
    with progress.bar("reading shards", len(readers)) as ticker:
        while remaining and sum(c.retain for c in counts.values()) < retain_candidates(request):
            number = remaining.pop(0)
            counts[number] = _collect(task(number, retain=True))
            ticker.advance()
        remaining.sort()
        tasks = [task(number, retain=False) for number in remaining]
        for number, result in zip(remaining, _spread(tasks), strict=True):
            counts[number] = result
            ticker.advance()
    return [counts[number] for number in numbers]


def _spread(tasks: Sequence[_Task]) -> Iterator[ShardCounts]:
    """Yield the tasks' results in order, computed on all cores."""
    workers = min(cores(), len(tasks))
    if workers < 2:
        yield from map(_collect, tasks)
        return
    # Forking would copy the locks of other threads. Only this process handles Ctrl-C.
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
    selector = _RowSelector(task)
    with (
        store.writing(task.tar) as partial,
        fsspec.open(partial, "wb") as raw,
        tarfile.open(fileobj=raw, mode="w") as tar,
    ):
        for row, image in task.reader.select(selector.wants, selector.refused):
            _write(tar, task.reader, row, image, selector.roles[row.index])
    counts = selector.counts()
    store.write_record(task.record, counts)
    return counts


class _RowSelector:
    """Select the rows of one file, and count them."""

    def __init__(self, task: _Task) -> None:
        self.roles: dict[int, str] = {}
        self.refused: Counter[str] = Counter()
        self._index = ConceptIndex(task.concepts, task.request.regex)
        self._task = task
        self._not_retained = matcher(task.request.retain_exclude, regex=task.request.regex)
        self._samples: Counter[str] = Counter()
        self._excluded: Counter[str] = Counter()
        self._examples: list[str] = []
        self._seen = 0

    def wants(self, row: Row) -> bool:
        """Return whether the row is about a concept, or a retain row."""
        self._seen += 1
        caption = tokenizable(self._task.reader.caption(row) or "")
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
        elif self._task.retain and not (
            self._index.mentions_any(caption) or self._not_retained(caption)
        ):
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
    """Add a sample whose fields include its place in the source."""
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
