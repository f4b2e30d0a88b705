"""A step of a layer, and the edit that it amounts to."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import slsgu_cli
from slsgu_cli.checkpoints.edits import Edit, make_edit
from slsgu_cli.checkpoints.number_formats import Floats, layer_digests
from slsgu_cli.clip.models import resolve
from slsgu_cli.records.directions import DirectionSpec
from slsgu_cli.records.method import EditHeader, GradientPointer, Tower, Trial
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.targets import TargetTrial

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerStep:
    """A step of a layer: the change `delta` of its values `before`.

    `share` is the length of the step over the norm of these.
    """

    layer: str
    tower: Tower
    step: float
    share: float
    direction: DirectionSpec
    delta: Floats
    before: Floats

    @classmethod
    def of(
        cls,
        trial: Trial | TargetTrial,
        *,
        direction: DirectionSpec,
        along: "Tensor",
        weight: "Tensor",
    ) -> Self:
        """Return the step that a trial tried, `along` a tensor from `weight`."""
        return cls(
            layer=trial.layer,
            tower=trial.tower,
            step=trial.step,
            share=trial.share,
            direction=direction,
            delta=(trial.step * along).cpu().numpy(),
            before=_compact(weight.cpu().numpy()),
        )


def unmeasured_edit(manifest: SetManifest, pointer: GradientPointer, layer_step: LayerStep) -> Edit:
    """Return the edit that takes a step of a layer of a set's model, with no figures of it."""
    header = EditHeader(
        name=manifest.name,
        concept=manifest.concept,
        layer=layer_step.layer,
        tower=layer_step.tower,
        step=layer_step.step,
        share=layer_step.share,
        model=pointer.model,
        model_fingerprint=pointer.model_fingerprint,
        digests=layer_digests(layer_step.before),
        gradient=pointer.forget,
        direction=layer_step.direction,
        retain_data=pointer.retain_data if layer_step.direction.needs_inputs else None,
        criterion=None,
        margin=None,
        forgotten=None,
        baseline_forget=None,
        baseline_utility=None,
        forget=None,
        utility=None,
        joint=None,
        version=slsgu_cli.__version__,
        layout=resolve(pointer.model).scheme,
    )
    return make_edit(header, delta=layer_step.delta, before=layer_step.before)


def _compact(values: Floats) -> Floats:
    """Return values of a half-precision checkpoint in half precision, if that is exact."""
    half = values.astype("float16")
    return half if (half == values).all() else values
