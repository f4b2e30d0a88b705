"""What `slsgu search A B ... --joint` does: edits that forget several concepts together.

Each concept has an edit of its own, of one layer, along its gradient at the original
weights. Their steps are searched with all of them in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from shlex import join

import torch

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.cases import Case, SearchOptions
from slsgu_cli.edits import write_edit
from slsgu_cli.errors import NotForgottenError, UsageError
from slsgu_cli.evaluation import SharedEvaluation
from slsgu_cli.gradpass import arithmetic
from slsgu_cli.layout import joint_label, joint_path, plot_path
from slsgu_cli.outcomes import FORGET, searched_edit
from slsgu_cli.pictures import CosineMap, cosine_maps
from slsgu_cli.recorded import recorded
from slsgu_cli.records import JointRef, Trial, digest
from slsgu_cli.several.combined import UNMOVED
from slsgu_cli.several.joining import Joining, Own, line_of, search_alone
from slsgu_cli.several.matrices import choose
from slsgu_cli.several.plots import several_plot
from slsgu_cli.several.records import JointSearch, JointTrial
from slsgu_cli.several.searches import read_cases, require_alike, share_evaluation, shares
from slsgu_cli.store import Store


@dataclass(frozen=True, slots=True)
class JointResult:
    """A joint search, how many of its trials were on record before, and where its plots are."""

    found: JointSearch
    forgotten: bool
    reused: int
    plots: tuple[str, ...]

    @property
    def chosen(self) -> JointTrial:
        """The trial that was written as edits."""
        return self.found.stages[-1]


def joint_search(store: Store, names: Sequence[str], *, options: SearchOptions) -> JointResult:
    """Search for one edit per set that forget all concepts together; record and write them.

    Raises UsageError, MissingError, StaleError, and InputError where the sets are not
    measured on the same rows of the same model.
    """
    if len(names) < 2:
        raise UsageError("--joint goes with several names", hint="slsgu search A B --joint")
    cases = read_cases(store, names, options=options)
    require_alike({case.name: shares(case) for case in cases})
    options = cases[0].options
    with torch.no_grad(), arithmetic(options.precision):
        shared = share_evaluation(store, cases)
        owns = [search_alone(store, case, shared) for case in cases]
        fresh = _fresh(owns, shared, options)
        recorded = _recorded(store, fresh)
        utility = shared.utility([case.manifest for case in cases])
        joining = Joining(shared, utility, options, {trial.moves: trial for trial in recorded})
        with progress.bar("joint", len(owns)) as ticker:
            for own in owns:
                joining.join(own)
                ticker.advance()
        found = replace(fresh, stages=tuple(joining.stages), trials=tuple(joining.found.values()))
        store.write_record(joint_path(names), found)
        _write_edits(store, owns, found)
        plots = _draw(store, joining, cases, found)
    return JointResult(found, joining.forgets(found.stages[-1]), len(recorded), plots)


def require_all_forgotten(result: JointResult) -> None:
    """Raise NotForgottenError unless every concept's steered accuracy is 0."""
    if result.forgotten:
        return
    names = result.found.names
    left = ", ".join(
        f"{name} FA@1 {found.top1:.1f} and FA@5 {found.top5:.1f}"
        for name, found in result.chosen.forget.items()
    )
    raise NotForgottenError(
        f"no steps forget {' and '.join(names)} together; the best leave {left}",
        hint=f"the trials and the edits are kept; try `slsgu search {join(names)} --joint "
        "--steps 20`",
    )


def _fresh(owns: Sequence[Own], shared: SharedEvaluation, options: SearchOptions) -> JointSearch:
    """Return a record without trials, with what they will be made from."""
    first = owns[0].case
    shown = {f"{FORGET} {own.case.name}": own.record.evals[FORGET] for own in owns}
    kept = shared.utility([own.case.manifest for own in owns])
    return JointSearch(
        names=tuple(own.case.name for own in owns),
        concepts=tuple(own.case.manifest.concept for own in owns),
        gradients={own.case.name: own.case.pointer.forget for own in owns},
        retain_data={
            own.case.name: own.record.retain_data for own in owns if own.record.retain_data
        },
        model=first.pointer.model,
        model_fingerprint=first.pointer.model_fingerprint,
        evals={n: ref.fingerprint for n, ref in sorted(first.manifest.evals.items())} | shown,
        precision=options.precision,
        steer=options.steer,
        margin=owns[0].record.margin,
        baseline_forget={own.case.name: own.record.baseline_forget for own in owns},
        baseline_utility={name: group.base_accuracy() for name, group in kept.items()},
        stages=(),
        trials=(),
        version=slsgu_cli.__version__,
    )


def _recorded(store: Store, fresh: JointSearch) -> tuple[JointTrial, ...]:
    """Return the trials on record, if they were made from the same things."""
    unusable = "recorded trials cannot be used and are made again"
    old = recorded(store, joint_path(fresh.names), JointSearch, unusable=unusable)
    return old.trials if old and _made_from(old) == _made_from(fresh) else ()


def _made_from(found: JointSearch) -> tuple[object, ...]:
    data = found.gradients, found.retain_data, found.evals
    return *data, found.model_fingerprint, found.precision


def _write_edits(store: Store, owns: Sequence[Own], found: JointSearch) -> None:
    """Write each concept's edit, with the figures of all edits in place."""
    chosen = found.stages[-1]
    joint = JointRef(found.names, digest([found.gradients, found.retain_data, chosen.moves]))
    for own, move in zip(owns, chosen.moves, strict=True):
        trial = Trial(
            layer=move.layer,
            tower=move.tower,
            ridge=move.ridge,
            step=move.step,
            share=move.share,
            forget=chosen.forget[move.name],
            gap=chosen.gaps[move.name],
            utility=chosen.utility,
        )
        record = replace(own.record, baseline_utility=found.baseline_utility)
        probe = own.probes[line_of(move)]
        write_edit(store, searched_edit(own.case, probe, record, trial, joint))


def _draw(
    store: Store, joining: Joining, cases: Sequence[Case], found: JointSearch
) -> tuple[str, ...]:
    """Draw utility against the number of concepts, and the cosine matrix at each number."""
    shown = choose(joining.evaluation, [case.manifest for case in cases])
    maps = [CosineMap("original", shown.cosines(UNMOVED), ())]
    for count, stage in enumerate(found.stages, start=1):
        with joining.in_place(stage.moves) as model:
            forgotten = shown.names[:count]
            maps.append(CosineMap(f"{count} forgotten", shown.cosines(model), forgotten))
    drawn = {
        "several": several_plot(found),
        "cosines": cosine_maps(maps, shown.names, thumbnails=shown.thumbnails),
    }
    paths = {kind: plot_path(joint_label(found.names), kind) for kind in drawn}
    for kind, path in paths.items():
        store.write_bytes(path, drawn[kind])
    return tuple(store.where(path) for path in paths.values())
