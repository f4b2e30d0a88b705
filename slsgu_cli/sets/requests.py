"""Requests for sets: checked, completed with a collection, printed as a command."""

from collections.abc import Sequence
from dataclasses import fields, replace

from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.option_fields import command_line
from slsgu_cli.records.options import BuildRequest, MetadataSource
from slsgu_cli.records.sets import PROMPTS, CollectRequest, Concept, check_name
from slsgu_cli.sources.matching import folded


def check(request: BuildRequest) -> None:
    """Raise UsageError for a request that contradicts itself."""
    check_name(request.name)
    if not request.concept.strip():
        raise UsageError("the concept to forget is blank")
    if not request.sources and not request.words:
        raise UsageError(
            "there is no source to build from", hint="name one with --source, or --words"
        )
    if request.words:
        _check_words(request)
    if request.thing is not None:
        _check_thing(request, request.thing)
    for option, value in (
        ("--retain-samples", request.retain_samples),
        ("--max-forget", 1 if request.max_forget is None else request.max_forget),
    ):
        if value < 1:
            raise UsageError(f"{option} is {value}; it must be 1 or more")
    named = {
        "--classes": request.classes,
        "--templates": request.templates,
        "--test": request.tests,
        "--forget-eval": [] if request.forget_eval is None else [request.forget_eval],
    }
    of_words = {PROMPTS} if request.words and not request.sources else set()
    for option, names in named.items():
        for name in names:
            if name not in {*request.evals, *of_words}:
                known = ", ".join(sorted({*request.evals, *of_words})) or "none"
                raise UsageError(
                    f"{option} names an evaluation set {name}; the evaluation sets are: {known}",
                    hint=f"add --eval {name}=SOURCE",
                )


def _check_words(request: BuildRequest) -> None:
    """Raise UsageError for options that a set from words does not have, InputError for words."""
    if request.match or request.regex:
        raise UsageError(
            "--words cannot be combined with --match or --regex",
            hint="write aliases into a file of words: WORD<tab>alias",
        )
    for name in request.word_list.patterns:
        if not folded(name).strip():
            raise InputError(f"--words: no tokenizer makes a token of {name!r}")
    screening = request.screening
    if not request.sources and (screening.min_similarity or screening.near_duplicates):
        raise UsageError(
            "--min-similarity and --near-duplicates compare images, and --words alone has none",
            hint="leave them out, or name images with --source",
        )


def _check_thing(request: BuildRequest, thing: str) -> None:
    """Raise UsageError unless there is a thing, with words for its attributes and no images."""
    if not request.words or request.sources:
        raise UsageError(
            "--from needs --words, and no --source",
            hint="name the attribute with --words; --eval adds images to measure on",
        )
    if not folded(thing).strip() or "{}" in thing:
        raise UsageError(
            f"--from {thing!r} is not a thing",
            hint='write --words "red {}" --from car, with {} in place of the thing',
        )


def with_collection(
    request: BuildRequest, concepts: Sequence[Concept], source: MetadataSource
) -> BuildRequest:
    """Return `request` with its collection, if its samples have to be collected.

    That is the case for metadata, and for several concepts from any source; the sets of all
    concepts then have the same retain rows. Raises UsageError.
    """
    if not source.metadata and not concepts:
        return request
    if source.metadata and request.sources:
        raise UsageError(
            "--metadata and --source cannot be combined",
            hint="name a source of retain rows with --retain-source",
        )
    if concepts and (request.match or request.not_match or request.words):
        raise UsageError(
            "--names cannot be combined with --match, --not-match or --words",
            hint="write aliases and !exclusions into the file of names",
        )
    single = Concept(request.name, request.patterns, tuple(request.not_match))
    collected = CollectRequest(
        concepts=tuple(concepts) or (single,),
        metadata=tuple(source.metadata),
        sources=tuple(request.sources),
        url_column=source.url_column,
        download=source.download,
    )
    return replace(request, sources=(), collect=collected)


# The first options of a command line; the others follow in their order.
FIRST = ("name", "model", "concept")


def build_command(request: BuildRequest) -> list[str]:
    """Return the words of the `build-sets` command that builds the same set.

    A set from a file of names, or with rows dropped by hand, is rebuilt from its manifest.
    """
    collect = request.collect
    if request.dropped or (collect is not None and len(collect.concepts) > 1):
        return ["slsgu", "build-sets", request.name, "--replay"]
    first = [name for name in FIRST if name != "concept" or request.concept != request.name]
    words = ["slsgu", "build-sets", *command_line(request, fields=first)]
    if collect is None:
        words += command_line(request, fields=["sources"])
    else:
        source = MetadataSource(metadata=collect.metadata, url_column=collect.url_column)
        words += command_line(source, also=("url_column",))
    words += command_line(request, fields=["retain_sources"])
    rest = [each.name for each in fields(request)]
    written = {*FIRST, "sources", "retain_sources"}
    return words + command_line(request, fields=[name for name in rest if name not in written])
