"""A recipe: models, rows, options, removal requests and outputs of one job; and its ledger.

A recipe is TOML. Its tables are read into the records that commands are asked with, by the
names of their fields; what a table holds that no field takes is refused with its line.
"""

import re
import tomllib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

from slsgu_cli.errors import InputError, MissingError, UsageError, near
from slsgu_cli.records.codec import added
from slsgu_cli.records.figures import Accuracy, Assertion, PassTime, read_assertions, require_known
from slsgu_cli.records.method import Tower
from slsgu_cli.records.options import (
    OVERWRITE,
    BuildRequest,
    PassOptions,
    RankOptions,
    SearchOptions,
)
from slsgu_cli.records.sets import LOCAL, ModelSpec, check_name
from slsgu_cli.records.studies import CLASS
from slsgu_cli.records.verification import ATTACK, ATTACKED, CHECKS, Check, VerifyRequest
from slsgu_cli.records.words import (
    EVALUATION,
    OUTPUT,
    ROWS,
    OptionField,
    build,
    command_line,
    option,
    option_fields,
)


class Together(StrEnum):
    """How the edits of several requests come into one checkpoint.

    Searched jointly; each by itself, and their sum; or each on top of those before it.
    """

    JOINT = "joint"
    SUM = "sum"
    AFTER = "after"


def _day(name: str, text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise UsageError(f"{name} {text} is no date", hint=f"{name} = 2026-11-01") from None


BOUNDS: dict[str, Any] = {"metavar": "BOUND", "read": read_assertions, "panel": EVALUATION}


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalRequest:
    """What somebody asked to be removed, and when that is done.

    `concept` is the class's name, the request's own by default. `reference` is whatever the
    requester knows it by. With `sources`, its forget rows come from there.
    """

    name: str = option(..., help="Name of the request, and of its set and edit.")
    concept: str = option("", help="What to forget.", without="the name")
    aliases: Sequence[str] = option((), help="Other words that captions name it by.")
    exclusions: Sequence[str] = option((), help="Captions with these words are of something else.")
    sources: Sequence[str] = option((), help="Its own sources.", without="those of [sets]")
    id: str | None = option(None, help="Its number in another system.")
    received: str | None = option(None, help="Day it was received.", read=_day, metavar="DATE")
    reference: str | None = option(None, help="What the requester knows it by.")
    note: str | None = option(None, help="Anything to remember.")
    targets: Sequence[Path] = option((), help="Models built on CLIP to take it out of, too.")
    bounds: tuple[Assertion, ...] = option(
        (),
        help="What figures must be: `fa1 <= 0`, `loss.SET <= 0.5`, `attack.prefix <= 10`.",
        **BOUNDS,
    )

    def __post_init__(self) -> None:
        """Take the name for the concept where there is no other. Raises UsageError."""
        check_name(self.name)
        if not self.concept:
            object.__setattr__(self, "concept", self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRows:
    """One evaluation set: where its rows are, and what they are compared with."""

    source: str = option(..., help="Labelled images to measure on.", panel=EVALUATION)
    classes: str | None = option(None, help="Class names: a file, or `imagenet`.", panel=EVALUATION)
    templates: str | None = option(None, help="Prompts: a file or a built-in.", panel=EVALUATION)
    test: str | None = option(
        None, help="Other rows for the figures.", panel=EVALUATION, without="a share of the source"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What a run writes beside its store: nothing, as long as nothing is named."""

    checkpoint: Path | None = option(None, help="The model without all of them.", panel=OUTPUT)
    targets: Path | None = option(
        None, help="Folder of the models of `targets`, each by its name.", panel=OUTPUT
    )
    edits: Path | None = option(None, help="Folder of their edits.", panel=OUTPUT)
    lora: Path | None = option(
        None,
        panel=OUTPUT,
        help="One LoRA of all edits: a .safetensors file for A1111, ComfyUI and diffusers, or "
        "PEFT's folder.",
    )
    report: Path | None = option(None, help="HTML page of what was done.", panel=OUTPUT)
    evidence: Path | None = option(
        None, help="Folder of the evidence of all requests, to be filed.", panel=OUTPUT
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceRequest:
    """What `evidence` is asked for: of which requests, and which models are without them.

    `by_reference` keeps names, captions and images out of what is written.
    """

    names: Sequence[str] = option(
        ..., metavar="NAME...|all", help="Requests, or `all` there are.", completes="set"
    )
    out: Path = option(..., "--out", "-o", help="Folder for the evidence.", panel=OUTPUT)
    recipe: Path | None = option(
        None,
        "--recipe",
        metavar="FILE",
        help="Recipe that the requests are of.",
        without="the one that has them",
    )
    models: Sequence[Path] = option(
        (),
        "--model",
        "-m",
        help="A model that was written without them.",
        metavar="MODEL",
        without="the recipe's outputs",
    )
    by_reference: bool = option(
        False,
        "--by-reference",
        panel=OUTPUT,
        help="Names are confidential: tell references, no captions, no images.",
    )
    overwrite: bool = OVERWRITE()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A job of removals. `sets` is of no concept: its sources may hold `{}` for one.

    With `shared_retain`, the rows to retain are about none of the requests, and all share them:
    one gradient, which is computed anew for every request that comes or goes. `bounds` are of
    every request beside its own. What is to be tried to bring a concept back is that of
    `verify`, and what bounds are about.
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
    by_reference: bool = False
    bounds: tuple[Assertion, ...] = ()
    requests: tuple[RemovalRequest, ...] = ()
    outputs: Outputs = Outputs()

    def __post_init__(self) -> None:
        """Refuse what contradicts itself. Raises UsageError."""
        check_name(self.name)
        names = self.names
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"the request {name} is there twice", hint="give it once")
        places = [target.resolve().name for target in self.targets()]
        if twice := [place for place in places if places.count(place) > 1]:
            raise UsageError(f"two targets are called {twice[0]}", hint="copies go by their names")
        if not self.sets.evals:
            raise UsageError("there is no evaluation set", hint="add a table [evaluation.NAME]")
        of_text = self.rank.tower is Tower.TEXT or self.rank.target or self.search.layers
        if self.outputs.lora and not of_text:
            raise UsageError(
                "a LoRA is of linear modules of the text tower, and other layers are ranked too",
                hint='[rank] tower = "text" and include = ["resblocks"]',
            )
        for request in self.requests:
            if not (request.sources or self.sets.sources):
                raise UsageError(
                    f"the request {request.name} has no sources", hint="[sets] sources"
                )
            if self.by_reference and not (request.reference or request.id):
                raise UsageError(
                    f"the request {request.name} has no reference to be told by",
                    hint='reference = "...", or id = "..."',
                )
            if request.targets and self.outputs.targets is None:
                raise UsageError(
                    f"the request {request.name} has targets, and nothing says where they go",
                    hint='[outputs] targets = "FOLDER"',
                )
            require_known(
                self.bounds_of(request),
                [request.name],
                self.sets.evals,
                compared=True,
                further=[f"{ATTACK}{check}" for check in ATTACKED],
                said=f"the bound of {request.name}",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the requests, in their order."""
        return tuple(request.name for request in self.requests)

    def targets(self) -> list[Path]:
        """Return the models built on CLIP that some request is to be taken out of, in order."""
        return sorted({target for request in self.requests for target in request.targets})

    def request(self, name: str) -> RemovalRequest:
        """Return the request of a name. Raises UsageError."""
        for request in self.requests:
            if request.name == name:
                return request
        raise UsageError(
            f"the recipe {self.name} has no request {name}",
            hint=near(name, self.names) or f"it has {', '.join(self.names) or 'none'}",
        )

    def words(self, command: str, names: Sequence[str]) -> list[str]:
        """Return the options that a command is given for some requests. Raises UsageError."""
        if command == "build-sets":
            asked = self.set_of(self.request(names[0] if names else ""))
            options = [each.name for each in fields(asked) if each.name != "name"]
            return command_line(asked, fields=options)
        if command == "eval":
            bounds = {
                str(replace(bound, figure=figure_of(bound, name)) if len(names) > 1 else bound)
                for name in names
                for bound in self.bounds_of(self.request(name))
                if not bound.figure.startswith(ATTACK)
            }
            return [word for bound in sorted(bounds) for word in ("--assert", bound)]
        out = self.outputs
        places = {"apply": out.checkpoint, "report": out.report, "evidence": out.evidence}
        if command in places:
            return ["--out", str(places[command])] if places[command] else []
        if command == "verify":
            asked_of = self.verification_of(names[0] if names else "")
            return command_line(asked_of if asked_of.checks else replace(asked_of, checks=CHECKS))
        records = {"grad": self.grad, "rank": self.rank}
        return command_line(records.get(command, self.search))

    def bounds_of(self, request: RemovalRequest) -> tuple[Assertion, ...]:
        """Return what figures must be for a request."""
        return (*self.bounds, *request.bounds)

    def checks_of(self, request: RemovalRequest) -> tuple[Check, ...]:
        """Return which checks a request is put to: those of [verify] and of its bounds."""
        figures = {bound.figure for bound in self.bounds_of(request)}
        bounded = {check for check in ATTACKED if f"{ATTACK}{check}" in figures}
        asked = self.verify.checks if self.verify else ()
        return tuple(check for check in Check if check in {*asked, *bounded})

    @property
    def written(self) -> ModelSpec | None:
        """The model that is written without the requests, None where none is."""
        out = self.outputs.checkpoint
        return None if out is None else written_at(self.model, out)

    def verification_of(self, name: str) -> VerifyRequest:
        """Return what is tried to bring a request back: of the written model, else of its edit."""
        asked = self.verify or VerifyRequest(device=self.search.device)
        return replace(asked, model=self.written, checks=self.checks_of(self.request(name)))

    def set_of(self, request: RemovalRequest) -> BuildRequest:
        """Return the set to build for a request."""
        from urllib.parse import quote

        sources = [*(request.sources or self.sets.sources)]
        excluded = [*self.sets.retain_exclude]
        if self.shared_retain:
            excluded += [word for each in self.requests for word in (each.concept, *each.aliases)]
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


def written_at(model: ModelSpec, place: Path) -> ModelSpec:
    """Return what a copy of a model is loaded by: a folder, or a file of weights."""
    return ModelSpec(model.name, str(place)) if place.is_file() else ModelSpec(f"{LOCAL}{place}")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a recipe: the record it is read into, what it is for, and fields it has not.

    There may be `many`, in a row or by a name of their own.
    """

    kind: type
    about: str
    omit: Collection[str] = ()
    many: bool = False

    def places(self) -> dict[str, OptionField]:
        """Return the options of the table by their keys, each called by its key, once."""
        keyed = {
            each.path[-1]: each
            for each in option_fields(self.kind)
            if each.path[0] not in self.omit
        }
        return {
            key: replace(each, option=replace(each.option, flags=(key,)))
            for key, each in keyed.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Top:
    """The keys of a recipe before its first table."""

    name: str = option("", help="Name of the recipe.", without="that of the file")
    model: str = option(..., help="The model, as for --model.")
    pretrained: str | None = option(None, help="Weights of a model name, as for --pretrained.")
    bounds: tuple[Assertion, ...] = option((), help="Bounds of every request.", **BOUNDS)
    together: Together = option(
        Together.JOINT, help="Search requests jointly, each alone (sum), or each after the others."
    )
    shared_retain: bool = option(
        False, help="One retain set for all requests, about none of them.", panel=ROWS
    )
    by_reference: bool = option(
        False, help="Names are confidential: evidence tells references alone.", panel=OUTPUT
    )


TOP = Table(_Top, "A removal job: model, rows, options, requests, outputs.")
# Without the fields that a recipe says elsewhere, or has no use for.
OF_REQUEST = ("name", "concept", "model", "match", "not_match", "collect", "dropped")
OF_EVALUATION = ("evals", "classes", "templates", "tests", "forget_eval")
TABLES = {
    "sets": Table(BuildRequest, "Where rows come from.", (*OF_REQUEST, *OF_EVALUATION)),
    "evaluation": Table(EvaluationRows, "What to measure on, by name.", many=True),
    "grad": Table(PassOptions, "How gradients are computed.", ("shard",)),
    "rank": Table(RankOptions, "How layers are ranked.", ("shard",)),
    "search": Table(SearchOptions, "How edits are searched.", ("after", "shard")),
    "verify": Table(VerifyRequest, "What is tried to bring it back.", ("model", "edits")),
    "request": Table(RemovalRequest, "Something to remove.", many=True),
    "outputs": Table(Outputs, "What is written."),
}


def figure_of(bound: Assertion, name: str) -> str:
    """Return the figure that a bound of a request is about where those of several are named."""
    return f"{bound.figure}.{name}" if bound.figure in ("fa1", "fa5") else bound.figure


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a TOML file. Raises MissingError, InputError."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise MissingError(f"there is no recipe {path}", hint=f"slsgu init {path}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the recipe {path}: {error}") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, path: str) -> Recipe:
    """Return the recipe that a text is, which lies at `path`. Raises InputError."""
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    return _Reading(text, path).recipe(content)


@dataclass(frozen=True, slots=True)
class _Reading:
    """A recipe's text while it is read, so that what is wrong with it is told with its line."""

    text: str
    path: str

    def recipe(self, content: dict[str, Any]) -> Recipe:
        """Return the recipe. Raises InputError."""
        above = {key: value for key, value in content.items() if key not in TABLES}
        top: _Top = self._record(TOP, above, "")
        by_name: dict[str, Any] = self._tables(content, "evaluation", dict)
        requests: list[Any] = self._tables(content, "request", list)
        read = {
            key: self._record(table, content.get(key, {}), key)
            for key, table in TABLES.items()
            if not table.many
        }
        evaluation = {
            name: self._record(TABLES["evaluation"], value, f"evaluation.{name}")
            for name, value in by_name.items()
        }
        listed = tuple(
            self._record(TABLES["request"], value, "request", number)
            for number, value in enumerate(requests)
        )
        read["sets"] = replace(
            read["sets"],
            evals={name: each.source for name, each in evaluation.items()},
            classes={n: each.classes for n, each in evaluation.items() if each.classes},
            templates={n: each.templates for n, each in evaluation.items() if each.templates},
            tests={n: each.test for n, each in evaluation.items() if each.test},
        )
        if "verify" not in content:
            read["verify"] = None
        try:
            return Recipe(
                name=top.name or Path(self.path).stem,
                model=ModelSpec(top.model, top.pretrained),
                together=top.together,
                shared_retain=top.shared_retain,
                by_reference=top.by_reference,
                bounds=top.bounds,
                requests=listed,
                **read,
            )
        except UsageError as error:
            raise InputError(f"{self.path}: {error.message}", hint=error.hint) from error

    def _tables(self, content: dict[str, Any], key: str, kind: type) -> Any:
        value = content.get(key, kind())
        inner = value.values() if isinstance(value, dict) else value
        fits = isinstance(value, kind) and all(isinstance(each, dict) for each in inner)
        if not fits:
            header = f"[[{key}]]" if kind is list else f"[{key}.NAME]"
            self._refuse(f"{key} is no table", "", key, hint=f"begin each with {header}")
        return value

    def _record(self, table: Table, given: Any, at: str, number: int = 0) -> Any:
        """Return the record that a table is. Raises InputError."""
        if not isinstance(given, dict):
            self._refuse(f"{at} is no table", "", at, hint=f"[{at}]")
        listed = table.places()
        values = {}
        for key, value in given.items():
            if key not in listed:
                about = f"[{at}] has no key" if at else "a recipe has no key or table"
                names = sorted(listed) if at else [*listed, *TABLES]
                hint = near(key, names) or f"it takes {', '.join(names)}"
                self._refuse(f"{about} {key}", at, key, number, hint=hint)
            values[listed[key].path] = self._value(listed[key], value, at, number)
        for key, place in listed.items():
            if place.required and key not in given:
                self._refuse(
                    f"{f'[{at}]' if at else 'it'} has no {key}",
                    at,
                    key,
                    number,
                    hint=f"{key}: {place.option.help.rstrip('.')}",
                )
        try:
            return build(table.kind, values)
        except UsageError as error:
            self._refuse(error.message, at, "name", number, hint=error.hint)

    def _value(self, place: OptionField, value: Any, at: str, number: int) -> Any:
        """Return the value of a key. Raises InputError where it is of another kind."""
        key = place.path[-1]
        if place.is_flag:
            if not isinstance(value, bool):
                self._refuse(f"{key} is neither true nor false", at, key, number)
            return value
        try:
            if not place.repeatable:
                return place.value(_word(place, value))
            if not isinstance(value, list):
                raise UsageError(f"{key} is no list", hint=f'{key} = ["..."]')
            return place.value([_word(place, each) for each in value])
        except UsageError as error:
            self._refuse(error.message, at, key, number, hint=error.hint)

    def _refuse(
        self, message: str, at: str, key: str, number: int = 0, *, hint: str | None = None
    ) -> NoReturn:
        raise InputError(f"{self.path}, line {self._line(at, key, number)}: {message}", hint=hint)

    def _line(self, at: str, key: str, number: int) -> int:
        """Return the line of a key of the `number`th table `at`, or else where that begins."""
        begun, inside, found = -1, not at, 1
        said = re.compile(rf"\s*([\"']?){re.escape(key)}\1\s*[.=]")
        for place, line in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[\[?([^\]]+)\]", line):
                name = ".".join(part.strip().strip("\"'") for part in header[1].split("."))
                begun += name == at
                inside = name == at and begun == number
                if inside or (not at and key in (name, name.partition(".")[0])):
                    found = place
                    if not at:
                        return found
            elif inside and said.match(line):
                return place
        return found


def _word(place: OptionField, value: Any) -> str:
    """Return a value of TOML as a word of the command line. Raises UsageError."""
    key, kind = place.path[-1], place.metavar
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{key} is not of one value each", hint=f"{key}: {place.option.help}")
    numeric = kind in ("N", "NUMBER")
    if isinstance(value, str) == numeric and place.option.read is None:
        raise UsageError(f"{key} {value!r} is {'no number' if numeric else 'no text'}")
    return value if isinstance(value, str) else repr(value)


class Stage(StrEnum):
    """What a run does, in its order."""

    SET = "build-sets"
    GRADIENTS = "grad"
    RANKING = "rank"
    SEARCH = "search"
    VERIFICATION = "verify"
    CHECKPOINT = "apply"
    TARGET = "apply --target"
    EDITS = "edits"
    LORA = "export"
    FIGURES = "eval"
    REPORT = "report"
    EVIDENCE = "evidence"

    @property
    def writes_model(self) -> bool:
        """Whether it writes a model without something."""
        return self in (Stage.CHECKPOINT, Stage.TARGET)


@dataclass(frozen=True, slots=True)
class StageRecord:
    """A stage that was done: for which requests, from what, and a digest of what it made.

    `asked` has digests of its options and of what it was made from. `place` is where an output
    was written, `origin` the target that it is a copy of. `memory` is the most bytes that were in
    use meanwhile, of the GPU where it ran on one.
    """

    stage: Stage
    names: tuple[str, ...]
    place: str | None
    asked: dict[str, str]
    made: str
    took: PassTime
    origin: str | None = added(None)
    memory: int | None = added(None)

    @property
    def key(self) -> tuple[str, tuple[str, ...], str | None]:
        """What tells it from other stages; outputs are of whatever requests there are."""
        return self.stage, () if self.place else self.names, self.place


class RequestState(StrEnum):
    """Where a removal request stands."""

    OPEN = "open"
    FORGOTTEN = "forgotten within bounds"
    OUT_OF_BOUNDS = "out of bounds"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """What became of a request on a day; `digests` of its edit and of the outputs by then."""

    day: str
    state: RequestState
    digests: dict[str, str]


@dataclass(frozen=True, slots=True)
class BoundCheck:
    """A bound, the figure it is about, and whether it holds.

    A check that could not be made has no figure, and a bound on it does not hold.
    """

    bound: str
    figure: float | None
    holds: bool


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """A request as the ledger keeps it, whether the recipe still has it or not."""

    name: str
    concept: str
    id: str | None
    received: str | None
    reference: str | None
    note: str | None
    state: RequestState
    events: tuple[RequestEvent, ...]
    layer: str | None = None
    before: Accuracy | None = None
    after: Accuracy | None = None
    checks: tuple[BoundCheck, ...] = ()


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a recipe's runs have done so far: stages, and what became of each request.

    `original` and `figures` are the last ones measured, by the names that bounds have; `kept` is
    the accuracy on each evaluation set then. Evidence names requests `by_reference` alone.
    """

    name: str
    model: ModelSpec
    stages: tuple[StageRecord, ...]
    rows: tuple[LedgerRow, ...]
    version: str
    original: dict[str, float] = added(factory=dict)
    figures: dict[str, float] = added(factory=dict)
    kept_before: dict[str, Accuracy] = added(factory=dict)
    kept: dict[str, Accuracy] = added(factory=dict)
    by_reference: bool = added(False)

    def about(self) -> dict[str, str]:
        """Return in words what it is of."""
        counts = {state: sum(row.state is state for row in self.rows) for state in RequestState}
        told = {state.value: str(count) for state, count in counts.items() if count}
        return {"model": str(self.model), **told}

    def stage(self, key: tuple[str, tuple[str, ...], str | None]) -> StageRecord | None:
        """Return the record of a stage; None where it was not done."""
        return next((each for each in self.stages if each.key == key), None)

    def with_stage(self, record: StageRecord) -> "Ledger":
        """Return the ledger with a stage that was done."""
        others = tuple(each for each in self.stages if each.key != record.key)
        return replace(self, stages=(*others, record))

    def with_rows(self, rows: Iterable[LedgerRow]) -> "Ledger":
        """Return the ledger with these rows in the place of those of their names, in order."""
        by_name = {row.name: row for row in (*self.rows, *rows)}
        return replace(self, rows=tuple(by_name[name] for name in sorted(by_name)))


FIELDS_OF_ROW = ("name", "concept", "id", "received", "reference", "note")
