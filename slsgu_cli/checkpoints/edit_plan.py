"""The new values of a model's files under some edits; nothing is written."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import (
    Edit,
    LayerChange,
    StoredLayer,
    by_layer,
    by_origin,
)
from slsgu_cli.checkpoints.layouts import WeightSet, placed
from slsgu_cli.checkpoints.model_copy import FilePlan
from slsgu_cli.checkpoints.naming_schemes import Places, tensor_places
from slsgu_cli.checkpoints.number_formats import Raw
from slsgu_cli.checkpoints.targets import Encoder, Target, prompt_note
from slsgu_cli.checkpoints.tensor_file import canonical_name
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.records.options import ApplyOptions
from slsgu_cli.text import near_names


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
    new = _NewValues()
    for layer, of_layer in by_layer([*edits, *earlier]).items():
        holding = [copies_of(encoder, layer) for encoder in target.chosen(options.encoder)]
        for part in by_encoder(of_layer, holding, force=options.force):
            group = [edit for edit in part if edit not in earlier]
            below = [edit for edit in part if edit in earlier]
            if group:
                encoder, planned = _planned_in_one(target, layer, group, options, below)
                new.add(encoder, planned)
            elif not (options.force or options.revert):
                _require_earlier(target, below, edits, options)
    for path, layers in new.lacking.items():
        progress.warn(f"{path} has no {' or '.join(layers)} and was copied without the edit")
    note = prompt_note(str(target.path), target.marked_readers(new.encoders))
    if note and not options.revert:
        progress.note(note)
    return new.plans(), new.encoders


def _planned_in_one(
    target: Target,
    layer: str,
    group: Sequence[Edit],
    options: ApplyOptions,
    below: Sequence[Edit],
) -> "tuple[Encoder, list[_PlannedLayer]]":
    """Return the encoder that edits of a layer go into, and the new values in each copy of it.

    Raises UsageError if several fit, InputError or StaleError.
    """
    planned: list[tuple[Encoder, list[_PlannedLayer]]] = []
    refused: list[StaleError] = []
    for encoder, copies in _fitting(target, layer, group, options):
        try:
            layers = []
            for weights, places in copies:
                stored = StoredLayer.read(weights, places, group, below)
                layers.append(_PlannedLayer(weights, places, *stored.planned(options)))
            planned.append((encoder, layers))
        except StaleError as error:
            refused.append(error)
    if not planned:
        raise refused[0]
    if len(planned) > 1:
        raise UsageError(
            f"{layer} fits several encoders of {target.path}",
            hint=f"--encoder {' or '.join(encoder.name for encoder, _ in planned)}",
        )
    return planned[0]


Copies = list[tuple[WeightSet, Places]]


@dataclass(frozen=True, slots=True)
class _PlannedLayer:
    """The new values of a layer in one set of weights, and the places of its tensors."""

    weights: WeightSet
    places: Places
    values: Raw
    change: LayerChange


@dataclass
class _NewValues:
    """The new values of a model's files, collected layer by layer.

    `lacking` maps other copies of an edited encoder to the layers they do not have, and
    `encoders` are the names of the edited encoders.
    """

    weights: dict[Path, WeightSet] = field(default_factory=dict)
    patches: dict[Path, dict[str, Raw]] = field(default_factory=dict)
    changes: dict[Path, list[LayerChange]] = field(default_factory=dict)
    lacking: dict[Path, list[str]] = field(default_factory=dict)
    encoders: set[str] = field(default_factory=set)

    def add(self, encoder: Encoder, planned: Sequence[_PlannedLayer]) -> None:
        """Add the new values of a layer in the copies of an encoder that hold it."""
        self.encoders.add(encoder.name)
        for layer in planned:
            self._add(layer)
        for weights in encoder.copies:
            if not any(weights is one.weights for one in planned):
                self.lacking.setdefault(weights.path, []).append(planned[0].change.layer)

    def _add(self, layer: _PlannedLayer) -> None:
        """Add a layer's new values to the tensors and files that hold it."""
        weights = layer.weights
        current = patched(weights, self.patches)
        for key, value in placed(layer.places, layer.values, current).items():
            path = weights.owners[key]
            self.weights[path] = weights
            self.patches.setdefault(path, {})[key] = value
        for path in {weights.owners[place.key] for place in layer.places}:
            self.changes.setdefault(path, []).append(layer.change)

    def plans(self) -> dict[Path, FilePlan]:
        """Return the new values of each file."""
        return {
            path: FilePlan(
                self.weights[path].files[path].prepared(patches), tuple(self.changes[path])
            )
            for path, patches in self.patches.items()
        }


def patched(weights: WeightSet, patches: Mapping[Path, Mapping[str, Raw]]) -> Callable[[str], Raw]:
    """Return a function from a tensor's name to its new values, by the patches of each file."""

    def current(key: str) -> Raw:
        new = patches.get(weights.owners[key], {})
        return new[key] if key in new else weights.stored(key)

    return current


def _require_earlier(
    target: Target, earlier: Sequence[Edit], later: Sequence[Edit], options: ApplyOptions
) -> None:
    """Raise StaleError unless earlier edits of a layer that no later edit changes are in place.

    A target without that layer does not need them; one of several encoders has them.
    """
    layer = earlier[0].header.layer
    refused: list[StaleError] = []
    for encoder in target.chosen(options.encoder):
        copies = copies_of(encoder, layer)
        try:
            for weights, places in copies:
                StoredLayer.read(weights, places, earlier).require_in_place(later)
        except StaleError as error:
            refused.append(error)
            continue
        if copies:
            return
    if refused:
        raise refused[0]


def _fitting(
    target: Target, layer: str, group: Sequence[Edit], options: ApplyOptions
) -> list[tuple[Encoder, Copies]]:
    """Return the encoders with a layer through which it can influence the target."""
    chosen = target.chosen(options.encoder)
    fitting = [(encoder, copies) for encoder in chosen if (copies := copies_of(encoder, layer))]
    if len(fitting) > 1:
        wanted = group[0].delta().shape
        fitting = [
            (encoder, copies)
            for encoder, copies in fitting
            if all(weights.shape(places) == wanted for weights, places in copies)
        ] or fitting
    reasons = [encoder.why_not(layer) for encoder in [e for e, _ in fitting] or chosen]
    if all(reasons) and not (fitting and options.force):
        raise InputError(
            f"{layer} cannot influence {target.path}: {reasons[0]}",
            hint=f"`slsgu rank {quote(group[0].header.name)} --target {quote(str(target.path))}` "
            "leaves such layers out" + ("; --force writes the edit anyway" if fitting else ""),
        )
    if not fitting:
        names = {key for encoder in chosen for weights in encoder.copies for key in weights.owners}
        near = near_names(layer, sorted(map(canonical_name, names)))
        raise InputError(f"{target.path} holds no layer {layer}{near}")
    return [pair for pair in fitting if options.force or pair[0].why_not(layer) is None]


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
