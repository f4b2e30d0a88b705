"""What applying edits would do to one checkpoint file, decided before anything is written.

Each edit is checked against the layer it meets: the same weights are recognised in
another precision, others refused. New values are the original plus the sum of the
changes, taken in fp64 and rounded once to the file's number format.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slsgu_cli.dtypes import FLOATS, PRECISION, Floats, Raw, narrow, widen
from slsgu_cli.edits import Edit
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.records import EditHeader
from slsgu_cli.tensor_file import CHUNK, Splice
from slsgu_cli.thirds import both_held, held, parameter_of, put
from slsgu_cli.weights import layer_digest, open_weights

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


@dataclass(frozen=True, slots=True)
class FilePlan:
    """What to write into a copy of a file, and what that changes."""

    source: Path
    splices: list[Splice]
    changes: tuple[LayerChange, ...]


def plan_file(path: Path, edits: Sequence[Edit], *, revert: bool, force: bool) -> FilePlan:
    """Check edits against a file and work out the values they lead to; write nothing.

    Edits of the same layer are summed, whatever their order. With `revert` the layer must
    be what the edits made of it and goes back to what it was. `force` leaves out the check
    that the weights are the ones the edits were made for.
    Raises InputError or StaleError.
    """
    file = open_weights(path)
    patches: dict[str, Raw] = {}
    changes: list[LayerChange] = []
    for layer, group in by_layer(edits).items():
        name = file.resolve_name(parameter_of(layer))
        whole = patches[name] if name in patches else file.stored(name)
        current, dtype = held(layer, whole), file.entry(name).dtype
        new, change = plan_layer(path, layer, current, dtype, group, revert=revert, force=force)
        patches[name] = put(layer, new, into=whole)
        changes.append(change)
    return FilePlan(path, file.splices(patches), tuple(changes))


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
    path: Path,
    layer: str,
    current: Raw,
    dtype: str,
    edits: Sequence[Edit],
    *,
    revert: bool,
    force: bool,
) -> tuple[Raw, LayerChange]:
    """Return the stored values that edits of one layer lead to, and what that changes.

    `current` are the values stored now, in the layer's shape, of the number format `dtype`;
    `path` is where they lie, for messages. Raises InputError or StaleError.
    """
    if dtype not in FLOATS:
        raise InputError(f"{layer} in {path} is {dtype}, not floating point")
    case = _Case(path, layer, current.shape, dtype, edits)
    new, share = case.reverted(current, force) if revert else case.moved(current, force)
    names = tuple(edit.header.name for edit in edits)
    return new, LayerChange(layer, dtype, current.shape, new.nbytes, share, names)


@dataclass(frozen=True, slots=True)
class _Case:
    """The edits of one layer against one file."""

    path: Path
    layer: str
    shape: tuple[int, ...]
    dtype: str
    edits: Sequence[Edit]

    def moved(self, current: Raw, force: bool) -> tuple[Raw, float]:
        """Return the stored values with the edits applied to the current ones, and the share."""
        deltas = self._deltas()
        if not force:
            self._require_original(current, deltas)
        new, share = moved_values(current, deltas, self.dtype)
        if not math.isfinite(share):
            raise InputError(
                f"{self.layer} would hold values that {self.dtype} cannot, in {self.path}",
                hint="a smaller --scale or --step",
            )
        return new, share

    def reverted(self, current: Raw, force: bool) -> tuple[Raw, float]:
        """Return the stored values that stood there before the edits, and the share."""
        before = self._before()
        edited, share = moved_values(before, self._deltas(), self.dtype)
        if not force and not _same(edited, current):
            what = "not edited" if _same(before, current) else "not what these edits made of it"
            raise StaleError(
                f"{self.layer} in {self.path} is {what}, so there is nothing to revert",
                hint="name all the edits of this layer, with the --scale or --step they had, "
                "or --force to put its original values there",
            )
        return before, share

    def _deltas(self) -> Deltas:
        pairs = [(edit.factor, edit.delta()) for edit in self.edits]
        for edit, (_, delta) in zip(self.edits, pairs, strict=True):
            if delta.shape != self.shape:
                raise StaleError(
                    f"the edit {edit.header.name} changes {self.layer} of shape "
                    f"{list(delta.shape)}, but in {self.path} it has {list(self.shape)}",
                    hint=_right_model(edit.header),
                )
            if not np.isfinite(delta).all():
                raise InputError(f"the edit {edit.header.name} holds values that are not finite")
        return pairs

    def _before(self) -> Raw:
        # Of edits made on copies in several precisions, the finest knows the original best.
        before = max((edit.before() for edit in self.edits), key=lambda values: values.itemsize)
        if before.shape != self.shape:
            raise InputError(f"the edit {self.edits[0].header.name} is damaged: its shapes differ")
        return narrow(before, self.dtype)

    def _require_original(self, current: Raw, deltas: Deltas) -> None:
        for edit in self.edits:
            if recognised(current, self.dtype, edit.header.digests):
                continue
            if _same(moved_values(self._before(), deltas, self.dtype)[0], current):
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
