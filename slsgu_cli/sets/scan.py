"""A scan of parquet metadata for captions about some concepts, in one pass.

Row groups are read on all cores, a batch at a time. The URLs of a group are read only if one
of its captions matches. Memory therefore grows with the matches, not with the metadata.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from slsgu_cli import progress
from slsgu_cli.errors import InputError
from slsgu_cli.machine import cores
from slsgu_cli.prefetch import prefetch
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.sets.sampling import portable_path, priority, sample_size
from slsgu_cli.sources.concept_index import ConceptIndex, Prefilter
from slsgu_cli.sources.formats import reader_class
from slsgu_cli.sources.matching import matcher
from slsgu_cli.sources.parquet import group_sizes, open_parquet, text_batches
from slsgu_cli.sources.reader import CAPTION_FIELDS, no_column
from slsgu_cli.sources.table import usual_column
from slsgu_cli.sources.text_table import TextTable
from slsgu_cli.sources.texts import tokenizable

# Retain rows are drawn from row groups with this many times as many rows, or from all.
POOL = 1000
EXCLUDED, NO_URL, BEYOND = "excluded", "no URL", "beyond --max-forget"

# Counts by concept and reason.
Refused = Counter[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group of a file; `start` is the number of its first row in the file."""

    path: str
    group: int
    start: int
    rows: int
    schema: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hit:
    """A selected row: for these concepts, or for the retain set by its `priority`."""

    file: str
    row: int
    url: str
    caption: str
    concepts: tuple[int, ...] = ()
    priority: int = 0


@dataclass(slots=True)
class Scan:
    """The rows of metadata that match or are drawn; `refused` counts excluded matches."""

    seen: int = 0
    hits: list[Hit] = field(default_factory=list)
    retain: list[Hit] = field(default_factory=list)
    refused: Refused = field(default_factory=Counter)
    no_caption: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: "Scan") -> None:
        """Add the rows of other row groups."""
        self.seen += other.seen
        self.hits += other.hits
        self.retain += other.retain
        self.refused.update(other.refused)
        self.no_caption += other.no_caption
        self.examples += other.examples[: 3 - len(self.examples)]


def scan_metadata(
    paths: Sequence[str], request: BuildRequest, index: ConceptIndex, *, url_column: str
) -> Scan:
    """Return the rows of metadata about the concepts, and a sample of other rows to retain.

    Raises MissingError and InputError for files that are unreadable or lack a column.
    """
    threads = cores()
    files = prefetch(_groups, paths, threads=threads)
    groups = [group for groups_of_file in files for group in groups_of_file]
    patterns = [pattern for concept in index.concepts for pattern in concept.patterns]
    prefilter = Prefilter(None if request.regex else patterns)
    search = _Search(request, index, prefilter, url_column, *_pool(groups, request))
    result = Scan()
    with progress.bar("filtering captions", sum(group.rows for group in groups)) as ticker:
        for scan in prefetch(search.scan, groups, threads=threads):
            result.add(scan)
            ticker.advance(scan.seen)
    result.retain.sort(key=lambda hit: (hit.priority, hit.file, hit.row))
    result.hits.sort(key=lambda hit: (hit.concepts[0], hit.file, hit.row))
    return result


@dataclass(frozen=True, slots=True)
class _Search:
    """The search of row groups; called from several threads."""

    request: BuildRequest
    index: ConceptIndex
    prefilter: Prefilter
    url_column: str
    pool: frozenset[RowGroup]
    limit: int

    def scan(self, group: RowGroup) -> Scan:
        """Search one row group."""
        result, hits = Scan(), dict[int, Hit]()
        caption, url = _columns(group, self.request, self.url_column)
        start = group.start
        for captions in text_batches(group.path, group.group, caption):
            hits |= {hit.row: hit for hit in self._hits(group, captions, start, result)}
            start += len(captions)
        start, rows = group.start, sorted(hits)
        # The column of URLs is read only if a row is selected.
        for urls in text_batches(group.path, group.group, url) if hits else ():
            stop = start + len(urls)
            for row in rows[bisect_left(rows, start) : bisect_left(rows, stop)]:
                self._add_url(hits[row], urls[row - start].as_py(), result)
            start = stop
        return result

    def _hits(self, group: RowGroup, captions: pa.Array, start: int, result: Scan) -> Iterator[Hit]:
        """Yield the selected rows of a batch, without URLs; count excluded matches."""
        result.seen += len(captions)
        result.no_caption += captions.null_count
        if not result.examples:
            result.examples += [text for text in captions[:3].to_pylist() if text]
        for place in self.prefilter.candidates(captions):
            text = tokenizable(captions[int(place)].as_py() or "")
            about = self.index.about(text)
            concepts = tuple(number for number in about if not self.index.excluded(number, text))
            result.refused.update((number, EXCLUDED) for number in about if number not in concepts)
            if concepts:
                yield Hit(group.path, start + int(place), "", text, concepts)
        if group in self.pool:
            yield from self._retain_rows(group, captions, start)

    def _retain_rows(self, group: RowGroup, captions: pa.Array, start: int) -> Iterator[Hit]:
        """Yield the rows of a batch to retain: those that mention no concept."""
        order = priorities(self.request.seed, group.path, start, len(captions))
        excluded = matcher(self.request.retain_exclude, regex=self.request.regex)
        for offset in np.flatnonzero(order <= np.uint64(self.limit)):
            text = tokenizable(captions[int(offset)].as_py() or "")
            if text and not self.index.mentions_any(text) and not excluded(text):
                yield Hit(group.path, start + int(offset), "", text, (), int(order[offset]))

    def _add_url(self, hit: Hit, url: str | None, result: Scan) -> None:
        if url and url.strip():
            (result.hits if hit.concepts else result.retain).append(replace(hit, url=url.strip()))
        else:
            result.refused.update((number, NO_URL) for number in hit.concepts)


def priorities(seed: int, path: str, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Return each row's priority: 64 bits from seed, file and row (SplitMix64)."""
    base = priority(seed, portable_path(path))
    state = np.arange(start + 1, start + 1 + count, dtype=np.uint64)
    state = state * np.uint64(0x9E3779B97F4A7C15) + np.uint64(base)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)))


def retain_candidates(request: BuildRequest) -> int:
    """Return how many rows to draw for the retain set, so that half of them may be dead links.

    There are none if the retain set has sources of its own.
    """
    return 0 if request.retain_sources else sample_size(request.retain_samples)


def _pool(groups: Sequence[RowGroup], request: BuildRequest) -> tuple[frozenset[RowGroup], int]:
    """Return the row groups to draw from, and the last priority that is drawn."""
    wanted = retain_candidates(request)
    if not wanted:
        return frozenset(), 0
    order = sorted(groups, key=lambda g: priority(request.seed, f"{g.path}\0{g.group}"))
    chosen, rows = list[RowGroup](), 0
    for group in order:
        if rows >= POOL * wanted:
            break
        chosen.append(group)
        rows += group.rows
    # Twice as many, because some are about a concept or have no caption.
    share = min(1.0, 2 * (wanted + 100) / max(rows, 1))
    return frozenset(chosen), min(int(share * 2**64), 2**64 - 1)


def _columns(group: RowGroup, request: BuildRequest, url_column: str) -> tuple[str, str]:
    columns = group.schema
    caption = request.caption_column or usual_column(columns, CAPTION_FIELDS)
    url = usual_column(columns, [url_column.lower()])
    if caption is None or caption not in columns:
        name = f"column {caption}" if caption else "caption column"
        raise no_column(group.path, name, columns, "name it with --caption-col")
    if url is None:
        name = f"column {url_column}"
        raise no_column(group.path, name, columns, "name it with --url-col")
    return caption, url


def _groups(path: str) -> list[RowGroup]:
    reader = reader_class(path)
    if reader and issubclass(reader, TextTable):
        read = "json.read_json" if "json" in path.lower() else "csv.read_csv"
        raise InputError(
            f"{path} is a text file, but --metadata takes parquet",
            hint='write it as parquet: python -c "from pyarrow import csv, json, parquet; '
            f"parquet.write_table({read}('{path}'), 'metadata.parquet')\"; "
            "name images that you already have with --source",
        )
    with open_parquet(path) as file:
        schema, groups, start = tuple(file.schema_arrow.names), list[RowGroup](), 0
        for group, rows in enumerate(group_sizes(file)):
            groups.append(RowGroup(path, group, start, rows, schema))
            start += rows
        return groups
