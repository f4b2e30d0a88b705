"""The registry of baselines: the declarations next to their code, imported on demand."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from slsgu_cli.records.comparison import ClipPlan, Method

if TYPE_CHECKING:
    from torch import Tensor

# The learning rates that tuning tries first, if a method declares no others.
DECADES = (1e-6, 1e-5, 1e-4)
# The parameters of a text tower's first block, and those that project states to features, by
# their names in open_clip.
FIRST_BLOCK = re.compile(r"(?:text\.)?transformer\.resblocks\.0\..*")
FIRST_ATTENTION = re.compile(r"(?:text\.)?transformer\.resblocks\.0\.attn\.out_proj\.weight")
TEXT_PROJECTION = re.compile(r"(?:text\.)?text_projection(?:\.weight)?")
VISION_PROJECTION = re.compile(r"visual\.(?:proj|head\.proj\.weight)")


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """The one hyperparameter of a baseline: its name, default, and grid for tuning."""

    name: str
    default: float
    grid: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnPipeline:
    """The declaration of a baseline on a diffusion pipeline.

    `edit` changes weights of PipelineData in place. With a `hyperparameter` it is a closed form,
    called with each value of the grid; without, it is called with a PipelinePlan for each
    learning rate. `updates` is the number of its updates, if not that of --iterations. It
    changes the UNet, or with `text` the text encoders.
    """

    edit: Callable[..., None]
    hyperparameter: Hyperparameter | None = None
    updates: int | None = None
    text: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The declaration of a baseline, with its label in tables.

    On CLIP it is `Trained` or a `ClosedForm`. `hyperparameter` is None for the learning rate.
    `gradients` are the roles whose stored gradients it needs, or whose squared gradients if
    `squares` is set. `on_pipeline` is None if it is not for diffusion pipelines.
    """

    label: str
    hyperparameter: Hyperparameter | None = None
    gradients: tuple[str, ...] = ()
    squares: bool = False
    on_pipeline: OnPipeline | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained(Baseline):
    """A baseline that changes all weights by epochs.

    An epoch trains on the rows of the roles `losses`, in their order, where the `mask` is true.
    If training is not by a loss, `epochs` changes the model of a BaselineRunner at a setting and
    yields the number of each epoch when it ends. It is skipped for a model without a parameter
    whose name `needs` matches. `decades` are the learning rates that tuning tries first.
    """

    losses: tuple[str, ...] = ()
    mask: "Callable[[Any], dict[str, Tensor]] | None" = None
    epochs: Callable[[Any, float], Iterator[int]] | None = None
    needs: re.Pattern[str] | None = None
    decades: tuple[float, ...] = DECADES

    def plan(self, plan: ClipPlan) -> ClipPlan:
        """Return the part of a plan that applies: no retain rows if it does not see any."""
        return plan if "retain" in self.losses else replace(plan, retain_rows=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedForm(Baseline):
    """A baseline that edits one layer in closed form.

    It edits the layer whose name `only` matches, or the one of --layer. `change`
    returns the change (outputs, inputs) of a layer at a setting, from LayerEdits. The step along
    it is `step`, or searched for, beginning with `first_step`. `forget_passes` counts gradient
    passes over the forget set.
    """

    change: "Callable[[Any, str, float], Tensor]"
    only: re.Pattern[str] | None = None
    step: float | None = None
    first_step: float | None = None
    forget_passes: int = 0


_LABELS = {Method.ORIGINAL: "Original", Method.OURS: "Ours"}
_BASELINES: dict[Method, Baseline] = {}


def register(method: Method, spec: Baseline) -> None:
    """Register the declaration of a baseline."""
    _BASELINES[method] = spec


def baseline(method: Method) -> Baseline | None:
    """Return the declaration of a baseline; None for the original and ours."""
    if method not in _LABELS and method not in _BASELINES:
        import_module(f"slsgu_cli.compare.baselines.{method.partition('-')[0]}")
    return _BASELINES.get(method)


def on_pipeline(method: Method) -> OnPipeline | None:
    """Return the declaration of a baseline on pipelines; None for the original and ours."""
    spec = baseline(method)
    return spec.on_pipeline if spec else None


def label_of(method: Method) -> str:
    """Return the label of a method in tables."""
    spec = baseline(method)
    return spec.label if spec else _LABELS[method]
