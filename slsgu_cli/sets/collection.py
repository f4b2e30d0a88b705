"""Collections: the samples that metadata or shards hold of some concepts, brought together.

A collection is a folder of tar shards in the store, with a record. It is addressed by what
it was asked for and by the files it was taken from, so that asking again finds it, whole
or as far as it came.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from slsgu_cli import __version__, progress
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.codec import digest, encode
from slsgu_cli.records.sets import Collection, CollectRequest, ConceptCounts
from slsgu_cli.sets.download import UrlList, download, finished, reason
from slsgu_cli.sets.metadata import EXCLUDED, Hit, Refused, Scan, retain_wanted, scan_metadata
from slsgu_cli.sets.shards import FORGET, RETAIN, collect_shards, open_shards
from slsgu_cli.sources.captions import ConceptIndex
from slsgu_cli.sources.opening import expand, parse_source
from slsgu_cli.sources.rows import BEYOND, Reader, file_identity, first_met, line_for, priority
from slsgu_cli.sources.tar import ORIGIN_FILE, ORIGIN_ROW
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store

FORMAT = 1
COLUMNS = ("role", ORIGIN_FILE, ORIGIN_ROW)


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
    readers = open_shards(request)
    identities = [file_identity(path) for path in files] + [r.identity() for r in readers]
    recipe = encode(request)
    del recipe["download"]
    address = digest({"format": FORMAT, "files": identities, **recipe})
    folder, record = Artifact.COLLECTION.beside(address), Artifact.COLLECTION.path(address)
    if store.exists(record):
        progress.note(f"the samples of {len(identities)} files were collected before: {folder}")
        return Collected(store.read_record(record, Collection), f"{folder}/parts")
    if request.metadata:
        collection = _from_metadata(store, folder, request, files)
    else:
        collection = _from_shards(store, folder, request, readers)
    store.write_record(record, collection)
    return Collected(collection, f"{folder}/parts")


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
        urls = _write_urls(store, folder, [*hits, *retain])
        parts = f"{folder}/parts"
        download(store, urls, parts, options=request.download)
        by_origin = {(hit.file, hit.row): [fetched[n] for n in hit.concepts] for hit in hits}
        by_origin |= {(hit.file, hit.row): [retained] for hit in retain}
        _count_fetched(store, parts, by_origin)
    return Collection(
        sources=request.metadata,
        files=len(files),
        seen=scan.seen,
        refused={"no caption": scan.no_caption} if scan.no_caption else {},
        concepts={
            concept.name: ConceptCounts(
                matches[number],
                _reasons(refused, number) | dict(sorted(fetched[number].refused.items())),
                tuple(sorted(fetched[number].shards)),
            )
            for number, concept in enumerate(request.concepts)
        },
        retain=ConceptCounts(
            len(retain),
            dict(sorted(retained.refused.items())),
            tuple(sorted(retained.shards)),
        ),
        examples=tuple(scan.examples),
        version=__version__,
    )


def _from_shards(
    store: Store, folder: str, request: CollectRequest, readers: Sequence[Reader]
) -> Collection:
    shards = collect_shards(store, folder, request, readers)
    refused = sum((Counter(counts.refused) for _, counts in shards), Counter[str]())
    concepts = {}
    for concept in request.concepts:
        excluded = sum(counts.excluded.get(concept.name, 0) for _, counts in shards)
        concepts[concept.name] = ConceptCounts(
            sum(counts.found.get(concept.name, 0) for _, counts in shards),
            {EXCLUDED: excluded} if excluded else {},
            tuple(f"{name}.tar" for name, counts in shards if counts.found.get(concept.name)),
        )
    return Collection(
        sources=request.sources,
        files=len(readers),
        seen=sum(counts.seen for _, counts in shards),
        refused=dict(sorted(refused.items())),
        concepts=concepts,
        retain=ConceptCounts(
            sum(counts.retain for _, counts in shards),
            {},
            tuple(f"{name}.tar" for name, counts in shards if counts.retain),
        ),
        examples=tuple(text for _, counts in shards for text in counts.examples)[:3],
        version=__version__,
    )


@dataclass(slots=True)
class Fetched:
    """What a download brought of one concept, or of the rows to retain: shards and failures."""

    shards: set[str] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)


def _once(scan: Scan) -> tuple[list[Hit], Refused]:
    """Return each URL with its caption once, and what was left out, by concept."""
    refused = Counter(scan.refused)
    pairs: set[tuple[str, str]] = set()
    hits = []
    for hit in scan.hits:
        if (hit.url, hit.caption) in pairs:
            refused.update((number, "duplicate") for number in hit.concepts)
            continue
        pairs.add((hit.url, hit.caption))
        hits.append(hit)
    return hits, refused


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


def _write_urls(store: Store, folder: str, hits: Sequence[Hit]) -> UrlList:
    roles = [FORGET if hit.concepts else RETAIN for hit in hits]
    table = pa.table(
        {
            "url": [hit.url for hit in hits],
            "caption": [hit.caption for hit in hits],
            "role": roles,
            ORIGIN_FILE: [hit.file for hit in hits],
            ORIGIN_ROW: [hit.row for hit in hits],
        }
    )
    path = f"{folder}/urls.parquet"
    with store.writing(path) as partial, fsspec.open(partial, "wb") as file:
        pq.write_table(table, file)
    return UrlList(store.where(path), len(hits), COLUMNS)


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
