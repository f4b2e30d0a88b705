"""The edit artifact: one layer's change, shareable, scalable, undone to the bit.

A safetensors file with the tensors `delta` (what is added) and `before` (the layer as it
was, in its own precision), and an EditHeader. It applies to every copy of the weights it
was made for, whatever their container or precision.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from shlex import quote

import numpy as np

from slsgu_cli.dtypes import Floats
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.layout import edit_path
from slsgu_cli.records import EditHeader
from slsgu_cli.store import Store

SUFFIX = ".safetensors"
DELTA, BEFORE = "delta", "before"


@dataclasses.dataclass(frozen=True, slots=True)
class Edit:
    """An edit and how much of it to apply: `factor` times its delta.

    Its tensors are read when they are asked for, one at a time: a layer of a large
    model takes a good part of the memory an edit may use.
    """

    header: EditHeader
    load: Callable[[str], Floats]
    factor: float = 1.0

    def delta(self) -> Floats:
        """Return what the edit adds at factor 1, fp32, in the layer's shape."""
        return self.load(DELTA)

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
        if rank < 1:
            raise InputError(f"an edit cannot have rank {rank}")

        def load(name: str) -> Floats:
            whole = self.load(name)
            if name != DELTA or whole.ndim < 2:
                return whole
            u, s, v = np.linalg.svd(whole.reshape(len(whole), -1), full_matrices=False)
            kept: Floats = ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(whole.shape)
            return kept

        return dataclasses.replace(self, load=load)


def make_edit(header: EditHeader, *, delta: Floats, before: Floats) -> Edit:
    """Return an edit held in memory. Raises InputError where its tensors do not fit it."""
    if delta.shape != before.shape:
        raise InputError(
            f"the change of {header.layer} has shape {list(delta.shape)}, "
            f"the layer {list(before.shape)}"
        )
    if not np.isfinite(delta).all():
        raise InputError(
            f"the change of {header.layer} holds values that are not finite",
            hint="a smaller --step, or compute the gradient again in fp32",
        )
    tensors = {DELTA: delta.astype(np.float32, copy=False), BEFORE: before}
    return Edit(header, tensors.__getitem__)


def write_edit(store: Store, edit: Edit) -> str:
    """Write an edit at factor 1 into the store under its name; return its path there."""
    path = edit_path(edit.header.name)
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

    Raises MissingError, InputError or StaleError.
    """
    named_as_file = name_or_path.endswith(SUFFIX) or "/" in name_or_path
    if not named_as_file and store.exists(edit_path(name_or_path)):
        return read_edit(store, edit_path(name_or_path))
    path = Path(name_or_path)
    if path.is_file():
        return read_edit(Store(str(path.parent)), path.name)
    if named_as_file:
        raise MissingError(f"there is no edit file {name_or_path}")
    known = store.names("edits", SUFFIX)
    raise MissingError(
        f"{store.url} has no edit {name_or_path}"
        + (f"; it has {', '.join(known)}" if known else ""),
        hint=f"run `slsgu search {quote(name_or_path)}`",
    )
