"""Build a set from its sources or from a collection, or one set for each of many concepts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from shlex import quote

from slsgu_cli import progress
from slsgu_cli.errors import InputError, SlsguError, StaleError
from slsgu_cli.records.codec import decode
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import Concept, ConceptCounts, SetManifest
from slsgu_cli.sets.assembly import build_from_sources
from slsgu_cli.sets.collection import Collected, collect
from slsgu_cli.sets.pairs import Upstream
from slsgu_cli.sets.shard_collection import FORGET, RETAIN
from slsgu_cli.store.artifacts import read_manifest
from slsgu_cli.store.store import Store


def build_sets(store: Store, request: BuildRequest) -> SetManifest:
    """Build the set, from a collection if the request asks for one."""
    if request.collect is None:
        return build_from_sources(store, request, {}, original=request)
    collected = collect(store, request, request.collect)
    record = collected.record
    counts = record.concepts[request.name]
    if not counts.shards:
        raise _no_samples(request, collected, counts)
    of_collection = replace(request, sources=_shards(store, collected, counts, FORGET))
    upstream = {"forget": Upstream(record.seen, {**record.refused, **counts.refused})}
    if not request.retain_sources:
        if not record.retain.shards:
            raise InputError(
                f"no retain rows were collected from {record.files} files",
                hint="name a source of retain rows with --retain-source",
            )
        retained = _shards(store, collected, record.retain, RETAIN)
        of_collection = replace(of_collection, retain_sources=retained)
        upstream["retain"] = Upstream(record.seen, {**record.refused, **record.retain.refused})
    return build_from_sources(store, of_collection, upstream, original=request)


def build_many(
    store: Store, request: BuildRequest, concepts: Sequence[Concept]
) -> tuple[list[SetManifest], list[str]]:
    """Build a set for each concept from one collection; return the sets, and the failed names.

    A concept without samples does not stop the others.
    """
    built, failed = [], []
    for concept in concepts:
        single = replace(
            request,
            name=concept.name,
            concept=concept.name,
            match=concept.patterns,
            not_match=concept.excluded,
        )
        try:
            built.append(build_sets(store, single))
        except InputError as error:
            failed.append(concept.name)
            progress.warn(f"{concept.name}: {error.message}")
    return built, failed


def require_all(failed: Sequence[str]) -> None:
    """Raise InputError with the names of the concepts without a set."""
    if failed:
        raise InputError(
            f"no set was built for {len(failed)} of the names: {', '.join(failed)}",
            hint="the warnings above say why; correct their patterns",
        )


@dataclass(frozen=True, slots=True)
class Replayed:
    """A rebuilt set; `same` says for each part whether its rows are unchanged."""

    manifest: SetManifest
    same: dict[str, bool]


def replay(store: Store, name: str) -> Replayed:
    """Build the set `name` again from its manifest, without the rows that were dropped by hand.

    Raises StaleError if the manifest does not contain the request.
    """
    before = read_manifest(store, name)
    if not before.request:
        raise StaleError(
            f"the manifest of {name} does not contain its request",
            hint=f"run `slsgu build-sets {quote(name)}` with its sources",
        )
    request = decode(BuildRequest, before.request)
    after = build_sets(store, request)
    old = {part: ref.fingerprint for part, ref in before.blocks().items()}
    new = {part: ref.fingerprint for part, ref in after.blocks().items()}
    return Replayed(after, {part: old.get(part) == new[part] for part in new})


def _shards(store: Store, collected: Collected, counts: ConceptCounts, role: str) -> list[str]:
    """Return the sources with a concept's samples, or with the retain rows.

    Raises InputError if a shard differs from its digest.
    """
    for shard in counts.shards:
        store.require_digest(f"{collected.folder}/{shard}", collected.record.digests.get(shard, ""))
    places = [store.where(f"{collected.folder}/{shard}") for shard in counts.shards]
    return [f"{place}?role={role}" for place in places]


def _no_samples(request: BuildRequest, collected: Collected, counts: ConceptCounts) -> SlsguError:
    record = collected.record
    patterns = ", ".join(repr(pattern) for pattern in request.patterns)
    if counts.rows:
        why = ", ".join(f"{count} {what}" for what, count in counts.refused.items())
        return InputError(
            f"none of the {counts.rows} images of {request.name} could be collected: {why}",
            hint="check the URLs, or try again later",
        )
    examples = ", ".join(repr(" ".join(text.split())[:60]) for text in record.examples)
    return InputError(
        f"the forget set is empty: nothing matches {patterns} among {record.seen} captions",
        hint=f"captions read like {examples}; change --match, or --caption-col",
    )
