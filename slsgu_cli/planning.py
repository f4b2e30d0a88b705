"""What applying edits would do to one checkpoint file, decided before anything is written.

Each edit is checked against the layer it meets: the same weights are recognised in
another precision, others refused. New values are the original plus the sum of the
changes, taken in fp64 and rounded once to the file's number format.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slsgu_cli.dtypes import FLOATS, PRECISION, STORAGE, Floats, Raw, narrow, widen
from slsgu_cli.edits import Edit
from slsgu_cli.errors import InputError, StaleError
from slsgu_cli.records import EditHeader
from slsgu_cli.tensor_file import CHUNK, Splice, TensorEntry
from slsgu_cli.weights import layer_digests, open_weights

COARSE = ("fp16", "bf16")
Deltas = list[tuple[float, Floats]]


@dataclass(frozen=True, slots=True)
class LayerChange:
    """One layer of one file: how far it moves, as a share of its own norm."""

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
    for layer in sorted({edit.header.layer for edit in edits}):
        name = file.resolve_name(layer)
        group = sorted(
            (edit for edit in edits if edit.header.layer == layer),
            key=lambda edit: (edit.header.name, edit.header.gradient, edit.factor),
        )
        entry = file.entry(name)
        if entry.dtype not in FLOATS:
            raise InputError(f"{name} in {path} is {entry.dtype}, not floating point")
        case = _Case(path, layer, entry, group)
        current = file.stored(name)
        new = case.reverted(current, force) if revert else case.moved(current, force)
        patches[name] = new
        changes.append(
            LayerChange(
                layer=layer,
                dtype=entry.dtype,
                shape=entry.shape,
                nbytes=new.nbytes,
                share=_share(current, new, entry.dtype),
                edits=tuple(edit.header.name for edit in group),
            )
        )
    return FilePlan(path, file.splices(patches), tuple(changes))


@dataclass(frozen=True, slots=True)
class _Case:
    """The edits of one layer against one file."""

    path: Path
    layer: str
    entry: TensorEntry
    edits: list[Edit]

    def moved(self, current: Raw, force: bool) -> Raw:
        """Return the stored values with the edits applied to the current ones."""
        deltas = self._deltas()
        if not force:
            self._require_original(current, deltas)
        new = _sum(widen(current, self.entry.dtype), deltas, self.entry.dtype)
        if not _finite(new, self.entry.dtype):
            raise InputError(
                f"{self.layer} would hold values that {self.entry.dtype} cannot, in {self.path}",
                hint="a smaller --scale or --step",
            )
        return new

    def reverted(self, current: Raw, force: bool) -> Raw:
        """Return the stored values that stood there before the edits."""
        deltas = self._deltas()
        before = self._before()
        if not force and not _same(
            _sum(widen(before, self.entry.dtype), deltas, self.entry.dtype), current
        ):
            what = "not edited" if _same(before, current) else "not what these edits made of it"
            raise StaleError(
                f"{self.layer} in {self.path} is {what}, so there is nothing to revert",
                hint="name all the edits of this layer, with the --scale or --step they had, "
                "or --force to put its original values there",
            )
        return before

    def _deltas(self) -> Deltas:
        pairs = [(edit.factor, edit.delta()) for edit in self.edits]
        for edit, (_, delta) in zip(self.edits, pairs, strict=True):
            if delta.shape != self.entry.shape:
                raise StaleError(
                    f"the edit {edit.header.name} changes {self.layer} of shape "
                    f"{list(delta.shape)}, but in {self.path} it has {list(self.entry.shape)}",
                    hint=_right_model(edit.header),
                )
            if not np.isfinite(delta).all():
                raise InputError(f"the edit {edit.header.name} holds values that are not finite")
        return pairs

    def _before(self) -> Raw:
        before = self.edits[0].before()
        if before.shape != self.entry.shape:
            raise InputError(f"the edit {self.edits[0].header.name} is damaged: its shapes differ")
        return narrow(before, self.entry.dtype)

    def _require_original(self, current: Raw, deltas: Deltas) -> None:
        digests = layer_digests(widen(current, self.entry.dtype))
        for edit in self.edits:
            if _recognised(digests, edit.header.digests, PRECISION[self.entry.dtype]):
                continue
            edited = _sum(widen(self._before(), self.entry.dtype), deltas, self.entry.dtype)
            if _same(edited, current):
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


def _recognised(found: dict[str, str], made_for: dict[str, str], precision: str) -> bool:
    """Return whether one of the two layers is the other, or a rounded copy of it."""
    if found[precision] == made_for.get(precision):
        return True
    return any(found[coarse] == made_for.get(coarse) == made_for.get("fp32") for coarse in COARSE)


def _sum(base: Floats, deltas: Deltas, dtype: str) -> Raw:
    """Return base + sum of factor * delta, as stored values; a few MB at a time."""
    flat = base.reshape(-1)
    parts = [(factor, delta.reshape(-1)) for factor, delta in deltas]
    new = np.empty(flat.size, STORAGE[dtype])
    for start in range(0, flat.size, CHUNK):
        span = slice(start, start + CHUNK)
        total: npt.NDArray[np.float64] = flat[span].astype(np.float64)
        for factor, delta in parts:
            total += factor * delta[span].astype(np.float64)
        new[span] = narrow(total, dtype)
    return new.reshape(base.shape)


def _share(old: Raw, new: Raw, dtype: str) -> float:
    """Return ||new - old|| / ||old||."""
    moved = norm = 0.0
    before, after = old.reshape(-1), new.reshape(-1)
    for start in range(0, before.size, CHUNK):
        span = slice(start, start + CHUNK)
        was = widen(before[span], dtype).astype(np.float64)
        moved += float(np.square(widen(after[span], dtype) - was).sum())
        norm += float(np.square(was).sum())
    return float(np.sqrt(moved / norm)) if norm else float("inf") if moved else 0.0


def _finite(stored: Raw, dtype: str) -> bool:
    flat = stored.reshape(-1)
    return all(
        bool(np.isfinite(widen(flat[start : start + CHUNK], dtype)).all())
        for start in range(0, flat.size, CHUNK)
    )


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
