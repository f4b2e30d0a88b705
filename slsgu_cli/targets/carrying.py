"""Carrying edits of a CLIP into a model that is built on it: a copy with the edited layers.

The model is not built. In every weight file of the encoder that holds an edited layer,
the bytes of that layer are replaced; all other bytes and files are the original's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from slsgu_cli import progress
from slsgu_cli.apply import AppliedResult, CopyPlan, require_distinct, single_file, write_copy
from slsgu_cli.destination import all_files, require_place
from slsgu_cli.dtypes import Raw
from slsgu_cli.edits import Edit
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.planning import FilePlan, LayerChange, by_layer, plan_layer
from slsgu_cli.targets.mapping import Slot, placed, slots
from slsgu_cli.targets.states import State
from slsgu_cli.targets.target import OPEN_CLIP, Encoder, Target
from slsgu_cli.weights import SUFFIXES

# Formats that other libraries load in place of the ones edited here.
OTHER_FORMATS = (".msgpack", ".h5", ".onnx", ".ckpt", ".gguf", ".pb")


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryOptions:
    """How to carry edits over. `encoder` names one of several, `link` saves unedited bytes."""

    encoder: str | None = None
    revert: bool = False
    force: bool = False
    overwrite: bool = False
    dry_run: bool = False
    link: bool = False


def carry(
    edits: Sequence[Edit], target: Target, out: Path, *, options: CarryOptions
) -> AppliedResult:
    """Write a copy of a target with edits applied (or undone) at `out`.

    Raises UsageError, InputError, MissingError or StaleError, with nothing written.
    """
    require_distinct(edits)
    require_place(target.path, out, overwrite=options.overwrite)
    plans = plan_target(edits, target, options=options)
    if target.path.is_file():
        plan = single_file(target.path, out, plans[target.path])
    else:
        _tell_of_others(target, plans, force=options.force)
        files = all_files(target.path)
        relative = {str(path.relative_to(target.path)): plan for path, plan in plans.items()}
        plan = CopyPlan(out, files, relative, {})
    model = f"local-dir:{out}" if OPEN_CLIP in plan.files else None
    return write_copy(
        plan, model=model, revert=options.revert, dry_run=options.dry_run, link=options.link
    )


def plan_target(
    edits: Sequence[Edit], target: Target, *, options: CarryOptions
) -> dict[Path, FilePlan]:
    """Check edits against a target and work out the new values of its files.

    An edit goes into the encoder that holds the weights it was made for; where several
    do, one must be named. Raises UsageError, InputError or StaleError.
    """
    new = _NewValues()
    for layer, group in by_layer(edits).items():
        fitting = _fitting(target, layer, group, options)
        taken, refused = [], []
        for encoder, places in fitting:
            try:
                taken.append((encoder.name, _planned(places, layer, group, options)))
            except StaleError as error:
                refused.append(error)
        if not taken:
            raise refused[0]
        if len(taken) > 1:
            raise UsageError(
                f"{layer} fits several encoders of {target.path}",
                hint=f"--encoder {' or '.join(name for name, _ in taken)}",
            )
        for piece in taken[0][1]:
            new.add(*piece)
    return new.plans()


@dataclass
class _NewValues:
    """What the files of a target will hold, collected layer by layer."""

    states: dict[Path, State] = field(default_factory=dict)
    patches: dict[Path, dict[str, Raw]] = field(default_factory=dict)
    changes: dict[Path, list[LayerChange]] = field(default_factory=dict)

    def add(self, state: State, places: Sequence[Slot], values: Raw, change: LayerChange) -> None:
        """Add a layer's new values to the tensors and files that hold it."""

        def now(key: str) -> Raw:
            path = state.owners[key]
            own = self.patches.get(path, {})
            return own[key] if key in own else state.files[path].stored(key)

        for key, value in placed(places, values, now).items():
            path = state.owners[key]
            self.states[path] = state
            self.patches.setdefault(path, {})[key] = value
        for path in {state.owners[slot.key] for slot in places}:
            self.changes.setdefault(path, []).append(change)

    def plans(self) -> dict[Path, FilePlan]:
        """Return what to write into each file."""
        return {
            path: FilePlan(
                path, self.states[path].files[path].splices(patches), tuple(self.changes[path])
            )
            for path, patches in self.patches.items()
        }


Places = list[tuple[State, tuple[Slot, ...]]]


def _fitting(
    target: Target, layer: str, group: Sequence[Edit], options: CarryOptions
) -> list[tuple[Encoder, Places]]:
    """Return the encoders that hold a layer and that it can influence the target through."""
    chosen = target.chosen(options.encoder)
    holding = [(encoder, found) for encoder in chosen if (found := _places(encoder, layer))]
    wanted = group[0].delta().shape
    same = [
        (encoder, found)
        for encoder, found in holding
        if all(state.shape(places) == wanted for state, places in found)
    ]
    fitting = same or holding
    reasons = [encoder.why_not(layer) for encoder in [e for e, _ in fitting] or chosen]
    if all(reasons) and not (fitting and options.force):
        raise InputError(
            f"{layer} cannot influence {target.path}: {reasons[0]}",
            hint=f"`slsgu rank {quote(group[0].header.name)} --target {quote(str(target.path))}` "
            "leaves such layers out"
            + ("; --force writes the edit all the same" if fitting else ""),
        )
    if not fitting:
        raise InputError(f"{target.path} holds no layer {layer}")
    return [pair for pair in fitting if options.force or pair[0].why_not(layer) is None]


def _places(encoder: Encoder, layer: str) -> Places:
    return [
        (state, places)
        for state in encoder.states
        for home in encoder.homes(state)
        if state.holds(places := slots(layer, home))
    ]


def _planned(
    found: Places, layer: str, group: Sequence[Edit], options: CarryOptions
) -> list[tuple[State, tuple[Slot, ...], Raw, LayerChange]]:
    planned = []
    for state, places in found:
        current, dtype = state.layer(places)
        path = state.owners[places[0].key]
        values, change = plan_layer(
            path, layer, current, dtype, group, revert=options.revert, force=options.force
        )
        planned.append((state, places, values, change))
    return planned


def _tell_of_others(target: Target, plans: Mapping[Path, FilePlan], *, force: bool) -> None:
    """Refuse weights that could not be checked; tell of those that other programs load."""
    for path, why in target.unread.items():
        if not force:
            raise InputError(
                f"{path} lies beside the weights and cannot be edited: {why}",
                hint="move it away, or --force to copy it as it is",
            )
        progress.warn(f"{path} was copied as it is: {why}")
    states = [state for encoder in target.encoders for state in encoder.states]
    known = {*target.unread, *(path for state in states for path in state.files)}
    for folder in sorted({target.path, *(path.parent for path in plans)}):
        for path in sorted(folder.iterdir()):
            weights = path.suffix in SUFFIXES and folder == target.path
            if path not in known and (weights or path.suffix in OTHER_FORMATS):
                progress.warn(f"{path} was copied without the edit")
