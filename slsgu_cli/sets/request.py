"""What `build-sets` is asked for, and the command line that asks for it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from slsgu_cli.errors import UsageError
from slsgu_cli.records.sets import (
    CollectRequest,
    Concept,
    DownloadOptions,
    ModelSpec,
    Screening,
    check_name,
)

RETAIN_SAMPLES = 8000


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What `build-sets` is asked for.

    Sources are in the grammar of `sources.parse_source`. `match` defaults to the concept
    itself, `retain_sources` to `sources`. `evals`, `classes` and `templates` go by the
    evaluation set's name; `forget_eval` names the set that has the concept as a class.
    With `collect`, sources are what it collects. `dropped` has keys or hashes of rows that
    a person has taken out, by part (forget, retain or an evaluation set).
    """

    name: str
    concept: str
    model: ModelSpec
    sources: Sequence[str]
    match: Sequence[str] = ()
    not_match: Sequence[str] = ()
    regex: bool = False
    max_forget: int | None = None
    retain_sources: Sequence[str] = ()
    retain_samples: int = RETAIN_SAMPLES
    retain_exclude: Sequence[str] = ()
    evals: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    forget_eval: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    label_column: str | None = None
    seed: int = 0
    screening: Screening = field(default_factory=Screening)
    collect: CollectRequest | None = None
    dropped: dict[str, Sequence[str]] = field(default_factory=dict)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns that make a caption one of the forget set."""
        return tuple(self.match) or (self.concept,)


def check(request: BuildRequest) -> None:
    """Raise UsageError for a request that contradicts itself."""
    check_name(request.name)
    if not request.concept.strip():
        raise UsageError("the concept to forget is blank")
    if not request.sources:
        raise UsageError("there is no source to build from", hint="name one with --source")
    for option, value in (
        ("--retain-samples", request.retain_samples),
        ("--max-forget", 1 if request.max_forget is None else request.max_forget),
    ):
        if value < 1:
            raise UsageError(f"{option} is {value}; it must be 1 or more")
    named = {
        "--classes": request.classes,
        "--templates": request.templates,
        "--forget-eval": [] if request.forget_eval is None else [request.forget_eval],
    }
    for option, names in named.items():
        for name in names:
            if name not in request.evals:
                known = ", ".join(sorted(request.evals)) or "none"
                raise UsageError(
                    f"{option} speaks of an evaluation set {name}; there are: {known}",
                    hint=f"add --eval {name}=SOURCE",
                )


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
