"""Edits: the change of one layer, read, written, scaled and grouped."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from shlex import quote

import numpy as np

from slsgu_cli import progress
from slsgu_cli.checkpoints.layers import in_whole_and_in_part
from slsgu_cli.checkpoints.lora import is_lora, read_lora
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.errors import InputError, MissingError, NotFiniteError, StaleError, UsageError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.options import StrengthOptions
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store

SUFFIX = ".safetensors"
DELTA, BEFORE = "delta", "before"


@dataclasses.dataclass(frozen=True, slots=True)
class Edit:
    """An edit and how much of it to apply: `factor` times its delta.

    Its tensors are read on demand, one at a time, because a layer of a large model takes much of
    the memory an edit may use. An edit from a LoRA has no original values.
    """

    header: EditHeader
    load: Callable[[str], Floats]
    factor: float = 1.0
    is_lora: bool = False

    def delta(self) -> Floats:
        """Return the change at factor 1, fp32, in the layer's shape. Raises NotFiniteError."""
        delta = self.load(DELTA)
        if not np.isfinite(delta).all():
            name, layer = self.header.name, self.header.layer
            raise NotFiniteError(
                f"the edit {name} changes {layer} by values that are not finite",
                hint=f"run `{Artifact.EDIT.command(name)}`",
            )
        return delta

    def before(self) -> Floats:
        """Return the layer's original values: fp16 of an fp16 layer, else fp32 (or fp64)."""
        return self.load(BEFORE)

    def scaled(self, factor: float) -> "Edit":
        """Return the edit at `factor` of its present strength. Raises InputError."""
        if not math.isfinite(factor) or factor == 0:
            raise InputError(f"an edit cannot be scaled by {factor}")
        return dataclasses.replace(self, factor=self.factor * factor)

    def restepped(self, step: float) -> "Edit":
        """Return the edit as if its step had been `step`. Raises InputError."""
        if self.header.step == 0:
            raise InputError(f"the edit {self.header.name} was made at step 0")
        return dataclasses.replace(self, factor=1.0).scaled(step / self.header.step)

    def of_rank(self, rank: int) -> "Edit":
        """Return the edit with the `rank` largest singular directions of its change only."""

        def load(name: str) -> Floats:
            whole = self.load(name)
            if name != DELTA or whole.ndim < 2:
                return whole
            u, s, v = np.linalg.svd(whole.reshape(len(whole), -1), full_matrices=False)
            truncated: Floats = ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(whole.shape)
            return truncated

        return dataclasses.replace(self, load=load)


def make_edit(header: EditHeader, *, delta: Floats, before: Floats) -> Edit:
    """Return an edit held in memory. Raises InputError if its change is not finite."""
    if not np.isfinite(delta).all():
        raise InputError(
            f"the change of {header.layer} holds values that are not finite",
            hint="a smaller --step, or compute the gradient again in fp32",
        )
    tensors = {DELTA: delta.astype(np.float32, copy=False), BEFORE: before}
    return Edit(header, tensors.__getitem__)


def write_edit(store: Store, edit: Edit) -> str:
    """Write an edit at factor 1 into the store under its name; return its path there."""
    path = Artifact.EDIT.path(edit.header.name)
    store.write_tensors(path, {DELTA: edit.delta(), BEFORE: edit.before()}, edit.header)
    return path


def read_edit(store: Store, path: str) -> Edit:
    """Return the edit at `path` of the store. Raises MissingError, InputError or StaleError."""
    header = store.read_header(path, EditHeader)

    def load(name: str) -> Floats:
        value: Floats = store.read_tensors(path, [name])[name]
        return value

    return Edit(header, load)


def load_edit(store: Store, name_or_path: str) -> Edit:
    """Return the edit of that name in the store, or else the one in that file.

    Raises MissingError, InputError or StaleError, and UsageError for a LoRA of several edits.
    """
    edits = load_edits(store, name_or_path)
    if len(edits) > 1:
        raise UsageError(
            f"{name_or_path} holds several edits: {', '.join(e.header.name for e in edits)}",
            hint="`slsgu apply` takes them together",
        )
    return edits[0]


def load_edits(store: Store, name_or_path: str) -> list[Edit]:
    """Return the edit of that name in the store, or else those in that file: one, or a LoRA's.

    Raises MissingError, InputError or StaleError.
    """
    named_as_file = name_or_path.endswith(SUFFIX) or "/" in name_or_path
    if not named_as_file and store.exists(Artifact.EDIT.path(name_or_path)):
        return [read_edit(store, Artifact.EDIT.path(name_or_path))]
    path = Path(name_or_path)
    if path.is_file():
        folder = Store(str(path.parent))
        if is_lora(path):
            return [Edit(*each, is_lora=True) for each in read_lora(folder, path.name)]
        return [read_edit(folder, path.name)]
    if named_as_file:
        raise MissingError(f"there is no edit file {name_or_path}")
    known = Artifact.EDIT.names(store)
    raise MissingError(
        f"{store.url} has no edit {name_or_path}"
        + (f"; it has {', '.join(known)}" if known else ""),
        hint=f"run `{Artifact.EDIT.command(name_or_path)}`",
    )


def edit_digests(edits: Iterable[Edit]) -> dict[str, str]:
    """Return the digests of the headers of edits, by name."""
    return {edit.header.name: digest(edit.header) for edit in edits}


def earlier_edits(store: Store, edits: Sequence[Edit]) -> list[Edit]:
    """Return the edits of a store that `edits` build on and that are not among them, by name.

    Raises MissingError if one is missing, and StaleError if one, in the store or among `edits`,
    has been remade since.
    """
    named = {edit.header.name: edit for edit in edits}
    earlier: dict[str, Edit] = {}
    for later in (edit.header for edit in edits):
        for name, made in later.after.items():
            if name not in named and not store.exists(Artifact.EDIT.path(name)):
                raise MissingError(
                    f"{store.url} has no edit {name}, which the edit {later.name} builds on",
                    hint=f"name the file of {name} as well, or {_search_again(later)}",
                )
            edit = named.get(name) or read_edit(store, Artifact.EDIT.path(name))
            if digest(edit.header) != made:
                raise StaleError(
                    f"the edit {later.name} builds on an edit {name} that has been remade since",
                    hint=_search_again(later),
                )
            if name not in named:
                earlier[name] = edit
    return [earlier[name] for name in sorted(earlier)]


def _search_again(header: EditHeader) -> str:
    after = " ".join(f"--after {quote(name)}" for name in header.after)
    return f"run `{Artifact.EDIT.command(header.name)} {after}`"


def warn_of_joint_searches(edits: Sequence[Edit]) -> None:
    """Warn of edits that were searched jointly with others that are not applied."""
    present = {(edit.header.name, edit.header.joint) for edit in edits}
    joints = {edit.header.joint for edit in edits if edit.header.joint}
    for joint in sorted(joints, key=lambda joint: joint.digest):
        missing = [name for name in joint.names if (name, joint) not in present]
        if missing:
            there = [name for name in joint.names if name not in missing]
            progress.warn(
                f"{', '.join(there)}: searched jointly with {', '.join(missing)}, whose edit of "
                "that search is not applied here; the figures hold for all of them together"
            )


def warn_of_other_encoders(edits: Sequence[Edit]) -> None:
    """Warn of edits that were searched with edits of other encoders that are not applied."""
    # An edit read from a LoRA is the same edit.
    headers = [dataclasses.replace(edit.header, rank=None) for edit in edits]
    present = {header.name: digest(header) for header in headers}
    for edit in edits:
        others = edit.header.target.applied if edit.header.target else {}
        missing = [name for name, made in sorted(others.items()) if present.get(name) != made]
        if missing:
            progress.warn(
                f"{edit.header.name}: searched with {', '.join(missing)} in place in another text "
                "encoder, as it was then, which is not applied here; its figures hold with both"
            )


def strength_of(edit: Edit, options: StrengthOptions) -> Edit:
    """Return an edit at the rank and the scale of `options`. Raises InputError."""
    limited = edit if options.rank is None else edit.of_rank(options.rank)
    return limited if options.scale == 1 else limited.scaled(options.scale)


def by_layer(edits: Sequence[Edit]) -> dict[str, list[Edit]]:
    """Group edits by the layer they change, in a fixed order of layers and edits.

    Raises UsageError if one changes a whole parameter and another its q, k or v slice.
    """
    layers = sorted({edit.header.layer for edit in edits})
    if twice := in_whole_and_in_part(layers):
        raise UsageError(
            f"{names_of(edits)} change both {twice} as a whole and its q, k or v slice",
            hint="rank and search all of them with the same --qkv",
        )
    return {
        layer: in_order(edit for edit in edits if edit.header.layer == layer) for layer in layers
    }


def by_origin(edits: Sequence[Edit]) -> list[list[Edit]]:
    """Group edits of one layer by the weights they were made for, in any precision."""
    groups: list[list[Edit]] = []
    for edit in edits:
        same, others = [edit], []
        for group in groups:
            known = {value for one in group for value in one.header.digests.values()}
            if known.isdisjoint(edit.header.digests.values()):
                others.append(group)
            else:
                same += group
        groups = [*others, in_order(same)]
    return groups


def in_order(edits: Iterable[Edit]) -> list[Edit]:
    """Return edits in the order in which they are summed."""
    return sorted(edits, key=lambda e: (e.header.name, e.header.gradient, e.factor))


def original_values(edits: Sequence[Edit]) -> Floats:
    """Return the values of a layer before any of its edits.

    Among edits made on copies in several precisions, the finest has the best original.
    """
    return max((edit.before() for edit in edits), key=lambda values: values.itemsize)


def names_of(edits: Sequence[Edit]) -> str:
    """Return the names of edits for a message."""
    names = [edit.header.name for edit in edits]
    return f"the edit {names[0]}" if len(names) == 1 else f"the edits {', '.join(names)}"
