"""Our own row: the edit that a search steered on the pipeline, and how long that took."""

from pathlib import Path
from shlex import quote

from slsgu_cli.edits import Edit, load_edit
from slsgu_cli.errors import MissingError, StaleError
from slsgu_cli.generation.records import TargetTrials
from slsgu_cli.layout import edit_path, target_edit, target_trials_path
from slsgu_cli.records import GradientPointer
from slsgu_cli.store import Store


def steered_edit(store: Store, pointer: GradientPointer, target: Path) -> tuple[Edit, float]:
    """Return the edit and the seconds of its search, without those of the gradient passes.

    Raises MissingError without an edit, StaleError where it is of no recorded trial.
    """
    name = target_edit(pointer.name, target)
    hint = f"run `slsgu search {quote(pointer.name)} --target {quote(str(target))} --steer-target`"
    if not store.exists(edit_path(name)):
        raise MissingError(f"{store.url} has no edit {name} to compare", hint=hint)
    edit = load_edit(store, name)
    path = target_trials_path(pointer.name, target)
    trials = store.read_record(path, TargetTrials) if store.exists(path) else None
    if trials is not None and trials.forget == pointer.forget:
        key = (edit.header.layer, edit.header.step)
        if key in {(trial.layer, trial.step) for trial in trials.trials}:
            return edit, trials.seconds
    raise StaleError(f"the edit {name} is not among the recorded trials of its search", hint=hint)
