"""From the options of `build-sets` to the request for each set, and its way to be built."""

from collections.abc import Sequence
from dataclasses import replace

from slsgu_cli.build_request import BuildRequest
from slsgu_cli.curation.records import CollectRequest, Concept, DownloadOptions
from slsgu_cli.errors import UsageError


def with_collection(
    request: BuildRequest,
    concepts: Sequence[Concept],
    *,
    metadata: Sequence[str],
    url_column: str,
    download: DownloadOptions,
) -> BuildRequest:
    """Return `request` with what it takes to collect its samples, where it does.

    Samples are collected from metadata, and from any source for several concepts at once;
    the sets of all of these have the same rows to retain. Raises UsageError.
    """
    if not metadata and not concepts:
        return request
    if metadata and request.sources:
        raise UsageError(
            "--metadata and --source cannot be read together",
            hint="other rows to retain are named with --retain-source",
        )
    if concepts and (request.match or request.not_match):
        raise UsageError("--names has patterns of its own", hint="put aliases into its lines")
    own = Concept(request.name, request.patterns, tuple(request.not_match))
    retained = () if request.retain_sources else tuple(request.retain_exclude)
    collected = CollectRequest(
        concepts=tuple(concepts) or (own,),
        regex=request.regex,
        metadata=tuple(metadata),
        sources=tuple(request.sources),
        url_column=url_column,
        caption_column=request.caption_column,
        image_column=request.image_column,
        retain_samples=0 if request.retain_sources else request.retain_samples,
        retain_exclude=retained,
        max_forget=request.max_forget,
        seed=request.seed,
        download=download,
    )
    return replace(request, sources=(), collect=collected)


def check_replay(name: str | None, given: Sequence[object]) -> str:
    """Return the name to build again. Raises UsageError where more is asked for."""
    if name is None:
        raise UsageError("--replay needs the name of a set", hint="slsgu build-sets NAME --replay")
    if any(given):
        raise UsageError(
            "--replay builds a set as it was built and takes no other options",
            hint="leave --replay out to build another",
        )
    return name
