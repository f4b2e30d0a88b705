"""The edit made of a step of a layer."""

from dataclasses import replace
from typing import Any

import slsgu_cli
from slsgu_cli.checkpoints.edits import Edit, make_edit
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.number_formats import Floats, layer_digests
from slsgu_cli.clip.models import resolve
from slsgu_cli.records.directions import DirectionSpec
from slsgu_cli.records.method import EditHeader, GradientPointer
from slsgu_cli.records.sets import SetManifest


def step_edit(
    manifest: SetManifest,
    pointer: GradientPointer,
    layer: str,
    *,
    step: float,
    share: float,
    direction: DirectionSpec,
    along: Floats,
    before: Floats,
    **measured: Any,
) -> Edit:
    """Return the edit that moves a layer of a set's model from its values `before`.

    `share` is the length of the step over the norm of these values. `measured` are further
    fields of the header: what a search measured.
    """
    half = before.astype("float16")
    before = half if (half == before).all() else before
    header = EditHeader(
        name=manifest.name,
        concept=manifest.concept,
        layer=layer,
        tower=Layer.parse(layer).recorded_tower,
        step=step,
        share=share,
        model=pointer.model,
        model_fingerprint=pointer.model_fingerprint,
        digests=layer_digests(before),
        gradient=pointer.forget,
        direction=direction,
        retain_data=pointer.retain_data if direction.needs else None,
        version=slsgu_cli.__version__,
        layout=resolve(pointer.model).scheme,
    )
    return make_edit(replace(header, **measured), delta=step * along, before=before)
