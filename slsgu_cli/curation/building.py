"""Build sets whose samples have to be brought together first, for one name or for many."""

from collections.abc import Sequence
from dataclasses import replace

from slsgu_cli import progress
from slsgu_cli.build import BuildRequest, build_sets
from slsgu_cli.curation.collection import Collected, collect
from slsgu_cli.curation.records import Concept, Tried
from slsgu_cli.curation.shards import FORGET, RETAIN
from slsgu_cli.errors import InputError, SlsguError
from slsgu_cli.records import SetManifest
from slsgu_cli.store import Store
from slsgu_cli.tally import Upstream


def build(store: Store, request: BuildRequest) -> SetManifest:
    """Build the set, from a collection if the request asks for one."""
    if request.collect is None:
        return build_sets(store, request)
    collected = collect(store, request.collect)
    record = collected.record
    tried = record.concepts[request.name]
    if not tried.shards:
        raise _nothing(request, collected, tried)
    found = replace(request, sources=_shards(store, collected, tried, FORGET))
    upstream = {"forget": Upstream(record.seen, {**record.refused, **tried.refused})}
    if request.collect.retain_samples:
        if not record.retain.shards:
            raise InputError(
                f"no row to retain was had from {record.files} files",
                hint="name other rows with --retain-source",
            )
        retained = _shards(store, collected, record.retain, RETAIN)
        found = replace(found, retain_sources=retained)
        upstream["retain"] = Upstream(record.seen, {**record.refused, **record.retain.refused})
    return build_sets(store, found, upstream=upstream)


def build_many(
    store: Store, request: BuildRequest, concepts: Sequence[Concept]
) -> tuple[list[SetManifest], list[str]]:
    """Build a set for each concept from one collection; return them, and names without one.

    A concept that nothing is found of does not stop the others.
    """
    built, failed = [], []
    for concept in concepts:
        own = replace(
            request,
            name=concept.name,
            concept=concept.name,
            match=concept.patterns,
            not_match=concept.excluded,
        )
        try:
            built.append(build(store, own))
        except InputError as error:
            failed.append(concept.name)
            progress.warn(f"{concept.name}: {error.message}")
    return built, failed


def require_all(failed: Sequence[str]) -> None:
    """Raise InputError naming the concepts that no set was built for."""
    if failed:
        raise InputError(
            f"no set was built for {len(failed)} of the names: {', '.join(failed)}",
            hint="the warnings above say why; correct their patterns",
        )


def _shards(store: Store, collected: Collected, tried: Tried, role: str) -> list[str]:
    """Return the sources that hold a concept's samples, or those to retain."""
    where = store.where(collected.folder)
    return [f"{where}/{shard}?role={role}" for shard in tried.shards]


def _nothing(request: BuildRequest, collected: Collected, tried: Tried) -> SlsguError:
    record = collected.record
    patterns = ", ".join(repr(pattern) for pattern in request.patterns)
    if tried.found:
        why = ", ".join(f"{count} {what}" for what, count in tried.refused.items())
        return InputError(
            f"none of the {tried.found} images of {request.name} could be had: {why}",
            hint="look at the URLs, or try again later",
        )
    examples = ", ".join(repr(" ".join(text.split())[:60]) for text in record.examples)
    return InputError(
        f"the forget set is empty: nothing matches {patterns} among {record.seen} captions",
        hint=f"captions read like {examples}; change --match, or --caption-col",
    )
