"""Our edit and the original model as rows of a comparison."""

import tempfile
from dataclasses import dataclass, replace
from time import perf_counter

from slsgu_cli import progress
from slsgu_cli.compare.pass_times import ROLES, PassTimes
from slsgu_cli.engine.search import search
from slsgu_cli.engine.set_edits import current_edit, ensure_edit
from slsgu_cli.errors import NotForgottenError, StaleError
from slsgu_cli.records.comparison import ClipOutcome, Method
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.figures import Accuracy, Figures
from slsgu_cli.records.method import EditHeader, GradientPointer, Trial, Trials
from slsgu_cli.records.options import MARGIN, SearchOptions
from slsgu_cli.store.artifacts import Artifact, digests_of
from slsgu_cli.store.store import Store


@dataclass(frozen=True, slots=True)
class OurEdit:
    """A set's edit: its header, its trial, and all trials of its search.

    `seconds` is the time of the search on this device, None if unknown.
    """

    header: EditHeader
    trial: Trial
    trials: Trials
    seconds: float | None

    @classmethod
    def find(cls, pointer: GradientPointer, times: PassTimes) -> "OurEdit":
        """Return the set's edit; search for it if there is none.

        Raises StaleError if the edit is not one of the recorded trials.
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
                f"the edit {name} is not among the trials of its search on the current sets",
                hint=f"run `{Artifact.EDIT.command(name)}`",
            )
        return replace(edit, seconds=seconds) if missing else edit

    @classmethod
    def standing(cls, pointer: GradientPointer, times: PassTimes) -> "OurEdit | None":
        """Return the set's edit if it is one of the trials on the current sets.

        Raises StaleError if it was made from other gradients.
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
        took = trials.took
        seconds = took.seconds if took and took.where == times.where else None
        edited = ((header.layer, header.direction), header.step)
        for trial in trials.trials:
            if (trial.move, trial.step) == edited and trial.utility is not None:
                return cls(header, trial, trials, seconds)
        return None

    @property
    def label(self) -> str:
        """The layer, step and direction of the edit, which identify its row."""
        return f"{self.trial.layer} at {self.trial.step:.10g}, {self.trial.direction}"

    @property
    def before(self) -> Figures:
        """The test figures of the original model."""
        return _figures(self.header.baseline_forget, self.header.baseline_utility)

    def outcome(self, pointer: GradientPointer, times: PassTimes) -> ClipOutcome:
        """Return the row of the set's edit, on the test rows.

        The seconds are those of both gradient passes and of the search. If the time of the
        search is not on record, the search runs again in a temporary store.
        """
        seconds = self.seconds
        if seconds is None:
            progress.detail("the search runs again to measure its time")
            seconds = _timed_search(times.store, self.trials, times.device_option)
        figures = _figures(self.header.forget, self.header.utility)
        return ClipOutcome(
            method=Method.OURS,
            edit=self.label,
            forget=figures.forget,
            utility=figures.utility,
            seconds=seconds + times.seconds(pointer, ROLES, squares=False),
            forget_passes=1.0,
            retain_passes=1.0,
            where=times.where,
            chosen_by=_figures(self.trial.forget, self.trial.utility),
        )


def _figures(forget: Accuracy | None, utility: dict[str, Accuracy] | None) -> Figures:
    """Return the figures of a searched edit."""
    if forget is None or utility is None:
        raise ValueError("the edit of a search has figures")
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
