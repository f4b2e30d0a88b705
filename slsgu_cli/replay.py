"""The command line that a request to build a set stands for, so that a manifest can tell it."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slsgu_cli.build_request import BuildRequest


def build_command(request: "BuildRequest") -> list[str]:
    """Return the words of the `build-sets` command that asks for the same.

    A set of a file of names, or with rows dropped by hand, is asked for by its manifest.
    """
    many = request.collect is not None and len(request.collect.concepts) > 1
    if many or request.dropped:
        return ["slsgu", "build-sets", request.name, "--replay"]
    return ["slsgu", "build-sets", request.name, *_options(request)]


def _options(request: "BuildRequest") -> Iterator[str]:
    """Yield every option that is not at its default, each with its value."""
    from slsgu_cli.build_request import RETAIN_SAMPLES

    yield from _each("--model", [request.model.name])
    yield from _each("--pretrained", _given(request.model.pretrained))
    yield from _each("--concept", [] if request.concept == request.name else [request.concept])
    yield from _sources(request)
    yield from _each("--match", request.match)
    yield from _each("--not-match", request.not_match)
    yield from ["--regex"] if request.regex else []
    yield from _each("--max-forget", _given(request.max_forget))
    if request.retain_samples != RETAIN_SAMPLES:
        yield from _each("--retain-samples", [str(request.retain_samples)])
    yield from _each("--retain-exclude", request.retain_exclude)
    for option, named in (
        ("--eval", request.evals),
        ("--classes", request.classes),
        ("--templates", request.templates),
    ):
        yield from _each(option, [f"{name}={value}" for name, value in named.items()])
    yield from _each("--forget-eval", _given(request.forget_eval))
    yield from _each("--image-column", _given(request.image_column))
    yield from _each("--caption-column", _given(request.caption_column))
    yield from _each("--label-column", _given(request.label_column))
    yield from _each("--seed", _given(request.seed or None))
    screening = request.screening
    yield from _each("--min-similarity", _given(screening.min_similarity))
    yield from _each("--near-duplicates", _given(screening.near_duplicates))


def _sources(request: "BuildRequest") -> Iterator[str]:
    """Yield where rows come from; of a collection, what it was made from."""
    collect = request.collect
    if collect is None:
        yield from _each("--source", request.sources)
    else:
        yield from _each("--metadata", collect.metadata)
        yield from _each("--url-col", [collect.url_column])
    if collect is None or not collect.retain_samples:
        yield from _each("--retain-source", request.retain_sources)


def _given(value: str | float | None) -> list[str]:
    return [] if value is None else [str(value)]


def _each(option: str, values: Iterable[str]) -> Iterator[str]:
    """Yield the option before each value; a value that could be an option is tied to it."""
    for value in values:
        yield from [f"{option}={value}"] if value.startswith("-") else [option, value]
