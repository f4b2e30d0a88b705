"""Our own row of a comparison, and how long its passes take."""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING

from slsgu_cli import progress
from slsgu_cli.clip.devices import device_name, pick_device
from slsgu_cli.clip.models import resolve
from slsgu_cli.engine.gradients import GradResult, compute_gradients, load_graded, open_pairs
from slsgu_cli.engine.search import search
from slsgu_cli.engine.set_edits import current_edit, ensure_edit
from slsgu_cli.errors import NotForgottenError, StaleError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.figures import Accuracy, Figures, PassTime
from slsgu_cli.records.method import (
    EditHeader,
    GradientHeader,
    GradientPointer,
    Precision,
    Trial,
    Trials,
)
from slsgu_cli.records.options import MARGIN, PassOptions, SearchOptions
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.studies import ClipOutcome, Method
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
        return device_name(self.device)

    def compute(self, pointer: GradientPointer | None, *, squares: bool) -> GradientPointer:
        """Compute the gradients or squares that are missing, and note how long it took."""
        options = PassOptions(device=self.device_option)
        if pointer is not None:
            precision = Precision(pointer.precision)
            options = replace(
                options,
                batch_size=pointer.batch_size,
                precision=precision,
                prefixes=pointer.prefixes,
            )
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
        from slsgu_cli.engine.gradient_pass import GradientPass

        path = Artifact.GRADIENT.path(getattr(pointer, role))
        header = self.store.read_header(path, GradientHeader)
        graded = resolve(pointer.model)
        prefixes = pointer.prefixes if role == "forget" else ()
        block = open_pairs(self.store, self.manifest, role, prefixes, graded)
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
    """A set's edit: its header, the trial that it is, and all trials of its search.

    `seconds` is what the search took here, None where that is not known.
    """

    header: EditHeader
    trial: Trial
    trials: Trials
    seconds: float | None

    @classmethod
    def find(cls, pointer: GradientPointer, times: PassTimes) -> "OurEdit":
        """Return the set's edit, searching for it if there is none.

        Raises StaleError where the edit is not one of the recorded trials.
        """
        store, name = times.store, pointer.name
        missing = not store.exists(Artifact.EDIT.path(name))
        start = perf_counter()
        if missing:
            try:
                ensure_edit(store, name, options=SearchOptions(device=times.device_option))
            except NotForgottenError as error:
                progress.warn(error.message)
        seconds = perf_counter() - start
        edit = cls.standing(pointer, times)
        if edit is None:
            raise StaleError(
                f"the edit {name} is not among the trials of its search on the sets as they are "
                "now",
                hint=f"run `{Artifact.EDIT.command(name)}`",
            )
        return replace(edit, seconds=seconds) if missing else edit

    @classmethod
    def standing(cls, pointer: GradientPointer, times: PassTimes) -> "OurEdit | None":
        """Return the set's edit if it is one of the trials on the sets as they are now.

        Raises StaleError where it was made from other gradients.
        """
        store, name = times.store, times.manifest.name
        if not all(store.exists(kind.path(name)) for kind in (Artifact.EDIT, Artifact.TRIALS)):
            return None
        header = current_edit(store, name).header
        trials = store.read_record(Artifact.TRIALS.path(name), Trials)
        if (
            header.forget is None
            or header.joint
            or header.after
            or Artifact.TRIALS.changed(trials, digests_of(times.manifest, pointer))
        ):
            return None
        took = trials.took if trials.took and trials.took.where == times.where else None
        edited = ((header.layer, header.direction), header.step)
        for trial in trials.trials:
            same = (trial.move, trial.step) == edited
            if same and trial.utility is not None:
                return cls(header, trial, trials, took.seconds if took else None)
        return None

    @property
    def words(self) -> str:
        """The layer, step and direction, by which a row names the edit."""
        return f"{self.trial.layer} at {self.trial.step:.10g}, {self.trial.direction}"

    @property
    def figures(self) -> Figures:
        """What the edit leaves and keeps, on the rows to report on."""
        return _figures(self.header.forget, self.header.utility)

    @property
    def before(self) -> Figures:
        """The same of the original model."""
        return _figures(self.header.baseline_forget, self.header.baseline_utility)

    def outcome(self, pointer: GradientPointer, times: PassTimes) -> ClipOutcome:
        """Return the row of the set's edit, on the rows to report on.

        The seconds are those of both gradient passes and of the search. A search whose time is
        not on record is run once more for it, into a folder that is removed.
        """
        seconds = self.seconds
        if seconds is None:
            progress.detail("the search is run once more for its time")
            seconds = _rehearse(times.store, self.trials, times.device_option)
        return ClipOutcome(
            method=Method.OURS,
            edit=self.words,
            forget=self.figures.forget,
            utility=self.figures.utility,
            seconds=seconds + times.seconds(pointer, ROLES, squares=False),
            forget_passes=1.0,
            retain_passes=1.0,
            where=times.where,
            chosen_by=_figures(self.trial.forget, self.trial.utility),
        )


def _figures(forget: Accuracy | None, utility: dict[str, Accuracy] | None) -> Figures:
    """Return the figures of an edit that was searched for, which has them."""
    if forget is None or utility is None:
        raise ValueError("an edit that was searched for has figures")
    return Figures(forget, utility)


def original_outcome(figures: Figures) -> ClipOutcome:
    """Return the row of the original model."""
    return ClipOutcome(
        method=Method.ORIGINAL,
        forget=figures.forget,
        utility=figures.utility,
        seconds=0.0,
        forget_passes=0.0,
        retain_passes=0.0,
    )


def _rehearse(store: Store, trials: Trials, device: str) -> float:
    """Return how long the whole search takes that made trials; nothing of it is kept."""
    options = SearchOptions(
        device=device,
        direction=Direction.of(trials.directions),
        criterion=trials.criterion,
        margin=MARGIN if trials.margin is None else trials.margin,
    )
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        search(store, trials.name, options=options, records=Store(folder))
        return perf_counter() - start
