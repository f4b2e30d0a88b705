"""Edits made without a search."""

import numpy as np

from slsgu_cli.checkpoints.edits import Edit, make_edit
from slsgu_cli.checkpoints.number_formats import layer_digests
from slsgu_cli.records.directions import FALLBACK
from slsgu_cli.records.method import EditHeader, Tower
from slsgu_cli.records.sets import ModelSpec

MODEL = ModelSpec("local-dir:clip")


def header(
    layer: str, before: np.ndarray, *, name: str = "facebook", step: float = 2.0
) -> EditHeader:
    return EditHeader(
        name=name,
        concept=name,
        layer=layer,
        tower=Tower.VISION,
        step=step,
        share=0.1,
        model=MODEL,
        model_fingerprint="0" * 24,
        digests=layer_digests(before),
        gradient=f"gradient-of-{name}",
        direction=FALLBACK,
        retain_data=None,
        version="0",
    )


def edit(
    layer: str, delta: np.ndarray, before: np.ndarray, *, name: str = "facebook", step: float = 2.0
) -> Edit:
    return make_edit(header(layer, before, name=name, step=step), delta=delta, before=before)
