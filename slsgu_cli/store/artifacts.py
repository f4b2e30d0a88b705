"""The table of artifacts: the location, the command and the inputs of each kind.

Paths in the store, hints about the command to run first, checks for stale records and resuming
all use this table. `verify` reads a whole artifact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from importlib import import_module
from io import BytesIO
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

from slsgu_cli import progress
from slsgu_cli.errors import InputError, MissingError, StaleError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import FeatureHeader, GradientPointer, Ranking
from slsgu_cli.records.sets import FORGET, Collection, SetManifest, check_name
from slsgu_cli.store.store import Arrays, Store, require
from slsgu_cli.text import near, reason_of

T = TypeVar("T")

# File systems end names at 255 bytes; plots add the name of a layer.
LONGEST_LABEL = 100


class Artifact(StrEnum):
    """Kinds of artifact, in the order in which one is made from another."""

    COLLECTION = "collection"
    SET = "set"
    DATA = "data"
    POINTER = "pointer"
    GRADIENT = "gradient"
    COVARIANCE = "covariance"
    FEATURES = "features"
    SQUARES = "squares"
    SUMS = "sums"
    RANKING = "ranking"
    TRIALS = "trials"
    TRAJECTORY = "trajectory"
    JOINT = "joint"
    SWEEP = "sweep"
    EDIT = "edit"
    VERIFICATION = "verification"
    COMPARISON = "comparison"
    PLOT = "plot"
    TARGET_TRIALS = "target trials"
    TARGET_COMPARISON = "target comparison"
    GENERATED = "generated source"
    GENERATION = "generation"
    ANSWERS = "answers"
    LEDGER = "ledger"
    UNFINISHED = "unfinished"

    def path(self, name: str) -> str:
        """Return the path of the artifact `name` in a store. Raises UsageError."""
        return self.place(check_name(name))

    def place(self, name: str) -> str:
        """Return the path of an artifact whose name comes from the store and needs no check."""
        return f"{self.folder_of(name)}{TABLE[self].suffix}"

    def folder_of(self, name: str) -> str:
        """Return the folder of the files that belong to the record `name`."""
        return f"{TABLE[self].folder}/{name}"

    def names(self, store: Store) -> list[str]:
        """Return the names of all artifacts of the kind in a store, sorted."""
        return store.names(TABLE[self].folder, TABLE[self].suffix)

    def command(self, name: str) -> str:
        """Return the command line that makes the artifact `name`."""
        return f"slsgu {TABLE[self].command.format(quote(name))}"

    def command_again(self, name: str) -> str | None:
        """Return the command line that makes the same artifact `name` again, if there is one."""
        if self is Artifact.SET:
            return f"slsgu build-sets {quote(name)} --replay"
        if self is Artifact.EDIT and set_of(name) != name:
            return f"slsgu search {quote(set_of(name))} --target ..."
        return self.command(name) if TABLE[self].command else None

    def changed(self, record: Any, now: Mapping[str, Any]) -> "Change | None":
        """Return the first input of a record whose digest is different `now`."""
        return changed(TABLE[self].digests, record, now)

    def called(self, name: str) -> str:
        """Return the artifact `name` in words."""
        noun = TABLE[self].noun
        return f"{noun} {name}" if self is Artifact.SET else f"{noun} of {name}"


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of artifact. Data blocks and plots have no `record` of ours.

    The record is given by module and name, so that a command loads no others. An artifact is in
    `folder` under its name and `suffix`; if it `has_folder`, a folder of its name is next to the
    record. `noun` names it in messages, and `command` makes it; an artifact that is named by a
    digest is `made_with` another artifact of a set. `digests` maps each field with the digest of
    an input to the reason why the artifact is stale once that digest changes. It `needs` another
    artifact of the same set. A later run reuses `rows`, called `measured` in messages, if
    `digests` and `options` are unchanged. Listings show its `inputs`.
    """

    folder: str
    record_name: str = ""
    noun: str = ""
    command: str = ""
    suffix: str = ".json"
    has_folder: bool = False
    made_with: Artifact | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    needs: Artifact | None = None
    options: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    measured: str = "trials"
    inputs: tuple[str, ...] = ()

    @property
    def record(self) -> Any:
        """The class of its record; None where it has none of ours."""
        module, _, name = self.record_name.rpartition(".")
        return getattr(import_module(f"slsgu_cli.records.{module}"), name) if name else None


TENSORS = ".safetensors"
ROLES = ("forget", "retain")
FORGET_GRADIENT = "the forget gradient has been recomputed since"
REWHITENED = "the retain set of its direction has been rebuilt since"
WEIGHTS = "the model's weights have changed since"
EVALUATION = "the evaluation set {} has been rebuilt since"
GRADIENT_OF = "the forget gradient of {} has been recomputed since or is missing"
EDIT_OF = "the edit {} has been remade since"
STOOD_ON = {"after": "the edit {}, which it builds on, has been remade since or is missing"}

ROWS = {f"{role}_data": f"the {role} set has been rebuilt since" for role in ROLES}
GRADIENTS = dict.fromkeys(ROLES, "the gradients have been recomputed since")
MODEL = {"model_fingerprint": WEIGHTS, "evals": EVALUATION}
MEASURED = {"forget": FORGET_GRADIENT, **MODEL}
SEARCHED = {"retain_data": REWHITENED, **MEASURED, **STOOD_ON}
SWEPT = {"gradient": GRADIENT_OF, "retain": GRADIENT_OF}
EDITED = {"gradient": FORGET_GRADIENT, "retain_data": REWHITENED, **STOOD_ON}
TARGET = {"forget": FORGET_GRADIENT}
# The inputs of a gradient pass.
PASS = ("loss", "rows", "batch_size", "precision")
TARGET_OPTIONS = ("target_fingerprint", *ROWS, "evals", "judge", "budget", "asked")
SHOWN = {"edits": EDIT_OF}

_TRIALS = Row(
    "trials",
    "method.Trials",
    "search",
    "search {}",
    digests=SEARCHED,
    needs=Artifact.POINTER,
    options=("directions", "precision"),
    rows=("trials", "took"),
    inputs=("directions", "criterion", "after"),
)

TABLE: dict[Artifact, Row] = {
    Artifact.COLLECTION: Row(
        "collections", "sets.Collection", has_folder=True, inputs=("files", "concepts")
    ),
    Artifact.SET: Row(
        "sets", "sets.SetManifest", "set", "build-sets {} --source ...", inputs=("model", "concept")
    ),
    Artifact.DATA: Row("data", suffix=".zarr", made_with=Artifact.SET),
    Artifact.POINTER: Row(
        "gradients",
        "method.GradientPointer",
        "gradients",
        "grad {}",
        digests=ROWS,
        needs=Artifact.SET,
        inputs=("model", "batch_size", "precision"),
    ),
    Artifact.GRADIENT: Row(
        "gradients",
        "method.GradientHeader",
        suffix=TENSORS,
        made_with=Artifact.POINTER,
        inputs=PASS,
    ),
    Artifact.COVARIANCE: Row(
        "covariances",
        "method.CovarianceHeader",
        suffix=TENSORS,
        made_with=Artifact.RANKING,
        inputs=("rows",),
    ),
    Artifact.FEATURES: Row(
        "features",
        "method.FeatureHeader",
        suffix=TENSORS,
        made_with=Artifact.TRIALS,
        inputs=("evals", "split"),
    ),
    Artifact.SQUARES: Row(
        "squares",
        "method.SquaresHeader",
        suffix=TENSORS,
        made_with=Artifact.POINTER,
        inputs=PASS,
    ),
    Artifact.SUMS: Row(
        "sums", "method.SumsHeader", suffix=TENSORS, inputs=("done", "batches", "gradient")
    ),
    Artifact.RANKING: Row(
        "rankings",
        "method.Ranking",
        "ranking",
        "rank {}",
        digests=GRADIENTS,
        needs=Artifact.POINTER,
        inputs=("target", "alignment", "directions"),
    ),
    Artifact.TRIALS: _TRIALS,
    Artifact.TRAJECTORY: replace(
        _TRIALS, folder="trajectories", noun="trajectory", command="trajectory {}"
    ),
    Artifact.JOINT: Row(
        "joint",
        "studies.JointSearch",
        "joint search",
        "search ... --joint",
        digests={"gradients": GRADIENT_OF, **MODEL},
        options=("retain_data", "precision", "criterion", "margin"),
        rows=("trials",),
        inputs=("names", "criterion"),
    ),
    Artifact.SWEEP: Row(
        "sweeps",
        "studies.Sweep",
        "sweep",
        "sweep {} ...",
        options=("recipe",),
        rows=("rows",),
        measured="classes",
        inputs=("model", "criterion"),
    ),
    Artifact.EDIT: Row(
        "edits",
        "method.EditHeader",
        "edit",
        "search {}",
        suffix=TENSORS,
        digests=EDITED,
        inputs=("model", "concept", "layer", "direction", "step", "after"),
    ),
    Artifact.VERIFICATION: Row(
        "verifications",
        "verification.Verification",
        "verification",
        "verify {}",
        needs=Artifact.SET,
        digests={"data": "its {} rows have been rebuilt since"},
        options=("concept",),
        rows=("subjects", "under_way"),
        measured="findings",
        inputs=("concept",),
    ),
    Artifact.COMPARISON: Row(
        "comparisons",
        "comparison.ClipComparison",
        "comparison",
        "compare {}",
        digests=MEASURED,
        needs=Artifact.POINTER,
        options=("retain",),
        rows=("passes", "outcomes"),
        measured="outcomes",
    ),
    Artifact.PLOT: Row("plots", suffix=".png"),
    Artifact.TARGET_TRIALS: Row(
        "target-trials",
        "targets.TargetTrials",
        digests=TARGET,
        needs=Artifact.POINTER,
        options=(*TARGET_OPTIONS, "gradient_of", "direction", "applied"),
        rows=("before", "trials", "seconds", "reports"),
        inputs=("target", "direction", "judge"),
    ),
    Artifact.TARGET_COMPARISON: Row(
        "target-comparisons",
        "comparison.PipelineComparison",
        has_folder=True,
        digests=TARGET,
        needs=Artifact.POINTER,
        options=TARGET_OPTIONS,
        rows=("outcomes",),
        measured="outcomes",
        inputs=("target", "judge"),
    ),
    Artifact.GENERATED: Row(
        "generated",
        "targets.GeneratedSource",
        has_folder=True,
        inputs=("pipeline", "prompts", "count"),
    ),
    Artifact.GENERATION: Row(
        "generations",
        "targets.Generation",
        has_folder=True,
        digests=SHOWN,
        inputs=("target", "edits", "judge"),
    ),
    Artifact.LEDGER: Row("ledgers", "ledger.Ledger", "ledger", "run {}.toml", inputs=("model",)),
    Artifact.ANSWERS: Row(
        "answers", "targets.Answers", has_folder=True, digests=SHOWN, inputs=("target", "edits")
    ),
}

FOLDERS = sorted({row.folder for row in TABLE.values()})


def joint_label(names: Sequence[str]) -> str:
    """Return the name of a joint search over several sets: their names, shortened if necessary."""
    label = "+".join(names)
    if len(label) <= LONGEST_LABEL:
        return label
    return f"{names[0]}+{len(names) - 1}-{digest(list(names))[:8]}"


def target_edit(name: str, target: Path) -> str:
    """Return the name of the edit of the set `name` that was searched on `target`."""
    return check_name(f"{name}@{target.resolve().name}")


def set_of(edit: str) -> str:
    """Return the name of the set that an edit was made from, its target aside."""
    return edit.partition("@")[0] or edit


def plot_path(name: str, kind: str) -> str:
    """Return the path of a plot of the set `name`."""
    return f"{Artifact.PLOT.folder_of(check_name(name))}-{kind}{TABLE[Artifact.PLOT].suffix}"


@dataclass(frozen=True, slots=True)
class Change:
    """An input of a record that has another digest now: the field, and the reason in words."""

    field: str
    reason: str


def changed(reasons: Mapping[str, str], record: Any, now: Mapping[str, Any]) -> Change | None:
    """Return the first field of `reasons` in which a record differs from the digests `now`.

    Digests that the record or `now` does not have are not compared.
    """
    for name, reason in reasons.items():
        before, present = getattr(record, name), now.get(name)
        if isinstance(present, Mapping):
            # A record without images of the concept is not affected by them.
            for key, value in present.items():
                if before.get(key, value if key == FORGET else None) != value:
                    return Change(name, reason.format("of the concept" if key == FORGET else key))
        elif before is not None and present is not None and before != present:
            return Change(name, reason)
    return None


def digests_of(manifest: SetManifest | None, pointer: GradientPointer | None) -> dict[str, Any]:
    """Return the digests of a set and its gradients, by the record fields that repeat them."""
    now: dict[str, Any] = {}
    if manifest is not None:
        rows = {role: ref.fingerprint for role, ref in manifest.blocks().items()}
        now = {"data": rows, "evals": manifest.evaluation_blocks()}
        now |= {f"{role}_data": rows[role] for role in ROLES}
    if pointer is not None:
        fields = ("forget", "retain", "retain_data", "model_fingerprint")
        now |= {name: getattr(pointer, name) for name in fields} | {"gradient": pointer.forget}
    return now


def read_manifest(store: Store, name: str) -> SetManifest:
    """Return the manifest of the set `name`. Raises MissingError."""
    path = Artifact.SET.path(name)
    known = [] if store.exists(path) else Artifact.SET.names(store)
    what = f"set {name}" + (f"; it has {', '.join(known)}" if known else "")
    require(store, path, what=what, run=Artifact.SET.command(name), near=near(name, known))
    return store.read_record(path, SetManifest)


def read_pointer(store: Store, manifest: SetManifest) -> GradientPointer:
    """Return the gradients of a set in its current state. Raises StaleError."""
    name, run = manifest.name, Artifact.POINTER.command(manifest.name)
    path = Artifact.POINTER.path(name)
    require(store, path, what=Artifact.POINTER.called(name), run=run)
    pointer = store.read_record(path, GradientPointer)
    if change := Artifact.POINTER.changed(pointer, digests_of(manifest, None)):
        which = change.field.removesuffix("_data")
        raise StaleError(
            f"the gradients of {name} were computed before its {which} set was rebuilt",
            hint=f"run `{run}`",
        )
    for address in (pointer.forget, pointer.retain):
        what = f"gradient {address} of {name}"
        require(store, Artifact.GRADIENT.path(address), what=what, run=run)
    return pointer


def read_ranking(store: Store, pointer: GradientPointer) -> Ranking:
    """Return the ranking made from the gradients in use. Raises StaleError."""
    name, run = pointer.name, Artifact.RANKING.command(pointer.name)
    path = Artifact.RANKING.path(name)
    require(store, path, what=Artifact.RANKING.called(name), run=run)
    ranking = store.read_record(path, Ranking)
    if Artifact.RANKING.changed(ranking, digests_of(None, pointer)):
        raise StaleError(
            f"the ranking of {name} was made from other gradients than the store has now",
            hint=f"run `{run}`",
        )
    return ranking


def read_features(store: Store, path: str) -> Arrays:
    """Return the features in a file by evaluation set; empty if it cannot be read."""
    try:
        store.read_header(path, FeatureHeader)
        return dict(store.read_tensors(path))
    except MissingError:
        return {}
    except (InputError, StaleError) as error:
        progress.note(f"saved features cannot be used and are computed again: {error}")
        return {}


def resume(store: Store, kind: Artifact, name: str, fresh: T) -> T:
    """Return the record `fresh` with the rows that an earlier run recorded.

    Log a note and use none of them if that record is damaged or its inputs differ.
    """
    row, path = TABLE[kind], kind.path(name)
    if not store.exists(path):
        return fresh
    try:
        record = store.read_record(path, type(fresh))
        made_from = (*row.digests, *row.options)
        others = [f for f in made_from if getattr(record, f) != getattr(fresh, f)]
        if others:
            fields = ", ".join(others).replace("_", " ")
            raise StaleError(f"their inputs differ ({fields})")
    except (StaleError, InputError) as error:
        progress.note(f"recorded {row.measured} cannot be used and are made again: {error}")
        return fresh
    kept: dict[str, Any] = {name: getattr(record, name) for name in row.rows}
    return replace(fresh, **kept)  # type: ignore[type-var]


def verify(store: Store, kind: Artifact, path: str) -> None:
    """Read all of an artifact, and compare it with its digests.

    Raises MissingError, and InputError where it is damaged.
    """
    if kind is Artifact.DATA:
        from slsgu_cli.store.blocks import DataBlock

        DataBlock.at(store, path).verify()
        return
    if kind is Artifact.COLLECTION:
        collection = store.read_record(path, Collection)
        for shard, known in sorted(collection.digests.items()):
            store.require_digest(f"{path.removesuffix('.json')}/parts/{shard}", known)
    if kind is not Artifact.PLOT:
        store.verify(path)
        return
    from PIL import Image

    try:
        with Image.open(BytesIO(store.read_bytes(path)), formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, SyntaxError) as error:
        raise InputError(f"{store.where(path)} is damaged: {reason_of(error)}") from error
