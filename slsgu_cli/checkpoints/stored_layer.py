"""A layer in a model's file: its values with edits, and whether edits are in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from shlex import quote

import numpy as np
import numpy.typing as npt

from slsgu_cli.checkpoints.edits import Edit, in_order, names_of, original_values
from slsgu_cli.checkpoints.layouts import WeightSet
from slsgu_cli.checkpoints.naming_schemes import Places
from slsgu_cli.checkpoints.number_formats import (
    CHUNK,
    FLOATS,
    PRECISION,
    Floats,
    Raw,
    layer_digest,
    narrow,
    widen,
)
from slsgu_cli.errors import InputError, StaleError
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.options import ApplyOptions

COARSE = ("fp16", "bf16")
Deltas = list[tuple[float, Floats]]


@dataclass(frozen=True, slots=True)
class LayerChange:
    """A changed layer of one file. `share` is the norm of the change over the layer's norm."""

    layer: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    share: float
    edits: tuple[str, ...]


class StoredLayer:
    """A layer in a set of weights, and its edits; `earlier` ones are already in place.

    `current` are the values stored now, in the layer's shape and the number format `dtype`;
    `path` is their file, for messages.
    """

    def __init__(
        self,
        weights: WeightSet,
        places: Places,
        edits: Sequence[Edit],
        earlier: Sequence[Edit] = (),
    ) -> None:
        """Read the layer that these edits change from its tensors."""
        self.path = weights.owners[places[0].key]
        self.layer = edits[0].header.layer
        self.current, self.dtype = weights.layer(places)
        self.edits, self.earlier = edits, earlier

    def planned(self, options: ApplyOptions) -> tuple[Raw, LayerChange]:
        """Return the new stored values, and the change.

        Edits are summed in any order; earlier ones stay. All of them are applied to the original at
        once, so a layer stored in 16 bits is not rounded twice. Edits can be undone only if the
        layer is exactly what they made of it. Raises InputError or StaleError.
        """
        if self.dtype not in FLOATS:
            raise InputError(f"{self.layer} in {self.path} is {self.dtype}, not floating point")
        if options.revert:
            new = self._after(self.earlier)
            share = moved_values(new, self._deltas(self.edits), self.dtype)[1]
        else:
            new, share = moved_values(self.current, self._deltas(self.edits), self.dtype)
            if self.earlier and same_values(self._after(self.earlier), self.current):
                new = self._after([*self.earlier, *self.edits])
        if not options.force:
            self._require_state(revert=options.revert)
        if not math.isfinite(share):
            raise InputError(
                f"{self.layer} would hold values that {self.dtype} cannot, in {self.path}",
                hint="a smaller --scale or --step",
            )
        names = tuple(edit.header.name for edit in self.edits)
        shape = self.current.shape
        return new, LayerChange(self.layer, self.dtype, shape, new.nbytes, share, names)

    def _require_state(self, *, revert: bool) -> None:
        """Raise StaleError unless the current values are those that the edits need."""
        if revert:
            if not same_values(self._after([*self.earlier, *self.edits]), self.current):
                unedited = same_values(self._after(self.earlier), self.current)
                what = "not edited" if unedited else "not what these edits made of it"
                raise StaleError(
                    f"{self.layer} in {self.path} is {what}, so there is nothing to revert",
                    hint="name all the edits of this layer, with the --scale or --step they had, "
                    "or --force to put its original values there",
                )
        elif self.earlier:
            if not same_values(self._after(self.earlier), self.current):
                self._refuse_applied()
                self._refuse_lacking(self.earlier, self.edits)
        else:
            self._require_original()

    def require_in_place(self, later: Sequence[Edit]) -> None:
        """Raise StaleError unless the edits, which `later` ones need, are in place."""
        if not same_values(self._after(self.edits), self.current):
            self._refuse_lacking(self.edits, later)

    def _after(self, edits: Sequence[Edit]) -> Raw:
        """Return the original values with these edits, as stored."""
        deltas = self._deltas(in_order(edits))
        return moved_values(self._before(), deltas, self.dtype)[0] if edits else self._before()

    def _refuse_applied(self) -> None:
        """Raise StaleError if the edits are in place already."""
        if same_values(self._after([*self.earlier, *self.edits]), self.current):
            raise StaleError(
                f"{self.path} already holds {names_of(self.edits)}", hint="--revert to undo"
            )

    def _refuse_lacking(self, earlier: Sequence[Edit], later: Sequence[Edit]) -> None:
        lacks = same_values(self._before(), self.current)
        what = "lacks" if lacks else f"holds in {self.layer} something other than"
        named = " ".join(quote(edit.header.name) for edit in (*earlier, *later))
        raise StaleError(
            f"{self.path} {what} {names_of(earlier)}, which {names_of(later)} build"
            f"{'s' if len(later) == 1 else ''} on",
            hint=f"`slsgu apply {named} ...` puts all of them into the original weights",
        )

    def _deltas(self, edits: Sequence[Edit]) -> Deltas:
        pairs = [(edit.factor, edit.delta()) for edit in edits]
        for edit, (_, delta) in zip(edits, pairs, strict=True):
            if delta.shape != self.current.shape:
                raise StaleError(
                    f"the edit {edit.header.name} changes {self.layer} of shape "
                    f"{list(delta.shape)}, but in {self.path} it has "
                    f"{list(self.current.shape)}",
                    hint=_right_model(edit.header),
                )
        return pairs

    def _before(self) -> Raw:
        return narrow(original_values([*self.earlier, *self.edits]), self.dtype)

    def _require_original(self) -> None:
        for edit in self.edits:
            if recognised(self.current, self.dtype, edit.header.digests):
                continue
            if not edit.is_lora:
                self._refuse_applied()
            raise StaleError(
                f"{self.layer} in {self.path} is not the layer that the edit "
                f"{edit.header.name} was made for ({edit.header.model})",
                hint=f"{_right_model(edit.header)}, or --force; "
                "name several edits of one layer in one call, on the original weights",
            )


def recognised(current: Raw, dtype: str, made_for: Mapping[str, str]) -> bool:
    """Return whether the two layers are equal, or one is a rounded copy of the other."""
    values = widen(current, dtype)
    # The stored values are already rounded to their precision.
    if layer_digest(values, "fp32") == made_for.get(PRECISION[dtype]):
        return True
    return any(
        made_for.get(coarse) == made_for.get("fp32") == layer_digest(values, coarse)
        for coarse in COARSE
    )


def moved_values(stored: Raw, deltas: Deltas, dtype: str) -> tuple[Raw, float]:
    """Return stored values plus the sum of factor * delta, as stored values, and the share.

    The share is the norm of the change over the norm of the stored values; it is not finite if a
    new value is not. A few MB are processed at a time.
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


def same_values(one: Raw, other: Raw) -> bool:
    """Return whether two arrays have the same bits."""
    unsigned = f"u{one.itemsize}"
    return bool(
        np.array_equal(
            np.ascontiguousarray(one).view(unsigned), np.ascontiguousarray(other).view(unsigned)
        )
    )


def _right_model(header: EditHeader) -> str:
    return f"use the weights it was made for, {header.model.flags()}"
