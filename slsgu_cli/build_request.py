"""What `build-sets` is asked for: all that a set can be built from again."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from slsgu_cli.curation.records import CollectRequest, Screening
from slsgu_cli.errors import UsageError
from slsgu_cli.layout import check_name
from slsgu_cli.records import ModelSpec

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
