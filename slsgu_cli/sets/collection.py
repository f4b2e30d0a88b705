"""Collections: the samples of some concepts, collected from metadata or shards.

A collection is a folder of tar shards in the store, with a record. Its address is a digest of
the request and of the files it comes from, so that the same request finds it again, finished
or not.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from slsgu_cli import __version__, progress
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.codec import digest, encode
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import Collection, CollectRequest, ConceptCounts
from slsgu_cli.sets.download import download, finished, reason
from slsgu_cli.sets.sampling import priority, row_identity, sample_size
from slsgu_cli.sets.scan import (
    BEYOND,
    EXCLUDED,
    Hit,
    Refused,
    Scan,
    retain_candidates,
    scan_metadata,
)
from slsgu_cli.sets.shard_collection import FORGET, RETAIN, collect_shards
from slsgu_cli.sources.concept_index import ConceptIndex
from slsgu_cli.sources.files import file_identity
from slsgu_cli.sources.grammar import expand, parse_source
from slsgu_cli.sources.opening import open_sources
from slsgu_cli.sources.reader import Columns, Reader
from slsgu_cli.sources.tar import ORIGIN_FILE, ORIGIN_ROW
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Collected:
    """A collection and the folder of its shards, as a path in the store."""

    record: Collection
    folder: str


def collect(store: Store, request: BuildRequest, wanted: CollectRequest) -> Collected:
    """Collect the samples for a build, or return the finished collection of an earlier call.

    Raises UsageError, MissingError or InputError; the next call then resumes the collection.
    """
    if bool(wanted.metadata) == bool(wanted.sources):
        raise UsageError("collect samples from --metadata or from --source, not from both")
    files = [path for text in wanted.metadata for path in expand(parse_source(text))]
    columns = Columns(
        image=request.image_column, caption=request.caption_column, needs=frozenset(["caption"])
    )
    readers = open_sources(wanted.sources, columns)
    identities = [file_identity(path) for path in files] + [r.identity() for r in readers]
    address = digest({"format": FORMAT, "files": identities, **_recipe(request, wanted)})
    folder, record = Artifact.COLLECTION.folder_of(address), Artifact.COLLECTION.path(address)
    parts = f"{folder}/parts"
    if store.exists(record):
        progress.note(f"reusing the samples collected from {len(identities)} files: {folder}")
        return Collected(store.read_record(record, Collection), parts)
    if wanted.metadata:
        collection = _from_metadata(store, folder, request, wanted, files)
    else:
        collection = _from_shards(store, folder, request, wanted, readers)
    digests = {shard: store.file_digest(f"{parts}/{shard}") for shard in collection.shards()}
    collection = replace(collection, digests=digests)
    store.write_record(record, collection)
    return Collected(collection, parts)


def _recipe(request: BuildRequest, wanted: CollectRequest) -> dict[str, Any]:
    """Return everything that determines the samples, apart from the content of the files."""
    recipe: dict[str, Any] = encode(wanted)
    del recipe["download"]
    retained = retain_candidates(request)
    options = {
        "regex": request.regex,
        "columns": [request.caption_column, request.image_column],
        "max_forget": request.max_forget,
        "seed": request.seed,
        "retain": [retained, list(request.retain_exclude)] if retained else None,
    }
    return recipe | options


def _from_metadata(
    store: Store,
    folder: str,
    request: BuildRequest,
    wanted: CollectRequest,
    files: Sequence[str],
) -> Collection:
    concepts = wanted.concepts
    index = ConceptIndex(concepts, request.regex)
    scan = scan_metadata(files, request, index, url_column=wanted.url_column)
    hits, refused = _without_duplicates(scan)
    hits = _limited(hits, request, len(concepts), refused)
    retain = scan.retain[: retain_candidates(request)]
    matches = Counter(number for hit in hits for number in hit.concepts)
    progress.note(f"{len(hits)} of {scan.seen} captions match; {len(retain)} other rows are drawn")
    fetched, retained = [Downloaded() for _ in concepts], Downloaded()
    if hits:
        rows, parts = [*hits, *retain], f"{folder}/parts"
        urls = _write_urls(store, folder, rows)
        download(store, parts, urls=urls, rows=len(rows), options=wanted.download)
        by_origin = {(hit.file, hit.row): [fetched[n] for n in hit.concepts] for hit in hits}
        by_origin |= {(hit.file, hit.row): [retained] for hit in retain}
        _count_fetched(store, parts, by_origin)
    return Collection(
        sources=wanted.metadata,
        files=len(files),
        seen=scan.seen,
        refused={"no caption": scan.no_caption} if scan.no_caption else {},
        concepts={
            concept.name: fetched[number].counts(matches[number], _reasons(refused, number))
            for number, concept in enumerate(concepts)
        },
        retain=retained.counts(len(retain), {}),
        examples=tuple(scan.examples),
        version=__version__,
    )


def _from_shards(
    store: Store,
    folder: str,
    request: BuildRequest,
    wanted: CollectRequest,
    readers: Sequence[Reader],
) -> Collection:
    shards = collect_shards(store, folder, request, wanted.concepts, readers)
    refused = sum((Counter(counts.refused) for counts in shards), Counter[str]())
    concepts = {}
    for concept in wanted.concepts:
        rows = [counts.rows.get(concept.name, 0) for counts in shards]
        excluded = sum(counts.excluded.get(concept.name, 0) for counts in shards)
        excluded_counts = {EXCLUDED: excluded} if excluded else {}
        concepts[concept.name] = ConceptCounts(sum(rows), excluded_counts, _tars(rows))
    retain = [counts.retain for counts in shards]
    return Collection(
        sources=wanted.sources,
        files=len(readers),
        seen=sum(counts.seen for counts in shards),
        refused=dict(sorted(refused.items())),
        concepts=concepts,
        retain=ConceptCounts(sum(retain), {}, _tars(retain)),
        examples=tuple(text for counts in shards for text in counts.examples)[:3],
        version=__version__,
    )


def _tars(counts: Sequence[int]) -> tuple[str, ...]:
    """Return the tars of the files with selected rows."""
    return tuple(f"{number:05}.tar" for number, count in enumerate(counts) if count)


@dataclass(slots=True)
class Downloaded:
    """The shards and failures of one concept's download, or of that of the retain rows."""

    shards: set[str] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)

    def counts(self, rows: int, refused: dict[str, int]) -> ConceptCounts:
        """Return the counts of `rows` rows, some of which were refused before the download."""
        all_refused = refused | dict(sorted(self.refused.items()))
        return ConceptCounts(rows, all_refused, tuple(sorted(self.shards)))


def _without_duplicates(scan: Scan) -> tuple[list[Hit], Refused]:
    """Return each pair of URL and caption once, and the refused rows by concept."""
    refused = Counter(scan.refused)
    first: dict[tuple[str, str], Hit] = {}
    for hit in scan.hits:
        if first.setdefault((hit.url, hit.caption), hit) is not hit:
            refused.update((number, "duplicate") for number in hit.concepts)
    return list(first.values()), refused


def _limited(
    hits: Sequence[Hit], request: BuildRequest, concepts: int, refused: Refused
) -> list[Hit]:
    """Return the hits that can be drawn if the rows of a concept are limited."""
    if request.max_forget is None:
        return list(hits)
    remaining = dict.fromkeys(range(concepts), sample_size(request.max_forget))
    order = sorted(hits, key=lambda hit: priority(request.seed, row_identity(hit.file, hit.row)))
    selected = set()
    for hit in order:
        if any(remaining[number] > 0 for number in hit.concepts):
            selected.add((hit.file, hit.row))
            for number in hit.concepts:
                remaining[number] -= 1
        else:
            refused.update((number, BEYOND) for number in hit.concepts)
    return [hit for hit in hits if (hit.file, hit.row) in selected]


def _write_urls(store: Store, folder: str, hits: Sequence[Hit]) -> str:
    """Write the URLs to download; return the file's full path."""
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
    store: Store, parts: str, by_origin: Mapping[tuple[str, int], Sequence[Downloaded]]
) -> None:
    """Count the result of every download, from the tables that img2dataset writes."""
    columns = [ORIGIN_FILE, ORIGIN_ROW, "status", "error_message"]
    for shard in finished(store, parts):
        table = store.where(f"{parts}/{shard.removesuffix('.tar')}.parquet")
        try:
            with fsspec.open(table, "rb") as file:
                rows = pq.read_table(file, columns=columns).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"cannot read {table}, which img2dataset wrote: {error}",
                hint=f"delete {shard.removesuffix('.tar')}* next to it and run the command again",
            ) from error
        for row in rows:
            for fetched in by_origin.get((row[ORIGIN_FILE], row[ORIGIN_ROW]), ()):
                if row["status"] == "success":
                    fetched.shards.add(shard)
                else:
                    fetched.refused[reason(row["error_message"])] += 1


def _reasons(refused: Refused, concept: int) -> dict[str, int]:
    """Return the counts of one concept by reason."""
    return {why: count for (number, why), count in sorted(refused.items()) if number == concept}
