"""Our edit and the original model as rows of a comparison."""

import tempfile
from dataclasses import dataclass
from time import perf_counter

from slsgu_cli import progress
from slsgu_cli.compare.pass_times import ROLES, PassTimes
from slsgu_cli.engine.search import search
from slsgu_cli.engine.set_edits import current_edit, ensure_edit
from slsgu_cli.errors import NotForgottenError, StaleError
from slsgu_cli.records.comparison import ClipOutcome, Method
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.figures import Figures
from slsgu_cli.records.method import GradientPointer, Trial, Trials
from slsgu_cli.records.options import MARGIN, SearchOptions
from slsgu_cli.store.artifacts import Artifact, digests_of
from slsgu_cli.store.store import Store


@dataclass(frozen=True, slots=True)
class OurEdit:
    """A set's edit: its figures on the test rows, its trial, and all trials of its search.

    `seconds` is the time of the search on this device, None if unknown.
    """

    figures: Figures
    trial: Trial
    trials: Trials
    seconds: float | None

    @classmethod
    def find(cls, pointer: GradientPointer, times: PassTimes) -> "OurEdit":
        """Return the set's edit; search for it if there is none.

        Raises StaleError if the edit is not one of the recorded trials.
        """
        store, name = times.store, pointer.name
        start, seconds = perf_counter(), None
        if not store.exists(Artifact.EDIT.path(name)):
            try:
                ensure_edit(store, name, options=SearchOptions(device=times.device))
            except NotForgottenError as error:
                progress.warn(error.message)
            seconds = perf_counter() - start
        header = current_edit(store, name).header
        trials = store.read_record(Artifact.TRIALS.path(name), Trials)
        if seconds is None and trials.took and trials.took.where == times.where:
            seconds = trials.took.seconds
        is_current = not Artifact.TRIALS.changed(trials, digests_of(times.manifest, pointer))
        if is_current and header.forget and header.utility and not (header.joint or header.after):
            figures = Figures(header.forget, header.utility)
            for trial in trials.trials:
                edited = trial.layer, trial.direction, trial.step
                if edited == (header.layer, header.direction, header.step) and trial.utility:
                    return cls(figures, trial, trials, seconds)
        raise StaleError(
            f"the edit {name} is not among the trials of its search on the current sets",
            hint=f"run `{Artifact.EDIT.command(name)}`",
        )

    @property
    def label(self) -> str:
        """The layer, step and direction of the edit, which identify its row."""
        return f"{self.trial.layer} at {self.trial.step:.10g}, {self.trial.direction}"

    def outcome(self, pointer: GradientPointer, times: PassTimes) -> ClipOutcome:
        """Return the row of the set's edit, on the test rows.

        The seconds are those of both gradient passes and of the search. If the time of the
        search is not on record, the search runs again in a temporary store.
        """
        seconds = self.seconds
        if seconds is None:
            progress.detail("the search runs again to measure its time")
            seconds = _timed_search(times.store, self.trials, times.device)
        return ClipOutcome(
            method=Method.OURS,
            edit=self.label,
            forget=self.figures.forget,
            utility=self.figures.utility,
            seconds=seconds + times.seconds(pointer, ROLES, squares=False),
            forget_passes=1.0,
            retain_passes=1.0,
            where=times.where,
            chosen_by=Figures(self.trial.forget, self.trial.utility or {}),
        )


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


def _timed_search(store: Store, trials: Trials, device: str) -> float:
    """Return the time of the search that made `trials`; discard its result."""
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
