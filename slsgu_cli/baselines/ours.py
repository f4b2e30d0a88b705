"""The rows of the original model and of the set's edit, and what finding the edit takes."""

import tempfile
from collections.abc import Sequence
from shlex import quote
from time import perf_counter

from slsgu_cli import progress
from slsgu_cli.baselines.passes import ROLES, PassTimes
from slsgu_cli.baselines.records import Method, Outcome
from slsgu_cli.cases import MARGIN
from slsgu_cli.edits import Edit, load_edit
from slsgu_cli.errors import NotForgottenError, StaleError
from slsgu_cli.layout import edit_path, trials_path
from slsgu_cli.outcomes import measured_on
from slsgu_cli.pipeline import edit_for
from slsgu_cli.records import (
    Accuracy,
    EditHeader,
    GradientPointer,
    SetManifest,
    Steer,
    Trial,
    Trials,
)
from slsgu_cli.search import SearchOptions, search
from slsgu_cli.store import Store


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


def our_outcome(
    store: Store, pointer: GradientPointer, recorded: Sequence[Outcome], times: PassTimes
) -> Outcome:
    """Return the row of the set's edit, searching for it if there is none.

    The seconds are those of both gradient passes and of the search. A search that was run
    before is run once more, into a folder that is removed, unless it was timed before.
    Raises StaleError where the edit is not one of the recorded trials.
    """
    name = pointer.name
    missing = not store.exists(edit_path(name))
    start = perf_counter()
    try:
        options = SearchOptions(device=times.asked_device)
        edit = edit_for(store, name, options=options)
    except NotForgottenError as error:
        progress.warn(error.message)
        edit = load_edit(store, name)
    seconds = perf_counter() - start
    trial = _trial(store, times.manifest, pointer, edit)
    ridge = "" if trial.ridge is None else f", ridge {trial.ridge:g}"
    words = f"{trial.layer} at {trial.step:.10g}{ridge}"
    known = [outcome for outcome in recorded if outcome.edit == words]
    if known:
        return known[-1]
    if not missing:
        progress.detail("the search is run once more for its time")
        seconds = _rehearse(store, edit.header, times.asked_device)
    seconds += times.seconds(pointer, ROLES, squares=False)
    return Outcome(
        method=Method.OURS,
        setting=None,
        plan=None,
        edit=words,
        epoch=None,
        forget=trial.forget,
        utility=trial.utility or {},
        seconds=seconds,
        forget_passes=1.0,
        retain_passes=1.0,
        where=times.where,
    )


def standing_trials(store: Store, manifest: SetManifest, pointer: GradientPointer) -> Trials | None:
    """Return the trials of a set that were made from what it has now; None without such."""
    if not store.exists(trials_path(manifest.name)):
        return None
    trials = store.read_record(trials_path(manifest.name), Trials)
    now = (pointer.forget, pointer.model_fingerprint, measured_on(manifest))
    same = (trials.forget, trials.model_fingerprint, trials.evals) == now
    return trials if same else None


def _trial(store: Store, manifest: SetManifest, pointer: GradientPointer, edit: Edit) -> Trial:
    """Return the recorded trial that the edit is, on the evaluation sets as they are now."""
    trials = standing_trials(store, manifest, pointer)
    for trial in trials.trials if trials else ():
        if _key(trial) == _key(edit.header) and trial.utility is not None:
            return trial
    name = manifest.name
    raise StaleError(
        f"the edit {name} is not among the trials of its search on the sets as they are now",
        hint=f"run `slsgu search {quote(name)}`",
    )


def _key(found: Trial | EditHeader) -> tuple[str, float | None, float]:
    return found.layer, found.ridge, found.step


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
