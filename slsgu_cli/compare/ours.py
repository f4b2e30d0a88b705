"""Our own row of a comparison, and how long its passes take."""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, load_edit
from slsgu_cli.clip.models import pick_device
from slsgu_cli.errors import NotForgottenError, StaleError
from slsgu_cli.method.edit import ensure_edit
from slsgu_cli.method.gradients import GradResult, compute_gradients, load_graded
from slsgu_cli.method.search import search
from slsgu_cli.records.method import (
    Accuracy,
    EditHeader,
    GradientHeader,
    GradientPointer,
    Precision,
    Steer,
    Trial,
    Trials,
)
from slsgu_cli.records.options import MARGIN, PassOptions, SearchOptions
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.studies import Method, Outcome, PassTime
from slsgu_cli.store.artifacts import Artifact, digests_of
from slsgu_cli.store.catalog import Catalog
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from torch import nn

ROLES = ("forget", "retain")


@dataclass
class PassTimes:
    """The times of the passes of one set, measured as they are needed.

    `known` has those measured or remembered so far, by the digest of what the pass gave.
    """

    store: Store
    manifest: SetManifest
    device_option: str
    known: dict[str, PassTime] = field(default_factory=dict)

    def remember(self, passes: Mapping[str, PassTime]) -> None:
        """Use times that were recorded before, but for passes that have been measured now."""
        self.known = {**passes, **self.known}

    @cached_property
    def device(self) -> str:
        """The device of what is measured, once PyTorch has said what there is."""
        return pick_device(self.device_option)

    @cached_property
    def where(self) -> str:
        """What the times are measured on, in words."""
        import torch

        if self.device.startswith("cuda"):
            return str(torch.cuda.get_device_name(self.device))
        return f"{self.device}, {torch.get_num_threads()} threads"

    def compute(self, pointer: GradientPointer | None, *, squares: bool) -> GradientPointer:
        """Compute the gradients or squares that are missing, and note how long it took."""
        options = PassOptions(device=self.device_option)
        if pointer is not None:
            precision = Precision(pointer.precision)
            options = replace(options, batch_size=pointer.batch_size, precision=precision)
        result: GradResult = compute_gradients(
            self.store,
            self.manifest.name,
            model=pointer.model if pointer else None,
            options=options,
            squares=squares,
        )
        for role, seconds in result.seconds.items():
            key = _pass_key(getattr(result.pointer, role), squares)
            self.known[key] = PassTime(seconds, self.where)
        return result.pointer

    def seconds(
        self,
        pointer: GradientPointer,
        roles: Iterable[str],
        *,
        squares: bool,
        model: "nn.Module | None" = None,
    ) -> float:
        """Return what the passes of `roles` take; `model` is the original, if it is loaded."""
        total = 0.0
        for role in roles:
            key = _pass_key(getattr(pointer, role), squares)
            if key not in self.known:
                time = self._in_other_comparisons(key)
                if time is None:
                    model = model or load_graded(self.manifest, pointer, self.device)[1]
                    time = self._measure(model, pointer, role, squares)
                self.known[key] = time
            total += self.known[key].seconds
        return total

    def _in_other_comparisons(self, key: str) -> PassTime | None:
        """Return the time that another set's comparison has for the same pass."""
        for comparison in Catalog(self.store).readable(Artifact.COMPARISON).values():
            time: PassTime | None = comparison.passes.get(key)
            if time is not None and time.where == self.where:
                return time
        return None

    def _measure(
        self, model: "nn.Module", pointer: GradientPointer, role: str, squares: bool
    ) -> PassTime:
        from slsgu_cli.method.gradient_pass import GradientPass
        from slsgu_cli.store.blocks import DataBlock

        path = Artifact.GRADIENT.path(getattr(pointer, role))
        header = self.store.read_header(path, GradientHeader)
        block = DataBlock.open(self.store, getattr(self.manifest, role))
        options = PassOptions(
            batch_size=min(header.batch_size, block.rows),
            precision=Precision(header.precision),
            device=self.device,
        )
        start = perf_counter()
        run = GradientPass.prepare(model, header.loss, spec=self.manifest.input, options=options)
        label = f"time of the {role} gradient"
        (run.run_squared if squares else run.run)(block, label)
        return PassTime(perf_counter() - start, self.where)


def _pass_key(digest: str, squares: bool) -> str:
    return f"squares {digest}" if squares else digest


@dataclass(frozen=True, slots=True)
class OurEdit:
    """The recorded trial that a set's edit is, and the header of the edit.

    `seconds` is what its search took, None where it was there already.
    """

    trial: Trial
    header: EditHeader
    seconds: float | None

    @property
    def words(self) -> str:
        """The layer, step and ridge, by which a row names the edit."""
        ridge = "" if self.trial.ridge is None else f", ridge {self.trial.ridge:g}"
        return f"{self.trial.layer} at {self.trial.step:.10g}{ridge}"


def find_our_edit(
    store: Store, manifest: SetManifest, pointer: GradientPointer, device: str
) -> OurEdit:
    """Return the set's edit, searching for it if there is none.

    Raises StaleError where the edit is not one of the recorded trials.
    """
    name = pointer.name
    missing = not store.exists(Artifact.EDIT.path(name))
    start = perf_counter()
    try:
        edit = ensure_edit(store, name, options=SearchOptions(device=device))
    except NotForgottenError as error:
        progress.warn(error.message)
        edit = load_edit(store, name)
    seconds = perf_counter() - start
    trial = _trial(store, manifest, pointer, edit)
    return OurEdit(trial, edit.header, seconds if missing else None)


def our_outcome(store: Store, edit: OurEdit, pointer: GradientPointer, times: PassTimes) -> Outcome:
    """Return the row of the set's edit.

    The seconds are those of both gradient passes and of the search. A search that was run
    before is run once more for its time, into a folder that is removed.
    """
    seconds = edit.seconds
    if seconds is None:
        progress.detail("the search is run once more for its time")
        seconds = _rehearse(store, edit.header, times.device_option)
    return Outcome(
        method=Method.OURS,
        setting=None,
        plan=None,
        edit=edit.words,
        epoch=None,
        forget=edit.trial.forget,
        utility=edit.trial.utility or {},
        seconds=seconds + times.seconds(pointer, ROLES, squares=False),
        forget_passes=1.0,
        retain_passes=1.0,
        where=times.where,
    )


def original_outcome(forget: Accuracy, utility: dict[str, Accuracy]) -> Outcome:
    """Return the row of the original model."""
    return Outcome(
        method=Method.ORIGINAL,
        setting=None,
        plan=None,
        edit=None,
        epoch=None,
        forget=forget,
        utility=utility,
        seconds=0.0,
        forget_passes=0.0,
        retain_passes=0.0,
        where=None,
    )


def standing_trials(store: Store, manifest: SetManifest, pointer: GradientPointer) -> Trials | None:
    """Return the trials of a set that were made from what it has now; None without such."""
    path = Artifact.TRIALS.path(manifest.name)
    if not store.exists(path):
        return None
    trials = store.read_record(path, Trials)
    return None if Artifact.TRIALS.changed(trials, digests_of(manifest, pointer)) else trials


def _trial(store: Store, manifest: SetManifest, pointer: GradientPointer, edit: Edit) -> Trial:
    """Return the recorded trial that the edit is, on the evaluation sets as they are now."""
    trials = standing_trials(store, manifest, pointer)
    for trial in trials.trials if trials else ():
        if _move(trial) == _move(edit.header) and trial.utility is not None:
            return trial
    name = manifest.name
    raise StaleError(
        f"the edit {name} is not among the trials of its search on the sets as they are now",
        hint=f"run `{Artifact.EDIT.command(name)}`",
    )


def _move(of: Trial | EditHeader) -> tuple[str, float | None, float]:
    return of.layer, of.ridge, of.step


def _rehearse(store: Store, header: EditHeader, device: str) -> float:
    """Return how long the whole search takes that found an edit; nothing of it is kept."""
    options = SearchOptions(
        device=device,
        direction=header.direction,
        steer=header.steer or Steer.FA1,
        margin=MARGIN if header.margin is None else header.margin,
    )
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        search(store, header.name, options=options, records=Store(folder))
        return perf_counter() - start
