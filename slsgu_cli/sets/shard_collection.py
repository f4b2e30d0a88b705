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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import starmap
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


@dataclass(slots=True)
class ShardCounts:
    """The counts of one file: samples by concept, retain rows, and refused rows."""

    seen: int = 0
    rows: dict[str, int] = field(default_factory=Counter)
    excluded: dict[str, int] = field(default_factory=Counter)
    retain: int = 0
    refused: dict[str, int] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


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
    collect = partial(_collect, store.url, folder, request, concepts)
    numbers = range(len(readers))
    remaining = sorted(numbers, key=lambda n: priority(request.seed, f"{readers[n].path}\0{n}"))
    counts: dict[int, ShardCounts] = {}
    with progress.bar("reading shards", len(readers)) as ticker:
        while remaining and sum(c.retain for c in counts.values()) < retain_candidates(request):
            number = remaining.pop(0)
            counts[number] = collect(True, number, readers[number])
            ticker.advance()
        remaining.sort()
        files = [(number, readers[number]) for number in remaining]
        for number, result in zip(remaining, _spread(partial(collect, False), files), strict=True):
            counts[number] = result
            ticker.advance()
    return [counts[number] for number in numbers]


def _spread(
    collect: Callable[[int, Reader], ShardCounts], files: Sequence[tuple[int, Reader]]
) -> Iterator[ShardCounts]:
    """Yield the counts of files in order, computed on all cores."""
    workers = min(cores(), len(files))
    if workers < 2:
        yield from starmap(collect, files)
        return
    # Forking would copy the locks of other threads. Only this process handles Ctrl-C.
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )
    try:
        yield from pool.map(collect, *zip(*files, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(
    url: str,
    folder: str,
    request: BuildRequest,
    concepts: Sequence[Concept],
    retain: bool,
    number: int,
    reader: Reader,
) -> ShardCounts:
    """Write the samples of one file into a tar, and return its counts."""
    store, record = Store(url), f"{folder}/counts/{number:05}.json"
    if store.exists(record):
        return store.read_record(record, ShardCounts)
    selector = _RowSelector(reader, request, concepts, retain)
    refused = Counter[str]()
    with (
        store.writing(f"{folder}/parts/{number:05}.tar") as file,
        fsspec.open(file, "wb") as raw,
        tarfile.open(fileobj=raw, mode="w") as tar,
    ):
        for row, image in reader.select(selector.wants, refused):
            _write(tar, reader, row, image, selector.roles[row.index])
    counts = selector.counts
    counts.refused |= refused
    store.write_record(record, counts)
    return counts


class _RowSelector:
    """Select the rows of one file, and count them."""

    def __init__(
        self, reader: Reader, request: BuildRequest, concepts: Sequence[Concept], retain: bool
    ) -> None:
        self.counts = ShardCounts()
        self.roles: dict[int, str] = {}
        self._reader = reader
        self._retain = retain
        self._index = ConceptIndex(concepts, request.regex)
        self._not_retained = matcher(request.retain_exclude, regex=request.regex)

    def wants(self, row: Row) -> bool:
        """Return whether the row is about a concept, or a retain row."""
        counts, index = self.counts, self._index
        counts.seen += 1
        caption = tokenizable(self._reader.caption(row) or "")
        if not caption:
            counts.refused["no caption"] += 1
            return False
        if len(counts.examples) < 3:
            counts.examples.append(caption)
        for number in index.about(caption):
            name = index.concepts[number].name
            if index.excluded(number, caption):
                counts.excluded[name] += 1
            else:
                counts.rows[name] += 1
                self.roles[row.index] = FORGET
        if row.index in self.roles:
            return True
        if not self._retain or index.mentions_any(caption) or self._not_retained(caption):
            return False
        counts.retain += 1
        self.roles[row.index] = RETAIN
        return True


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
