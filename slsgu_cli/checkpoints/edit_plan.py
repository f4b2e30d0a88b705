"""The new values of a model's files under some edits; nothing is written."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, by_layer, by_origin
from slsgu_cli.checkpoints.layouts import WeightSet, placed
from slsgu_cli.checkpoints.naming_schemes import Places, tensor_places
from slsgu_cli.checkpoints.number_formats import Raw
from slsgu_cli.checkpoints.stored_layer import LayerChange, StoredLayer
from slsgu_cli.checkpoints.targets import Encoder, Target, prompt_note, with_edits
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.records.options import ApplyOptions

# The places of a layer in each set of an encoder's weights that has it.
Copies = list[tuple[WeightSet, Places]]


@dataclass(frozen=True, slots=True)
class FilePlan:
    """New values of a file's tensors, by name and as it stores them, and what that changes."""

    values: dict[str, Raw] = field(default_factory=dict)
    changes: list[LayerChange] = field(default_factory=list)


def require_distinct(edits: Sequence[Edit]) -> None:
    """Refuse to apply no edit, or one edit twice. Raises UsageError."""
    if not edits:
        raise UsageError("name at least one edit to apply")
    seen = Counter((e.header.name, e.header.layer, e.header.gradient) for e in edits)
    twice = [name for (name, _, _), count in seen.items() if count > 1]
    if twice:
        raise UsageError(f"the edit {twice[0]} is named twice", hint="use --scale 2")


def plan_target(
    edits: Sequence[Edit],
    target: Target,
    options: ApplyOptions,
    earlier: Sequence[Edit] = (),
) -> tuple[dict[Path, FilePlan], set[str]]:
    """Return the new values of a model's files, and the encoders that change; write nothing.

    An edit goes into every copy of the encoder with the weights it was made for; if several
    encoders have them, one must be named. `earlier` edits must be in place and stay.
    Raises UsageError, InputError or StaleError.
    """
    plans: dict[Path, FilePlan] = {}
    edited: set[str] = set()
    encoders = target.chosen(options.encoder)
    for layer, of_layer in by_layer([*edits, *earlier]).items():
        holding = [(encoder, copies_of(encoder, layer)) for encoder in encoders]
        for group in by_encoder(of_layer, [c for _, c in holding], force=options.force):
            new = [edit for edit in group if edit not in earlier]
            below = [edit for edit in group if edit in earlier]
            if new:
                encoder, stored = _fitting(target, holding, new, below, options)
                edited.add(encoder.name)
                for weights, places, values, change in stored:
                    _add(plans, weights, places, values, change)
                for lacking in encoder.copies:
                    if not any(lacking is weights for weights, *_ in stored):
                        progress.warn(
                            f"{lacking.path} has no {layer} and was copied without the edit"
                        )
            elif not (options.force or options.revert):
                _require_earlier(holding, below, edits)
    note = prompt_note(str(target.path), with_edits(target.readers, edited))
    if note and not options.revert:
        progress.note(note)
    return plans, edited


def _add(
    plans: dict[Path, FilePlan],
    weights: WeightSet,
    places: Places,
    values: Raw,
    change: LayerChange,
) -> None:
    """Add a layer's new values to the plans of the files that hold it."""
    for key, value in placed(places, values, patched(weights, plans)).items():
        plans.setdefault(weights.owners[key], FilePlan()).values[key] = value
    for path in {weights.owners[place.key] for place in places}:
        plans[path].changes.append(change)


def patched(weights: WeightSet, plans: Mapping[Path, FilePlan]) -> Callable[[str], Raw]:
    """Return a function from a tensor's name to its values under the plans."""

    def current(key: str) -> Raw:
        plan = plans.get(weights.owners[key])
        return plan.values[key] if plan and key in plan.values else weights.stored(key)

    return current


def _fitting(
    target: Target,
    holding: Sequence[tuple[Encoder, Copies]],
    edits: Sequence[Edit],
    earlier: Sequence[Edit],
    options: ApplyOptions,
) -> tuple[Encoder, list[tuple[WeightSet, Places, Raw, LayerChange]]]:
    """Return the encoder that edits of a layer go into, and the new values in each copy of it.

    Raises UsageError if several fit, InputError or StaleError.
    """
    planned, refused = [], []
    for encoder, copies in _influential(target, holding, edits, force=options.force):
        try:
            layers = (
                (weights, places, StoredLayer(weights, places, edits, earlier))
                for weights, places in copies
            )
            new = [(weights, places, *layer.planned(options)) for weights, places, layer in layers]
            planned.append((encoder, new))
        except StaleError as error:
            refused.append(error)
    if not planned:
        raise refused[0]
    if len(planned) > 1:
        raise UsageError(
            f"{edits[0].header.layer} fits several encoders of {target.path}",
            hint=f"--encoder {' or '.join(encoder.name for encoder, _ in planned)}",
        )
    return planned[0]


def _influential(
    target: Target,
    holding: Sequence[tuple[Encoder, Copies]],
    edits: Sequence[Edit],
    *,
    force: bool,
) -> list[tuple[Encoder, Copies]]:
    """Return the encoders with a layer through which it can influence the target."""
    layer = edits[0].header.layer
    there = [(encoder, copies) for encoder, copies in holding if copies]
    if len(there) > 1:
        shape = edits[0].delta().shape
        there = [
            (encoder, copies)
            for encoder, copies in there
            if all(weights.shape(places) == shape for weights, places in copies)
        ] or there
    reasons = [encoder.why_not(layer) for encoder, _ in there or holding]
    if all(reasons) and not (there and force):
        raise InputError(
            f"{layer} cannot influence {target.path}: {reasons[0]}",
            hint=f"`slsgu rank {quote(edits[0].header.name)} --target {quote(str(target.path))}` "
            "leaves such layers out" + ("; --force writes the edit anyway" if there else ""),
        )
    if not there:
        raise InputError(f"{target.path} holds no layer {layer}")
    return [pair for pair in there if force or pair[0].why_not(layer) is None]


def _require_earlier(
    holding: Sequence[tuple[Encoder, Copies]], earlier: Sequence[Edit], later: Sequence[Edit]
) -> None:
    """Raise StaleError unless earlier edits of a layer that no later edit changes are in place.

    A target without that layer does not need them; one of several encoders has them.
    """
    refused: list[StaleError] = []
    for _, copies in holding:
        try:
            for weights, places in copies:
                StoredLayer(weights, places, earlier).require_in_place(later)
        except StaleError as error:
            refused.append(error)
            continue
        if copies:
            return
    if refused:
        raise refused[0]


def copies_of(encoder: Encoder, layer: str) -> Copies:
    """Return the places of a layer in each set of an encoder's weights that has it."""
    return [
        (weights, places)
        for weights in encoder.copies
        for tower_place in encoder.towers(weights)
        if weights.holds(places := tensor_places(layer, tower_place))
    ]


def by_encoder(
    edits: Sequence[Edit], holding: Sequence[Copies], *, force: bool = False
) -> list[list[Edit]]:
    """Group the edits of a layer by encoder if several encoders have it.

    `holding` has the places of the layer in each encoder. With `force`, only shapes distinguish
    encoders.
    """
    if sum(map(bool, holding)) < 2:
        return [[*edits]]
    if not force:
        return by_origin(edits)
    by_shape: dict[tuple[int, ...], list[Edit]] = {}
    for edit in edits:
        by_shape.setdefault(edit.delta().shape, []).append(edit)
    return [*by_shape.values()]
