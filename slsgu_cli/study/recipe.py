"""Which steps a recipe takes, which of them are done, and which cannot be done.

A step is done where the ledger has it as it is asked for now, and what it made still stands.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Self

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.destinations import all_files
from slsgu_cli.checkpoints.lora import modules_of
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.clip.devices import device_name, pick_device
from slsgu_cli.clip.model_folder import require_weights
from slsgu_cli.clip.models import contents, fingerprint, resolve
from slsgu_cli.errors import SlsguError
from slsgu_cli.records.codec import decode, digest, encode
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.recipe import (
    Ledger,
    Recipe,
    RemovalRequest,
    RequestState,
    Stage,
    Together,
    read_recipe,
)
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.sets.preview import Preview
from slsgu_cli.sets.source_digest import source_digest
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.catalog import Catalog, Standing, typical_sizes
from slsgu_cli.store.digests import file_sha256
from slsgu_cli.store.store import Store

# What a stage of requests leaves in the store.
KINDS = {
    Stage.SET: Artifact.SET,
    Stage.GRADIENTS: Artifact.POINTER,
    Stage.RANKING: Artifact.RANKING,
    Stage.SEARCH: Artifact.EDIT,
    Stage.VERIFICATION: Artifact.VERIFICATION,
}
# What of it takes room on the disk, for each request.
LEFT = {
    Stage.SET: (Artifact.SET, Artifact.DATA),
    Stage.GRADIENTS: (Artifact.GRADIENT,),
    Stage.RANKING: (Artifact.RANKING, Artifact.COVARIANCE),
    Stage.SEARCH: (Artifact.EDIT, Artifact.TRIALS),
    Stage.VERIFICATION: (Artifact.VERIFICATION,),
    Stage.EDITS: (Artifact.EDIT,),
    Stage.FIGURES: (),
}
# Options that change nothing of what is made.
SPEED = ("device", "memory_budget", "cache_budget")


@dataclass(frozen=True, slots=True)
class Step:
    """One stage for one request, for several, or of one output."""

    stage: Stage
    names: tuple[str, ...]
    place: Path | None = None

    @property
    def key(self) -> tuple[str, tuple[str, ...], str | None]:
        """What the ledger finds it by."""
        place = None if self.place is None else str(self.place)
        return self.stage, self.names if place is None else (), place

    @property
    def about(self) -> str:
        """What it is for, in a few words."""
        if self.place is not None:
            return str(self.place)
        return self.names[0] if len(self.names) == 1 else f"{len(self.names)} requests"


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step, why it is to be done (None where it is done), and why it cannot be.

    What it takes is known from such steps in this store: `seconds` by their median, `memory` by
    the largest of them with this model, `disk` by what lies there. None where nothing is.
    """

    step: Step
    why: str | None
    trouble: str | None = None
    seconds: float | None = None
    memory: int | None = None
    disk: int | None = None


@dataclass(slots=True)
class Lacking(Exception):
    """What a step is made from is not there yet."""

    what: str


class RecipePlan:
    """A recipe with its store and its ledger: the steps it takes, and how each of them stands."""

    def __init__(self, store: Store, recipe: Recipe) -> None:
        self.store, self.recipe = store, recipe
        self.path = Artifact.LEDGER.path(recipe.name)
        self.ledger = self.read_ledger()
        self.catalog = Catalog(store)
        # Of source files, while nothing but looking at them is done.
        self._identities: dict[Any, Any] | None = None

    @classmethod
    def of(cls, recipe: Recipe | str | Path, store: Store | str) -> Self:
        """Return the plan of a recipe, or of that in a file. Raises InputError, UsageError."""
        read = recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe))
        return cls(Store(store) if isinstance(store, str) else store, read)

    @cached_property
    def weights(self) -> str:
        """The fingerprint of the original model. Raises InputError, MissingError."""
        return fingerprint(resolve(self.recipe.model))

    @cached_property
    def device(self) -> str:
        """What searches run on."""
        return device_name(pick_device(self.recipe.search.device))

    def read_ledger(self) -> Ledger:
        """Return the ledger as it is in the store, or an empty one."""
        if self.store.exists(self.path):
            return self.store.read_record(self.path, Ledger)
        return Ledger(self.recipe.name, self.recipe.model, (), (), slsgu_cli.__version__)

    def steps(self) -> list[Step]:
        """Return everything that the recipe asks for, in order."""
        recipe, names, out = self.recipe, self.recipe.names, self.recipe.outputs
        steps = [Step(Stage.SET, (name,)) for name in names]
        for name in names:
            steps += [Step(Stage.GRADIENTS, (name,)), Step(Stage.RANKING, (name,))]
        searches = [names] if recipe.together is Together.JOINT else [(name,) for name in names]
        steps += [Step(Stage.SEARCH, each) for each in searches if each]
        if out.checkpoint:
            steps.append(Step(Stage.CHECKPOINT, names, out.checkpoint))
        copies = {
            (out.targets or Path()) / target.resolve().name: tuple(
                request.name for request in recipe.requests if target in request.targets
            )
            for target in recipe.targets()
        }
        # Of a target that no request names any more, the copy is made anew without edits.
        left = {Path(e.place): () for e in self.ledger.stages if e.origin and e.place}
        steps += [Step(Stage.TARGET, who, at) for at, who in sorted({**left, **copies}.items())]
        if out.edits:
            steps.append(Step(Stage.EDITS, names, out.edits))
        if out.lora and (names or self.ledger.stage(Step(Stage.LORA, (), out.lora).key)):
            steps.append(Step(Stage.LORA, names, out.lora))
        if names:
            steps.append(Step(Stage.FIGURES, names))
        checked = [request.name for request in recipe.requests if recipe.checks_of(request)]
        steps += [Step(Stage.VERIFICATION, (name,)) for name in checked]
        for stage, place in ((Stage.REPORT, out.report), (Stage.EVIDENCE, out.evidence)):
            if place and names:
                steps.append(Step(stage, names, place))
        return steps

    def asked(self, step: Step) -> dict[str, str]:
        """Return digests of a step's options and of what it is made from. Raises Lacking."""
        recipe, get = self.recipe, self.record
        sets = [get(Artifact.SET, name) for name in step.names] if step.stage != Stage.SET else []
        if step.stage is Stage.SET:
            request = recipe.set_of(recipe.request(step.names[0]))
            known = {} if self._identities is None else self._identities
            return {"rows or classes": source_digest(request, known), "weights": self.weights}
        if step.stage is Stage.GRADIENTS:
            rows = [sets[0].forget.fingerprint, sets[0].retain.fingerprint]
            return {"options": _options(recipe.grad), "rows": digest(rows), "weights": self.weights}
        if step.stage is Stage.RANKING:
            pointer = get(Artifact.POINTER, step.names[0])
            gradients = digest([pointer.forget, pointer.retain, pointer.retain_data])
            return {"options": _options(recipe.rank), "gradients": gradients}
        if step.stage is Stage.SEARCH:
            rankings = [self._digest(Artifact.RANKING, name) for name in step.names]
            measured = [manifest.evaluation_blocks() for manifest in sets]
            return {
                "requests": digest(step.names),
                "options": digest([recipe.together, _options(recipe.search)]),
                "ranking": digest(rankings),
                "evaluation rows": digest(measured),
                "earlier edits": self._edits(self.before(step)),
            }
        asked = {"edits": self._edits(step.names), "weights": self.weights}
        if step.stage is Stage.TARGET:
            asked["target"] = _stamps(self.target(step))
        pages = (Stage.REPORT, Stage.EVIDENCE)
        if step.stage is Stage.VERIFICATION:
            # The model that was written has the edits of all.
            asked["edits"] = self._edits(recipe.names)
            asked["options"] = _options(recipe.verification_of(step.names[0]))
        if step.stage in (Stage.FIGURES, Stage.VERIFICATION, *pages):
            asked["evaluation rows"] = digest([each.evaluation_blocks() for each in sets])
            asked["checkpoint"] = self._shipped()
        if step.stage is Stage.EVIDENCE:
            requests = [recipe.request(name) for name in step.names]
            asked["requests"] = digest([recipe.by_reference, *map(_texts_of, requests)])
            asked["bounds"] = digest([str(bound) for bound in recipe.bounds])
            asked["targets"] = digest([str(path) for path in recipe.targets()])
        if step.stage in pages:
            checked, kind = self.catalog.get, Artifact.VERIFICATION
            checks = [checked(kind, n) and self._digest(kind, n) for n in step.names]
            asked["verifications"] = digest(checks)
        return asked

    def made(self, step: Step) -> str:
        """Return a digest of what a step made, as it is there now. Raises Lacking."""
        if step.stage is Stage.FIGURES:
            return digest(self.ledger.figures)
        if step.place is None:
            return digest([self._digest(KINDS[step.stage], name) for name in step.names])
        if step.stage is Stage.EDITS:
            files = {name: step.place / f"{name}.safetensors" for name in step.names}
        elif step.stage is Stage.LORA and not step.names:
            files = {}  # The LoRA of no request is none.
        else:
            files = _files(step.place)
        return digest({name: file_sha256(path) for name, path in files.items()})

    def why(self, step: Step) -> str | None:
        """Return why a step is to be done; None where it is done and stands."""
        record = self.ledger.stage(step.key)
        try:
            asked = self.asked(step)
            if record is None or not record.made:
                return "not done yet"
            others = [what for what, now in asked.items() if record.asked.get(what) != now]
            if others:
                return f"other {', '.join(others)} than before"
            if trouble := self._fallen(step):
                return trouble
            if step.stage is not Stage.SET and self.made(step) != record.made:
                return "what it made was made otherwise since"
        except Lacking as lacking:
            return f"waits for the {lacking.what}" if record is None else f"no {lacking.what}"
        except SlsguError as error:
            return error.message
        except OSError as error:
            return f"what it made cannot be read: {error.strerror or error}"
        return None

    def _fallen(self, step: Step) -> str | None:
        """Return why what a step left in the store cannot be used; None where it can."""
        if step.stage not in KINDS:
            return None
        kind = KINDS[step.stage]
        for name in step.names:
            record = self.record(kind, name)
            state, reason = self.catalog.standing(kind, name, record)
            if state is not Standing.OK:
                return reason
            if isinstance(record, SetManifest) and not self._is_as_asked(record):
                return "the set was built otherwise since"
        return None

    def _is_as_asked(self, manifest: SetManifest) -> bool:
        """Return whether a set was built as the recipe says, rows dropped by hand aside."""
        wanted = self.recipe.set_of(self.recipe.request(manifest.name))
        built = decode(BuildRequest, manifest.request) if manifest.request else None
        return built is not None and encode(replace(built, dropped={})) == encode(wanted)

    def record(self, kind: Artifact, name: str) -> Any:
        """Return a record of the store that can be read. Raises Lacking."""
        record = self.catalog.get(kind, name)
        if record is None:
            raise Lacking(kind.called(name))
        return record

    def _digest(self, kind: Artifact, name: str) -> str:
        """Return the digest of a record of the store that can be read. Raises Lacking."""
        self.record(kind, name)
        return self.catalog.digest(kind, name)

    def _edits(self, names: Sequence[str]) -> str:
        return digest({name: self._digest(Artifact.EDIT, name) for name in names})

    def before(self, step: Step) -> tuple[str, ...]:
        """Return the requests whose edits a search stands on."""
        names = self.recipe.names
        if self.recipe.together is not Together.AFTER:
            return ()
        return names[: names.index(step.names[0])]

    def target(self, step: Step) -> Path:
        """Return the model that the copy at a step's place is of."""
        for target in self.recipe.targets():
            if target.resolve().name == (step.place or Path()).name:
                return target
        record = self.ledger.stage(step.key)
        return Path(record.origin or "" if record else "")

    def _shipped(self) -> str:
        """Return the digest of the checkpoint that was written; empty where none is asked for."""
        place = self.recipe.outputs.checkpoint
        record = self.ledger.stage(Step(Stage.CHECKPOINT, (), place).key) if place else None
        return record.made if record else ""

    def plan(self) -> list[PlannedStep]:
        """Return every step with what it lacks, what stands in its way, and how long it takes."""
        took, most = self._took(), self._peaks()
        planned = []
        behind: dict[str, str] = {}
        whys = self.whys()
        errors = self._errors_of_sets([step for step, why in whys.items() if why])
        for step, why in whys.items():
            trouble = self._trouble(step, errors) if why else None
            earlier = [f"after {behind[name]} of {name}" for name in step.names if name in behind]
            why = why or next(iter(earlier), None)
            if why and step.place is None:
                behind |= {name: step.stage for name in step.names if name not in behind}
            if not why:
                planned.append(PlannedStep(step, None, None, 0.0, 0, 0))
                continue
            seconds = self.typical(took, step)
            memory = most.get(step.stage) or self._bounded_memory(step.stage)
            planned.append(PlannedStep(step, why, trouble, seconds, memory, self._disk(step)))
        return planned

    def whys(self) -> dict[Step, str | None]:
        """Return every step with why it is to be done, as `why` does; files are looked at once."""
        steps = self.steps()
        whys: dict[Step, str | None] = {}
        self._identities = {}
        try:
            with progress.bar("looking at what is done", len(steps)) as ticker:
                for step in steps:
                    whys[step] = self.why(step)
                    ticker.advance()
        finally:
            self._identities = None
        return whys

    def _errors_of_sets(self, steps: Iterable[Step]) -> dict[str, SlsguError]:
        """Return by their names what stands in the way of those sets that are to be built."""
        names = [step.names[0] for step in steps if step.stage is Stage.SET]
        if not names or self._model_trouble:
            return {}
        requests = [self.recipe.set_of(self.recipe.request(name)) for name in names]
        with progress.bars_only():
            return Preview(self.store, requests).errors()

    def typical(self, took: Mapping[Stage, Sequence[float]], step: Step) -> float | None:
        """Return the median seconds of a stage, as `seconds_of` has them, for a step's requests."""
        if step.stage not in took:
            return None
        return median(took[step.stage]) * (len(step.names) if step.stage is Stage.SEARCH else 1)

    def seconds_of(self, ledgers: Iterable[Ledger]) -> dict[Stage, list[float]]:
        """Return the seconds that each stage took on this device, a search by request."""
        took: dict[Stage, list[float]] = {}
        for each in (each for ledger in ledgers for each in ledger.stages):
            if each.made and each.took.where == self.device:
                share = len(each.names) if each.stage is Stage.SEARCH else 1
                took.setdefault(each.stage, []).append(each.took.seconds / share)
        return took

    def _took(self) -> dict[Stage, list[float]]:
        """Return the seconds that each stage took in this store."""
        took = self.seconds_of(self.catalog.readable(Artifact.LEDGER).values())
        if Stage.SEARCH not in took:
            trials = self.catalog.readable(Artifact.TRIALS).values()
            if searches := [each.took.seconds for each in trials if each.took]:
                took[Stage.SEARCH] = searches
        return took

    def _peaks(self) -> dict[Stage, int]:
        """Return the most memory that each stage took in this store, with this model."""
        most: dict[Stage, int] = {}
        for ledger in self.catalog.readable(Artifact.LEDGER).values():
            for each in ledger.stages if ledger.model == self.recipe.model else ():
                if each.memory and each.took.where == self.device:
                    most[each.stage] = max(each.memory, most.get(each.stage, 0))
        return most

    def _bounded_memory(self, stage: Stage) -> int | None:
        """Return what weights, gradients and the budget that is given take, None without one.

        A pass of gradients has two sums of them beside the weights, each in fp32.
        """
        held = {
            Stage.GRADIENTS: (3, self.recipe.grad.memory_budget),
            Stage.SEARCH: (1, self.recipe.search.cache_budget),
        }
        copies, budget = held.get(stage, (0, None))
        if budget is None or self._model_trouble:
            return None
        shapes, _ = contents(resolve(self.recipe.model))
        return copies * 4 * sum(map(prod, shapes.values())) + budget

    def _disk(self, step: Step) -> int | None:
        """Return about how many bytes a step leaves; None where nothing tells.

        A copy is as large as its original, an output as what was written there before.
        """
        place = step.place
        try:
            if step.stage is Stage.CHECKPOINT:
                original = resolve(self.recipe.model)
                return _bytes(original.folder or original.weights)
            if step.stage is Stage.TARGET:
                return _bytes(self.target(step))
            if place is not None and step.stage is not Stage.EDITS:
                return _bytes(place) if self.ledger.stage(step.key) else None
        except (SlsguError, OSError):
            return None
        left = [self._left_by_set[kind] for kind in LEFT[step.stage] if kind in self._left_by_set]
        return sum(left) * len(step.names) if left else None

    @cached_property
    def _left_by_set(self) -> dict[Artifact, int]:
        return typical_sizes(self.catalog, self.recipe.model)

    @cached_property
    def _of_others(self) -> dict[str, str]:
        """The requests of other recipes in the store, each with its recipe.

        Two would build the sets and edits of a name in turn, each anew.
        """
        ledgers = self.catalog.readable(Artifact.LEDGER)
        return {
            row.name: recipe
            for recipe, ledger in ledgers.items()
            for row in ledger.rows
            if recipe != self.recipe.name and row.state is not RequestState.WITHDRAWN
        }

    @cached_property
    def _model_trouble(self) -> str | None:
        try:
            _ = self.weights
            require_weights(resolve(self.recipe.model))
        except SlsguError as error:
            return error.message
        return None

    def _trouble(self, step: Step, errors: Mapping[str, SlsguError]) -> str | None:
        """Return why a step that is to be done cannot succeed; None where nothing is known."""
        try:
            return self._claimed(step) or self._unusable(step, errors) or self._occupied(step)
        except SlsguError as error:
            return error.message

    def _claimed(self, step: Step) -> str | None:
        """Return which other recipe a request is of, and what to do then."""
        for name in step.names:
            if other := self._of_others.get(name):
                concept = self.recipe.request(name).concept
                return (
                    f"{name} is a request of the recipe {other} in this store: give it another "
                    f'name, and concept = "{concept}"; or this recipe another --store, or '
                    f'name = "{other}" if it is the same'
                )
        return None

    def _unusable(self, step: Step, errors: Mapping[str, SlsguError]) -> str | None:
        """Return what is wrong with the model or the rows. Raises what opening others raises."""
        if step.stage is Stage.SET:
            if self._model_trouble:
                return self._model_trouble
            if error := errors.get(step.names[0]):
                return error.message
        elif step.stage is Stage.TARGET:
            read_target(self.target(step))
        elif step.stage is Stage.LORA:
            for name in step.names:
                if header := self.catalog.get(Artifact.EDIT, name):
                    modules_of(header)
        return None

    def _occupied(self, step: Step) -> str | None:
        """Return what is in an output's place that no run of the recipe wrote."""
        if step.place is None or self.ledger.stage(step.key):
            return None
        edits = [step.place / f"{name}.safetensors" for name in step.names]
        for file in edits if step.stage is Stage.EDITS else [step.place]:
            if file.is_file() or (file.is_dir() and any(file.iterdir())):
                return f"{file} is there already, and not of this recipe"
        return None


def _options(record: Any) -> str:
    """Return a digest of options, those of speed and memory aside."""
    said = {key: value for key, value in encode(record, sparse=True).items() if key not in SPEED}
    return digest(said)


def _texts_of(request: RemovalRequest) -> dict[str, Any]:
    """Return a request as evidence tells it, in the texts of its fields."""
    return {field.name: str(getattr(request, field.name)) for field in fields(request)}


def _files(place: Path) -> dict[str, Path]:
    """Return the files in a folder by name, or a file as the only one. Raises InputError."""
    return all_files(place) if place.is_dir() else {"": place}


def _bytes(place: Path) -> int:
    """Return the bytes of a file, or of all files in a folder. Raises OSError, InputError."""
    return sum(file.stat().st_size for file in _files(place).values())


def _stamps(model: Path) -> str:
    """Return a digest of the names, sizes and times of a model's files."""
    states = {name: path.stat() for name, path in _files(model).items()}
    return digest({name: [s.st_size, s.st_mtime_ns] for name, s in states.items()})
