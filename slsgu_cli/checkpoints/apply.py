"""Edited copies of models of every kind: where they may go, what is changed, how it is written."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import (
    Edit,
    LayerChange,
    StoredLayer,
    by_layer,
    by_origin,
    strength_of,
)
from slsgu_cli.checkpoints.layers import Places, Spelling, TowerPlace, tensor_places
from slsgu_cli.checkpoints.layouts import SUFFIXES, Conversion, WeightSet, open_weights, placed
from slsgu_cli.checkpoints.targets import CONFIG, OPEN_CLIP, Encoder, Family, Target, prompt_note
from slsgu_cli.checkpoints.tensor_file import (
    NewTensor,
    Raw,
    Splice,
    canonical_name,
    copy_spliced,
    safetensors_size,
    write_safetensors,
)
from slsgu_cli.errors import InputError, StaleError, UsageError, listed, near_names
from slsgu_cli.records.method import PromptReader
from slsgu_cli.records.options import ApplyOptions
from slsgu_cli.records.sets import LOCAL
from slsgu_cli.store.files import (
    PARTIAL,
    copy_file,
    link_file,
    replacing,
    require_regular,
    same_place,
)


def require_place(
    origin: Path, out: Path, *, overwrite: bool, layout: "OtherLayout | None" = None
) -> None:
    """Refuse an `out` that is occupied or that lies across the model at `origin`.

    With `overwrite` it may be occupied, by the model itself as well unless it gets another
    layout. Raises InputError or UsageError.
    """
    require_regular(out)
    as_folder = origin.is_dir() if layout is None else bool(layout.file)
    if as_folder and out.suffix in SUFFIXES and not out.is_dir():
        what = "the model is a folder" if layout is None else f"{layout.client} loads a folder"
        raise UsageError(f"{out} names a file, but {what}", hint="--out FOLDER")
    if layout is not None and not as_folder and (out.suffix != SAFETENSORS or out.is_dir()):
        raise UsageError(f"{layout.client} loads one file", hint=f"--out FILE{SAFETENSORS}")
    if same_place(origin, out):
        if layout is None and overwrite:
            return
        in_place = ", or --overwrite to edit it in place" if layout is None else ""
        raise InputError(f"{out} is the model itself", hint=f"another --out{in_place}")
    if out.resolve().is_relative_to(origin.resolve()):
        raise InputError(f"{out} lies inside the model {origin}", hint="another --out")
    if origin.resolve().is_relative_to(out.resolve()) and overwrite:
        raise InputError(f"{out} holds the model {origin}", hint="another --out")
    occupied = any(out.iterdir()) if out.is_dir() else out.exists()
    if occupied and not overwrite:
        raise InputError(f"{out} exists already", hint="another --out, or --overwrite")
    if as_folder and occupied and not out.is_dir():
        raise InputError(f"{out} is a file, but the model is a folder", hint="another --out")


def require_nothing_lost(out: Path, written: Iterable[str]) -> None:
    """Refuse to replace a folder that holds files whose names are not `written` anew.

    Raises InputError for these, and for what is neither a file nor a folder.
    """
    if not out.is_dir():
        return
    kept = set(written)
    card = out / README
    if card.is_file() and OURS.encode() in card.read_bytes():
        kept.add(README)
    present = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
    for path in present:
        require_regular(path)
    names = (str(path.relative_to(out)) for path in present)
    lost = sorted(name for name in names if name not in kept and not name.startswith(PARTIAL))
    if lost:
        raise InputError(
            f"{out} holds files that would be lost: {listed(lost)}",
            hint="another --out, or move them away",
        )


def all_files(folder: Path) -> dict[str, Path]:
    """Return every file below a folder by its relative name; links to files are followed.

    Raises InputError for what cannot be copied.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(PARTIAL) for part in name.parts):
            continue
        if path.is_symlink() and path.is_dir():
            raise InputError(f"{path} is a link to a folder", hint="replace it by what it leads to")
        if path.is_file():
            files[str(name)] = path
        elif not path.is_dir():
            raise InputError(f"{path} is neither a file nor a folder", hint="remove it")
    return files


SAFETENSORS, README = ".safetensors", "README.md"
# What tells a model card that was written with edits.
OURS = "<!-- slsgu: edited -->"

# What open_clip looks for in a folder, by the kind of file.
STANDARD_NAME = {
    "safetensors": "open_clip_model.safetensors",
    "torch": "open_clip_pytorch_model.bin",
}

# Formats that other libraries load in place of the ones edited here.
OTHER_FORMATS = (".msgpack", ".h5", ".onnx", ".ckpt", ".gguf", ".pb")


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """An edited file of the result: its path, its size, what changed in it."""

    path: str
    nbytes: int
    changes: tuple[LayerChange, ...]


@dataclass(frozen=True, slots=True)
class AppliedResult:
    """What apply wrote, or with `dry_run` would write.

    `model` names the result for `--model` where it was checked that `client` loads it.
    `readers` are what reads prompts of a pipeline, and which of them edits went into.
    """

    out: str
    model: str | None
    files: tuple[WrittenFile, ...]
    reverted: bool
    dry_run: bool
    client: str = "open_clip"
    readers: tuple[PromptReader, ...] = ()


@dataclass(frozen=True, slots=True)
class FilePlan:
    """What to write into a copy of a file, and what that changes; `values` are by tensor."""

    splices: list[Splice]
    changes: tuple[LayerChange, ...]
    values: Mapping[str, Raw] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Where everything goes: `files` maps a name below `out` ("" is `out`) to its source.

    Files with a plan are edited, `texts` and files `made` of tensors are written anew, all
    others are as they were. `client` is what loads the result.
    """

    out: Path
    files: dict[str, Path]
    plans: dict[str, FilePlan]
    texts: dict[str, str] = field(default_factory=dict)
    made: dict[str, list[NewTensor]] = field(default_factory=dict)
    client: str = "open_clip"

    @property
    def is_model(self) -> bool:
        """Whether the result is a folder with the configuration of a client that loads it."""
        return OPEN_CLIP in self.files or bool({OPEN_CLIP, CONFIG} & self.texts.keys())

    def nbytes(self, name: str) -> int:
        """Return the size of a file."""
        if name in self.made:
            return safetensors_size(self.made[name])
        return self.files[name].stat().st_size


@dataclass(frozen=True, slots=True)
class OtherLayout:
    """Another layout to write a model in, for a `client`.

    All weights of `towers` go into one `file`, beside other `files` and `texts`; with "" it is
    all there is. `names` is whose names list the model's tensors, and `weights` where the copy
    lies that is read: None for the one that is edited. A layer of `optional` may be missing.
    """

    client: str
    file: str
    names: Spelling
    towers: tuple[TowerPlace, ...]
    weights: Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()


# Gets the number formats of edited tensors, and returns a remark on the model they are in.
Compare = Callable[[Collection[str]], str | None]
# Gets the model card that is there, and returns the one to write: None for none.
Card = Callable[[str | None], str | None]
# Gets a folder with open_clip's configuration, and returns why open_clip may not load it.
Check = Callable[[Path], str | None]


def apply_edits(
    edits: Sequence[Edit],
    target: Target,
    out: Path,
    *,
    options: ApplyOptions,
    config: Mapping[str, Any] | None = None,
    beside: Mapping[str, Path] | None = None,
    earlier: Sequence[Edit] = (),
    compare: Compare | None = None,
    check: Check | None = None,
    card: Card | None = None,
    layout: OtherLayout | None = None,
) -> AppliedResult:
    """Write a copy of a model with edits applied (or undone) at `out`.

    They stand on `earlier` ones, which must be in place and stay as they are.
    `out` is a folder, or for a single file also a file of the same format. With `config`,
    the content of its configuration, a single file becomes a folder in open_clip's layout,
    which holds the files of `beside` as well.
    `compare` runs while files are copied, and what it remarks is told before they are in place.
    `check` looks at a folder in open_clip's layout before it is in place. `card` says which
    model card a folder has. With a `layout`, the copy has that one.
    What stands at `out` is replaced in one step, the model itself included.
    Raises UsageError, InputError, MissingError or StaleError, with nothing written.
    """
    require_distinct(edits)
    require_place(target.path, out, overwrite=options.overwrite, layout=layout)
    scaled = [strength_of(edit, options) for edit in edits]
    plans, encoders = plan_target(scaled, target, options, earlier)
    if layout is not None:
        copy = _converted_copy(target, out, plans, layout, options)
    elif target.path.is_file():
        copy = _file_copy(target.path, out, plans[target.path], config, beside or {})
    else:
        _tell_of_others(target, plans, options)
        relative = {str(path.relative_to(target.path)): plan for path, plan in plans.items()}
        copy = CopyPlan(out, all_files(target.path), relative)
    result = write_copy(_with_card(copy, card), options, compare, check)
    return replace(result, readers=target.readers_beside(encoders))


def _with_card(plan: CopyPlan, card: Card | None) -> CopyPlan:
    """Return a plan with the model card of a folder; of one file there is none."""
    if card is None or "" in plan.plans:
        return plan
    there = plan.files.get(README)
    present = there.read_bytes().decode("utf-8", "surrogateescape") if there else None
    text = card(present)
    if text == present:
        return plan
    files = {name: path for name, path in plan.files.items() if name != README}
    texts = plan.texts if text is None else plan.texts | {README: text}
    return replace(plan, files=files, texts=texts)


def copy_model(
    target: Target,
    out: Path,
    *,
    options: ApplyOptions,
    config: Mapping[str, Any] | None = None,
    beside: Mapping[str, Path] | None = None,
    check: Check | None = None,
) -> AppliedResult:
    """Write a copy of a model at `out`, laid out as `apply_edits` does it, without any edit.

    Raises UsageError or InputError, with nothing written.
    """
    require_place(target.path, out, overwrite=options.overwrite)
    if target.path.is_file():
        copy = _file_copy(target.path, out, FilePlan([], ()), config, beside or {})
    else:
        copy = CopyPlan(out, all_files(target.path), {})
    return write_copy(copy, options, check=check)


def require_distinct(edits: Sequence[Edit]) -> None:
    """Refuse to apply no edit, or one edit twice. Raises UsageError."""
    if not edits:
        raise UsageError("no edit to apply was named")
    seen = Counter((e.header.name, e.header.layer, e.header.gradient) for e in edits)
    twice = [name for (name, _, _), count in seen.items() if count > 1]
    if twice:
        raise UsageError(f"the edit {twice[0]} is named twice", hint="use --scale 2")


def _file_copy(
    weights: Path,
    out: Path,
    plan: FilePlan,
    config: Mapping[str, Any] | None,
    beside: Mapping[str, Path],
) -> CopyPlan:
    """Return where one edited file goes: to `out` itself, or into the folder `out`."""
    container = open_weights(weights).container
    if out.suffix in {*SUFFIXES, weights.suffix} - {""} and not out.is_dir():
        if (out.suffix == SAFETENSORS) != (container == "safetensors"):
            raise UsageError(
                f"{out.name} asks for another format than {weights.name} has",
                hint=f"--out {out.with_suffix(weights.suffix)}, or a folder",
            )
        return CopyPlan(out, {"": weights}, {"": plan})
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file without a checkpoint's suffix", hint="another --out")
    if config is None:
        return CopyPlan(out, {weights.name: weights}, {weights.name: plan})
    name = STANDARD_NAME[container]
    text = json.dumps(config, indent=2) + "\n"
    return CopyPlan(out, {**beside, name: weights}, {name: plan}, {OPEN_CLIP: text})


def _converted_copy(
    target: Target,
    out: Path,
    plans: Mapping[Path, FilePlan],
    layout: OtherLayout,
    options: ApplyOptions,
) -> CopyPlan:
    """Return what a model has in another layout: its weights as they are planned, in one file."""
    edited = {
        encoder.name: weights
        for encoder in target.chosen(options.encoder)
        for weights in reversed(encoder.copies)
        if (layout.weights in weights.files if layout.weights else plans.keys() & weights.files)
    }
    if len(edited) > 1:
        raise UsageError(
            f"{layout.client} loads one encoder, and these edits are of {' and '.join(edited)}",
            hint="write each by a command of its own, with the edits of it",
        )
    (weights,) = edited.values()

    current = _patched(weights, {path: plan.values for path, plan in plans.items()})
    conversion = Conversion(weights, layout.names, layout.towers, current, layout.optional)
    changes = [change for path in weights.files if path in plans for change in plans[path].changes]
    return CopyPlan(
        out,
        dict(layout.files),
        {layout.file: FilePlan([], tuple(changes))},
        dict(layout.texts),
        {layout.file: conversion.tensors()},
        layout.client,
    )


def write_copy(
    plan: CopyPlan,
    options: ApplyOptions,
    compare: Compare | None = None,
    check: Check | None = None,
) -> AppliedResult:
    """Write what a plan says, all of it or nothing; on a dry run only tell.

    Raises InputError where files at the plan's place would be lost.
    """
    require_nothing_lost(plan.out, [*plan.files, *plan.texts, *plan.made])
    formats = {change.dtype for file in plan.plans.values() for change in file.changes}
    loads = False
    with ThreadPoolExecutor(1) as beside:
        remark = beside.submit(compare, formats) if compare else None

        def look(folder: Path) -> None:
            nonlocal loads
            if check and plan.is_model:
                why_not = check(folder)
                loads = why_not is None
                if why_not:
                    which = f"{plan.client} loads {plan.out}"
                    progress.warn(f"it is not certain that {which}: {why_not}")
            if remark and (told := remark.result()):
                progress.note(told)

        if options.dry_run:
            with _rehearsed(plan) as folder:
                look(folder)
        else:
            _write(plan, link=options.link, last=look)
    files = tuple(
        WrittenFile(str(plan.out / name), plan.nbytes(name), file.changes)
        for name, file in sorted(plan.plans.items())
    )
    out = str(plan.out)
    model = out if CONFIG in plan.texts else f"{LOCAL}{out}"
    return AppliedResult(
        out, model if loads else None, files, options.revert, options.dry_run, plan.client
    )


def _write(plan: CopyPlan, *, link: bool, last: Callable[[Path], None]) -> None:
    """Build a copy, and put it in place after what is done with it `last`."""
    with replacing(plan.out) as partial:
        for name, origin in plan.files.items():
            place = partial / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if name in plan.plans:
                copy_spliced(origin, place, plan.plans[name].splices)
            elif not (link and link_file(origin, place)):
                copy_file(origin, place)
        for name, tensors in plan.made.items():
            place = partial / name
            place.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(place, tensors)
        _write_texts(partial, plan)
        last(partial)


def _write_texts(folder: Path, plan: CopyPlan) -> None:
    """Write what a plan has as text; a card of strangers may hold bytes that are no UTF-8."""
    for name, text in plan.texts.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))


@contextmanager
def _rehearsed(plan: CopyPlan) -> Iterator[Path]:
    """Yield a folder of links to what a plan copies: edits leave the headers as they are."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, origin in plan.files.items():
            if name:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(origin.absolute())
        for name, tensors in plan.made.items():
            write_safetensors(folder / (name or "file"), tensors, holes=True)
        _write_texts(folder, plan)
        yield folder


def plan_target(
    edits: Sequence[Edit],
    target: Target,
    options: ApplyOptions,
    earlier: Sequence[Edit] = (),
) -> tuple[dict[Path, FilePlan], set[str]]:
    """Return the new values of a model's files, and its encoders that have them; write nothing.

    An edit goes into every copy of the encoder that holds the weights it was made for; where
    several encoders do, one must be named. What `earlier` edits made of the model must be in
    place, and stays. Raises UsageError, InputError or StaleError.
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
        progress.warn(f"{path} has no {' or '.join(layers)} and is copied without the edit")
    note = prompt_note(str(target.path), target.readers_beside(new.encoders))
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
    """Return the encoder that edits of a layer go into, and what each copy of it will hold.

    Raises UsageError where several fit, InputError or StaleError.
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
    """The new values of a layer in one set of weights, and the tensors that hold it."""

    weights: WeightSet
    places: Places
    values: Raw
    change: LayerChange


@dataclass
class _NewValues:
    """What the files of a model will hold, collected layer by layer.

    `lacking` has the layers that other copies of an edited encoder do not hold, and
    `encoders` which ones are edited.
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
        current = _patched(weights, self.patches)
        for key, value in placed(layer.places, layer.values, current).items():
            path = weights.owners[key]
            self.weights[path] = weights
            self.patches.setdefault(path, {})[key] = value
        for path in {weights.owners[place.key] for place in layer.places}:
            self.changes.setdefault(path, []).append(layer.change)

    def plans(self) -> dict[Path, FilePlan]:
        """Return what to write into each file."""
        return {
            path: FilePlan(
                self.weights[path].files[path].splices(patches),
                tuple(self.changes[path]),
                patches,
            )
            for path, patches in self.patches.items()
        }


def _patched(weights: WeightSet, patches: Mapping[Path, Mapping[str, Raw]]) -> Callable[[str], Raw]:
    """Return what tells a tensor's values as they will be, by the new ones of each file."""

    def current(key: str) -> Raw:
        new = patches.get(weights.owners[key], {})
        return new[key] if key in new else weights.stored(key)

    return current


def _require_earlier(
    target: Target, earlier: Sequence[Edit], later: Sequence[Edit], options: ApplyOptions
) -> None:
    """Raise StaleError unless a layer that later edits leave alone is what earlier ones made.

    A target without that layer has no use for them; of several encoders, one holds them.
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
    """Return the encoders that hold a layer and that it can influence the target through."""
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
            "leaves such layers out"
            + ("; --force writes the edit all the same" if fitting else ""),
        )
    if not fitting:
        names = {key for encoder in chosen for weights in encoder.copies for key in weights.owners}
        near = near_names(layer, sorted(map(canonical_name, names)))
        raise InputError(f"{target.path} holds no layer {layer}{near}")
    return [pair for pair in fitting if options.force or pair[0].why_not(layer) is None]


def copies_of(encoder: Encoder, layer: str) -> Copies:
    """Return where a layer lies in each set of an encoder's weights that holds it."""
    return [
        (weights, places)
        for weights in encoder.copies
        for tower_place in encoder.towers(weights)
        if weights.holds(places := tensor_places(layer, tower_place))
    ]


def by_encoder(
    edits: Sequence[Edit], holding: Sequence[Copies], *, force: bool = False
) -> list[list[Edit]]:
    """Return edits of a layer, those of different encoders apart where several hold it.

    `holding` is where each encoder has the layer. With `force`, shapes alone tell encoders apart.
    """
    if sum(map(bool, holding)) < 2:
        return [[*edits]]
    if not force:
        return by_origin(edits)
    by_shape: dict[tuple[int, ...], list[Edit]] = {}
    for edit in edits:
        by_shape.setdefault(edit.delta().shape, []).append(edit)
    return [*by_shape.values()]


def _tell_of_others(target: Target, plans: Mapping[Path, FilePlan], options: ApplyOptions) -> None:
    """Refuse weights that could not be checked; tell of those that other programs load."""
    for path, why in target.unread.items():
        if not options.force:
            raise InputError(
                f"{path} lies beside the weights and cannot be edited: {why}",
                hint="move it away, or --force to copy it as it is",
            )
        progress.warn(f"{path} was copied as it is: {why}")
    sets = [weights for encoder in target.encoders for weights in encoder.copies]
    known = {*target.unread, *(path for weights in sets for path in weights.files)}
    for folder in sorted({target.path, *(path.parent for path in plans)}):
        for path in sorted(set(folder.iterdir()) - known):
            beside = folder == target.path and path.suffix in SUFFIXES and _has_tensors(path)
            if beside or path.suffix in OTHER_FORMATS:
                progress.warn(f"{path} was copied without the edit")
    if target.family is Family.CLIP:
        for path in sorted(target.path.glob("*/**/*")):
            if path.suffix in SUFFIXES:
                progress.warn(f"{path} lies below the model's folder: copied without the edit")


def _has_tensors(path: Path) -> bool:
    """Return whether a file holds tensors, or might: one that cannot be read may be weights."""
    try:
        return not path.is_file() or bool(open_weights(path).names())
    except InputError:
        return True
