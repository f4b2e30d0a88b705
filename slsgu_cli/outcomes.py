"""What a search leaves in the store: the record of its trials, and the edit it chose."""

from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING

import slsgu_cli
from slsgu_cli.cases import Case
from slsgu_cli.models import resolve
from slsgu_cli.recorded import recorded
from slsgu_cli.records import Direction, EditHeader, JointRef, SetManifest, Steer, Trial, Trials
from slsgu_cli.stepsize import left_to_forget
from slsgu_cli.store import Store

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from slsgu_cli.edits import Edit
    from slsgu_cli.evaluation import Evaluation
    from slsgu_cli.trial import Probe

FORGET = "(forget)"


def fresh_trials(case: Case, evaluation: "Evaluation") -> Trials:
    """Return a record without trials, with what they will be made from."""
    manifest, pointer, options = case.manifest, case.pointer, case.options
    return Trials(
        name=manifest.name,
        forget=pointer.forget,
        direction=options.direction or Direction.GRADIENT,
        retain_data=pointer.retain_data if options.direction is Direction.WHITENED else None,
        model_fingerprint=pointer.model_fingerprint,
        evals=measured_on(manifest),
        precision=options.precision,
        steer=options.steer,
        margin=options.margin if options.steer is Steer.MARGIN else None,
        baseline_forget=evaluation.forget.base_accuracy(),
        baseline_utility={n: g.base_accuracy() for n, g in evaluation.utility.items()},
        trials=(),
        version=slsgu_cli.__version__,
    )


def measured_on(manifest: SetManifest) -> dict[str, str]:
    """Return the fingerprints of what the accuracies of a set are measured on."""
    shown = f"{manifest.forget_eval or manifest.forget.fingerprint}:{manifest.concept}"
    evals = {name: ref.fingerprint for name, ref in sorted(manifest.evals.items())}
    return evals | {FORGET: shown}


def recorded_trials(store: Store, path: str, fresh: Trials) -> Trials:
    """Return `fresh` with the trials recorded at `path`, if they were made from the same things."""
    unusable = "recorded trials cannot be used and are made again"
    old = recorded(store, path, Trials, unusable=unusable)
    made_from = attrgetter(
        "forget", "direction", "retain_data", "model_fingerprint", "evals", "precision"
    )
    if old is None or made_from(old) != made_from(fresh):
        return fresh
    return replace(fresh, trials=old.trials)


def searched_edit(
    case: Case, probe: "Probe", trials: Trials, chosen: Trial, joint: JointRef | None = None
) -> "Edit":
    """Return the edit that a chosen trial of a search amounts to."""
    from slsgu_cli.edits import make_edit
    from slsgu_cli.weights import layer_digests

    before = probe.weight.cpu().numpy()
    header = EditHeader(
        name=case.name,
        concept=case.manifest.concept,
        layer=chosen.layer,
        tower=chosen.tower,
        step=chosen.step,
        share=chosen.share,
        model=case.pointer.model,
        model_fingerprint=case.pointer.model_fingerprint,
        digests=layer_digests(before),
        gradient=case.pointer.forget,
        direction=trials.direction,
        ridge=chosen.ridge,
        retain_data=trials.retain_data,
        steer=trials.steer,
        margin=trials.margin,
        forgotten=left_to_forget(chosen, trials.steer, trials.margin) == 0,
        baseline_forget=trials.baseline_forget,
        baseline_utility=trials.baseline_utility,
        forget=chosen.forget,
        utility=chosen.utility,
        joint=joint,
        version=slsgu_cli.__version__,
        layout=resolve(case.pointer.model).spelling,
    )
    delta = (chosen.step * probe.direction).cpu().numpy()
    return make_edit(header, delta=delta, before=compact(before))


def compact(values: "npt.NDArray[np.float32]") -> "npt.NDArray[np.floating]":
    """Return values of a half-precision checkpoint in half precision, if that is exact."""
    half = values.astype("float16")
    return half if (half == values).all() else values
