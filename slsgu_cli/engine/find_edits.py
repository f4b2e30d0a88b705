"""The edits that a checkpoint contains: `check --edit`."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from pathlib import Path

import numpy as np

from slsgu_cli.checkpoints.edit_plan import Copies, by_encoder, copies_of, require_distinct
from slsgu_cli.checkpoints.edits import (
    Edit,
    by_layer,
    earlier_edits,
    load_edit,
    original_values,
    strength_of,
)
from slsgu_cli.checkpoints.layouts import WeightSet
from slsgu_cli.checkpoints.naming_schemes import TensorPlace
from slsgu_cli.checkpoints.number_formats import FLOATS, Raw, narrow, widen
from slsgu_cli.checkpoints.stored_layer import moved_values, recognised, same_values
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.errors import InputError
from slsgu_cli.method.scores import norm
from slsgu_cli.records.options import (
    StrengthOptions,
)
from slsgu_cli.store.store import Store

# Weights changed along an edit only if the cosine of their change with it exceeds this.
ALONG = 0.999


class Presence(StrEnum):
    """Whether an edit is in a checkpoint."""

    IN = "in it"
    ABSENT = "absent"
    OTHER = "other weights"


@dataclass(frozen=True, slots=True)
class FoundEdit:
    """An edit in one file. `share` is the strength at which other weights contain it."""

    name: str
    layer: str
    file: str
    dtype: str
    presence: Presence
    share: float | None = None


def find_edits(
    store: Store, names: Sequence[str], model: Path, options: StrengthOptions
) -> list[FoundEdit]:
    """Return whether a model contains edits, for every copy of its encoder.

    Includes the edits that these were searched on top of. Encoders that have neither the
    edited nor the original layer are left out, unless all do. Raises MissingError, InputError
    or StaleError.
    """
    edits = [strength_of(load_edit(store, name), options) for name in names]
    require_distinct(edits)
    edits += earlier_edits(store, edits)
    encoders = read_target(model).chosen(options.encoder)
    rows: list[FoundEdit] = []
    for layer, edits_of in by_layer(edits).items():
        copies = [copies_of(encoder, layer) for encoder in encoders]
        if not any(copies):
            raise InputError(f"{model} has no layer {layer}")
        for group in by_encoder(edits_of, copies):
            rows += _presences(copies, group)
    return rows


def _presences(encoders: Sequence[Copies], group: Sequence[Edit]) -> list[FoundEdit]:
    """Return the presence of a layer's edits in each encoder, without encoders of other weights."""
    shape = original_values(group).shape
    fitting = [copies for copies in encoders if any(w.shape(p) == shape for w, p in copies)]
    of_encoders = [
        [row for weights, places in copies for row in _presences_in(weights, places, group)]
        for copies in fitting or encoders
    ]
    known = [rows for rows in of_encoders if any(r.presence is not Presence.OTHER for r in rows)]
    return [row for rows in known or of_encoders for row in rows]


def _presences_in(
    weights: WeightSet, places: Sequence[TensorPlace], group: Sequence[Edit]
) -> list[FoundEdit]:
    """Return the presence of each edit of a layer in a set of weights."""
    current, dtype = weights.layer(places)
    path = str(weights.owners[places[0].key])
    applied, share = None, None
    if dtype in FLOATS and current.shape == original_values(group).shape:
        applied = _in_place(current, dtype, group)
        share = _share(current, dtype, group) if applied is None else None
    rows = []
    for edit in group:
        presence = Presence.IN if edit in (applied or ()) else Presence.ABSENT
        presence = Presence.OTHER if applied is None else presence
        header = edit.header
        rows.append(FoundEdit(header.name, header.layer, path, dtype, presence, share))
    return rows


def _in_place(current: Raw, dtype: str, group: Sequence[Edit]) -> Sequence[Edit] | None:
    """Return the edits that lead to the current values of a layer; None for other weights.

    The edits may have been applied in another precision than that of the file.
    """
    before = original_values(group)
    if all(recognised(current, dtype, edit.header.digests) for edit in group):
        return ()
    for count in range(len(group), -1, -1):
        for some in combinations(group, count):
            deltas = [(edit.factor, edit.delta()) for edit in some]
            for made_in in dict.fromkeys((dtype, "F32", "F16", "BF16")):
                start = narrow(before, made_in)
                new = moved_values(start, deltas, made_in)[0] if deltas else start
                if same_values(narrow(widen(new, made_in), dtype), current):
                    return some
    return None


def _share(current: Raw, dtype: str, group: Sequence[Edit]) -> float | None:
    """Return the strength of the edit in a layer; None unless the layer changed along it only."""
    if len(group) > 1:
        return None
    change = (widen(current, dtype) - original_values(group)).reshape(-1).astype(np.float64)
    delta = group[0].factor * group[0].delta().reshape(-1).astype(np.float64)
    along, length = float(change @ delta), norm(change) * norm(delta)
    return along / norm(delta) ** 2 if length and along / length > ALONG else None
