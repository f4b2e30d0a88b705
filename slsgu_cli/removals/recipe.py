"""The records of a recipe: one removal job with its model, data, requests and outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import quote

from slsgu_cli.errors import UsageError
from slsgu_cli.records.figures import Assertion, read_assertions, require_known
from slsgu_cli.records.ledger import written_at
from slsgu_cli.records.method import Tower
from slsgu_cli.records.option_fields import EVALUATION, OUTPUT, option
from slsgu_cli.records.options import (
    OVERWRITE,
    BuildRequest,
    PassOptions,
    RankOptions,
    SearchOptions,
)
from slsgu_cli.records.sets import ModelSpec, check_name
from slsgu_cli.records.studies import CLASS
from slsgu_cli.records.verification import BOUNDED, Check, VerifyRequest
from slsgu_cli.text import near


class Together(StrEnum):
    """How the edits of several requests are combined in one checkpoint.

    They are searched jointly, searched alone and summed, or searched one on top of another.
    """

    JOINT = "joint"
    SUM = "sum"
    AFTER = "after"


def _day(name: str, text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise UsageError(f"{name} {text} is not a date", hint=f"{name} = 2026-11-01") from None


BOUNDS: dict[str, Any] = {"metavar": "BOUND", "read": read_assertions, "panel": EVALUATION}


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalRequest:
    """A request to remove a concept, with the bounds that its removal must meet."""

    name: str = option(..., help="Name of the request, and of its set and edit.")
    concept: str = option("", help="What to forget.", without="the name")
    aliases: Sequence[str] = option((), help="Other words for the concept in captions.")
    exclusions: Sequence[str] = option((), help="Skip captions with these words.")
    sources: Sequence[str] = option((), help="Its own sources.", without="those of [sets]")
    id: str | None = option(None, help="Its number in another system.")
    received: str | None = option(None, help="Day it was received.", read=_day, metavar="DATE")
    reference: str | None = option(None, help="The requester's own reference.")
    note: str | None = option(None, help="A note for your records.")
    targets: Sequence[Path] = option((), help="Models built on CLIP to edit as well.")
    bounds: tuple[Assertion, ...] = option(
        (),
        help="Limits on figures: `fa1 <= 0`, `loss.SET <= 0.5`, `attack.prefix <= 10`.",
        **BOUNDS,
    )

    def __post_init__(self) -> None:
        """Default the concept to the name. Raises UsageError."""
        check_name(self.name)
        if not self.concept:
            object.__setattr__(self, "concept", self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRows:
    """One evaluation set: its images, its classes and its prompts."""

    source: str = option(..., help="Labelled images to measure on.", panel=EVALUATION)
    classes: str | None = option(None, help="Class names: a file, or `imagenet`.", panel=EVALUATION)
    templates: str | None = option(None, help="Prompts: a file or a built-in.", panel=EVALUATION)
    test: str | None = option(
        None, help="Source of test images.", panel=EVALUATION, without="a share of the source"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where a run writes its outputs. An output without a path is not written."""

    checkpoint: Path | None = option(
        None, help="Checkpoint without the requested concepts.", panel=OUTPUT
    )
    targets: Path | None = option(
        None, help="Folder for edited copies of `targets`, each under its own name.", panel=OUTPUT
    )
    edits: Path | None = option(None, help="Folder for the edits.", panel=OUTPUT)
    lora: Path | None = option(
        None,
        panel=OUTPUT,
        help="One LoRA of all edits: a .safetensors file for A1111, ComfyUI and diffusers, or "
        "PEFT's folder.",
    )
    report: Path | None = option(None, help="HTML report.", panel=OUTPUT)
    evidence: Path | None = option(
        None, help="Folder for the evidence of all requests.", panel=OUTPUT
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceRequest:
    """The arguments of `evidence`."""

    names: Sequence[str] = option(..., metavar="NAME...|all", help="Names of requests, or `all`.")
    out: Path = option(..., "--out", "-o", help="Folder for the evidence.", panel=OUTPUT)
    recipe: Path = option(
        ..., "--recipe", metavar="FILE", help="Recipe of these requests, once it has been run."
    )
    overwrite: bool = OVERWRITE()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A removal job.

    `sets` describes the data of every request; `{}` in a source stands for the concept. With
    `shared_retain`, all requests share one retain set without any of their concepts. `bounds`
    apply to every request, in addition to its own.
    """

    name: str
    model: ModelSpec
    sets: BuildRequest
    grad: PassOptions = PassOptions()
    rank: RankOptions = RankOptions()
    search: SearchOptions = SearchOptions()
    verify: VerifyRequest | None = None
    together: Together = Together.JOINT
    shared_retain: bool = False
    bounds: tuple[Assertion, ...] = ()
    requests: tuple[RemovalRequest, ...] = ()
    outputs: Outputs = Outputs()

    def __post_init__(self) -> None:
        """Check the recipe for contradictions. Raises UsageError."""
        check_name(self.name)
        for name in self.names:
            if self.names.count(name) > 1:
                raise UsageError(f"there are two requests {name}", hint="give it once")
        places = [target.resolve().name for target in self.targets()]
        if twice := [place for place in places if places.count(place) > 1]:
            raise UsageError(
                f"two targets are called {twice[0]}", hint="rename one: its copy has the same name"
            )
        if not self.sets.evals:
            raise UsageError("there is no evaluation set", hint="add a table [evaluation.NAME]")
        text_only = self.rank.tower is Tower.TEXT or self.rank.target or self.search.layers
        if self.outputs.lora and not text_only:
            raise UsageError(
                "a LoRA needs linear layers of the text tower, but other layers are ranked too",
                hint='[rank] tower = "text" and include = ["resblocks"]',
            )
        for request in self.requests:
            self._check(request)

    def _check(self, request: RemovalRequest) -> None:
        if not (request.sources or self.sets.sources):
            raise UsageError(f"the request {request.name} has no sources", hint="[sets] sources")
        if request.targets and self.outputs.targets is None:
            raise UsageError(
                f"the request {request.name} has targets, but there is no folder for their copies",
                hint='[outputs] targets = "FOLDER"',
            )
        require_known(
            self.bounds_of(request),
            [request.name],
            self.sets.evals,
            compared=True,
            further=BOUNDED,
            said=f"the bound of {request.name}",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the requests, in order."""
        return tuple(request.name for request in self.requests)

    @property
    def written(self) -> ModelSpec | None:
        """How to load the checkpoint output; None without one."""
        out = self.outputs.checkpoint
        return None if out is None else written_at(self.model, out)

    def targets(self) -> list[Path]:
        """Return every target of a request, sorted."""
        return sorted({target for request in self.requests for target in request.targets})

    def request(self, name: str) -> RemovalRequest:
        """Return the request of a name. Raises UsageError."""
        for request in self.requests:
            if request.name == name:
                return request
        raise UsageError(
            f"the recipe {self.name} has no request {name}",
            hint=near(name, self.names) or f"its requests: {', '.join(self.names) or 'none'}",
        )

    def bounds_of(self, request: RemovalRequest) -> tuple[Assertion, ...]:
        """Return all bounds of a request."""
        return (*self.bounds, *request.bounds)

    def checks_of(self, request: RemovalRequest) -> tuple[Check, ...]:
        """Return the checks to run for a request: those of [verify] and those its bounds need."""
        figures = {bound.figure for bound in self.bounds_of(request)}
        bounded = {check for figure, check in BOUNDED.items() if figure in figures}
        listed = self.verify.checks if self.verify else ()
        return tuple(check for check in Check if check in {*listed, *bounded})

    def verification_of(self, name: str) -> VerifyRequest:
        """Return how to verify a request: on the checkpoint output, or else with its edit."""
        options = self.verify or VerifyRequest(device=self.search.device)
        return replace(options, model=self.written, checks=self.checks_of(self.request(name)))

    def set_of(self, request: RemovalRequest) -> BuildRequest:
        """Return how to build the set of a request."""
        excluded = [*self.sets.retain_exclude]
        if self.shared_retain:
            excluded += [word for each in self.requests for word in (each.concept, *each.aliases)]
        sources = request.sources or self.sets.sources
        return replace(
            self.sets,
            name=request.name,
            concept=request.concept,
            model=self.model,
            match=(request.concept, *request.aliases) if request.aliases else (),
            not_match=tuple(request.exclusions),
            sources=tuple(text.replace(CLASS, quote(request.concept)) for text in sources),
            retain_exclude=tuple(dict.fromkeys(excluded)),
        )


def figure_of(bound: Assertion, name: str) -> str:
    """Return what a bound's figure is called in an evaluation of several requests."""
    return f"{bound.figure}.{name}" if bound.figure in ("fa1", "fa5") else bound.figure
