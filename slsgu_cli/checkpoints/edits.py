"""Edits: one layer's change, scaled, stacked and undone, and what it makes of stored values."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slsgu_cli.checkpoints.layers import both_held
from slsgu_cli.checkpoints.tensor_file import (
    CHUNK,
    FLOATS,
    PRECISION,
    Floats,
    Raw,
    narrow,
    widen,
)
from slsgu_cli.checkpoints.weights import layer_digest
from slsgu_cli.errors import InputError, MissingError, StaleError, UsageError
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.options import ApplyOptions
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store

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

    Raises MissingError, InputError or StaleError.
    """
    named_as_file = name_or_path.endswith(SUFFIX) or "/" in name_or_path
    if not named_as_file and store.exists(Artifact.EDIT.path(name_or_path)):
        return read_edit(store, Artifact.EDIT.path(name_or_path))
    path = Path(name_or_path)
    if path.is_file():
        return read_edit(Store(str(path.parent)), path.name)
    if named_as_file:
        raise MissingError(f"there is no edit file {name_or_path}")
    known = Artifact.EDIT.names(store)
    raise MissingError(
        f"{store.url} has no edit {name_or_path}"
        + (f"; it has {', '.join(known)}" if known else ""),
        hint=f"run `{Artifact.EDIT.command(name_or_path)}`",
    )


def strength_of(edit: Edit, options: ApplyOptions) -> Edit:
    """Return an edit of the rank and at the scale of `options`. Raises InputError."""
    limited = edit if options.rank is None else edit.of_rank(options.rank)
    return limited if options.scale == 1 else limited.scaled(options.scale)


COARSE = ("fp16", "bf16")
Deltas = list[tuple[float, Floats]]


@dataclass(frozen=True, slots=True)
class LayerChange:
    """One layer of one file. `share` is how far the edits move it over its own norm."""

    layer: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    share: float
    edits: tuple[str, ...]


def by_layer(edits: Sequence[Edit]) -> dict[str, list[Edit]]:
    """Return edits by the layer they change, layers and edits in an order of their own.

    Raises UsageError where one changes a whole parameter and another a third of it.
    """

    def order(edit: Edit) -> tuple[str, str, float]:
        return edit.header.name, edit.header.gradient, edit.factor

    layers = sorted({edit.header.layer for edit in edits})
    if twice := both_held(layers):
        raise UsageError(
            f"{_names(edits)} change {twice} as a whole and a third of it as well",
            hint="rank and search all of them with the same --qkv",
        )
    return {
        layer: sorted((edit for edit in edits if edit.header.layer == layer), key=order)
        for layer in layers
    }


def plan_layer(
    path: Path, current: Raw, dtype: str, edits: Sequence[Edit], options: ApplyOptions
) -> tuple[Raw, LayerChange]:
    """Return the stored values that edits of one layer lead to, and what that changes.

    `current` are the values stored now, in the layer's shape, of the number format `dtype`;
    `path` is where they lie, for messages. Edits are summed, whatever their order. To be
    undone, they must be what made the layer what it is; it goes back to what it was.
    Raises InputError or StaleError.
    """
    layer = edits[0].header.layer
    if dtype not in FLOATS:
        raise InputError(f"{layer} in {path} is {dtype}, not floating point")
    stored = _StoredLayer(path, layer, current, dtype, edits)
    new, share = stored.reverted(options) if options.revert else stored.moved(options)
    names = tuple(edit.header.name for edit in edits)
    return new, LayerChange(layer, dtype, current.shape, new.nbytes, share, names)


@dataclass(frozen=True, slots=True)
class _StoredLayer:
    """A layer as one file holds it, and the edits of it."""

    path: Path
    layer: str
    current: Raw
    dtype: str
    edits: Sequence[Edit]

    def moved(self, options: ApplyOptions) -> tuple[Raw, float]:
        """Return the stored values with the edits applied to the current ones, and the share."""
        deltas = self._deltas()
        if not options.force:
            self._require_original(deltas)
        new, share = moved_values(self.current, deltas, self.dtype)
        if not math.isfinite(share):
            raise InputError(
                f"{self.layer} would hold values that {self.dtype} cannot, in {self.path}",
                hint="a smaller --scale or --step",
            )
        return new, share

    def reverted(self, options: ApplyOptions) -> tuple[Raw, float]:
        """Return the stored values that stood there before the edits, and the share."""
        before = self._before()
        edited, share = moved_values(before, self._deltas(), self.dtype)
        if not options.force and not _same(edited, self.current):
            unedited = _same(before, self.current)
            what = "not edited" if unedited else "not what these edits made of it"
            raise StaleError(
                f"{self.layer} in {self.path} is {what}, so there is nothing to revert",
                hint="name all the edits of this layer, with the --scale or --step they had, "
                "or --force to put its original values there",
            )
        return before, share

    def _deltas(self) -> Deltas:
        pairs = [(edit.factor, edit.delta()) for edit in self.edits]
        for edit, (_, delta) in zip(self.edits, pairs, strict=True):
            if delta.shape != self.current.shape:
                raise StaleError(
                    f"the edit {edit.header.name} changes {self.layer} of shape "
                    f"{list(delta.shape)}, but in {self.path} it has "
                    f"{list(self.current.shape)}",
                    hint=_right_model(edit.header),
                )
            if not np.isfinite(delta).all():
                raise InputError(f"the edit {edit.header.name} holds values that are not finite")
        return pairs

    def _before(self) -> Raw:
        # Of edits made on copies in several precisions, the finest knows the original best.
        before = max((edit.before() for edit in self.edits), key=lambda values: values.itemsize)
        if before.shape != self.current.shape:
            raise InputError(f"the edit {self.edits[0].header.name} is damaged: its shapes differ")
        return narrow(before, self.dtype)

    def _require_original(self, deltas: Deltas) -> None:
        for edit in self.edits:
            if recognised(self.current, self.dtype, edit.header.digests):
                continue
            if _same(moved_values(self._before(), deltas, self.dtype)[0], self.current):
                raise StaleError(
                    f"{self.path} already holds {_names(self.edits)}",
                    hint="--revert to undo",
                )
            raise StaleError(
                f"{self.layer} in {self.path} is not the layer that the edit "
                f"{edit.header.name} was made for ({edit.header.model})",
                hint=f"{_right_model(edit.header)}, or --force; "
                "name several edits of one layer in one call, on the original weights",
            )


def recognised(current: Raw, dtype: str, made_for: Mapping[str, str]) -> bool:
    """Return whether one of the two layers is the other, or a rounded copy of it."""
    values = widen(current, dtype)
    # What the file stores is rounded to its precision already.
    if layer_digest(values, "fp32") == made_for.get(PRECISION[dtype]):
        return True
    return any(
        made_for.get(coarse) == made_for.get("fp32") == layer_digest(values, coarse)
        for coarse in COARSE
    )


def moved_values(stored: Raw, deltas: Deltas, dtype: str) -> tuple[Raw, float]:
    """Return stored values plus the sum of factor * delta, as stored values, and the share.

    The share is the length of the move over the norm of what moved; it is not finite
    where a new value is not. A few MB are worked on at a time.
    """
    flat = stored.reshape(-1)
    parts = [(factor, delta.reshape(-1)) for factor, delta in deltas]
    new = np.empty_like(flat)
    length = norm = 0.0
    for start in range(0, flat.size, CHUNK):
        span = slice(start, start + CHUNK)
        was: npt.NDArray[np.float64] = widen(flat[span], dtype).astype(np.float64)
        total = was.copy()
        for factor, delta in parts:
            total += np.float64(factor) * delta[span]
        new[span] = narrow(total, dtype)
        step = widen(new[span], dtype) - was
        length += float(np.dot(step, step))
        norm += float(np.dot(was, was))
    return new.reshape(stored.shape), math.sqrt(length / norm) if norm else math.sqrt(length)


def _same(one: Raw, other: Raw) -> bool:
    unsigned = f"u{one.itemsize}"
    return bool(
        np.array_equal(
            np.ascontiguousarray(one).view(unsigned), np.ascontiguousarray(other).view(unsigned)
        )
    )


def _names(edits: Sequence[Edit]) -> str:
    names = [edit.header.name for edit in edits]
    return f"the edit {names[0]}" if len(names) == 1 else f"the edits {', '.join(names)}"


def _right_model(header: EditHeader) -> str:
    return f"use the weights it was made for, {header.model.flags()}"
