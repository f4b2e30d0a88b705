"""The registry of baselines: the declarations next to their code, imported on demand."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from slsgu_cli.records.comparison import ClipPlan, Method, PipelinePlan

if TYPE_CHECKING:
    from torch import Tensor

# The first argument is a BaselineRunner, LayerEdits and UnetTraining, whose modules import
# this one.
Epochs = Callable[[Any, float], Iterator[int]]
Change = Callable[[Any, str, float], "Tensor"]
TrainUnet = Callable[[Any, PipelinePlan], None]

# The parameters that project states to features, by their names in open_clip.
TEXT_PROJECTION = re.compile(r"(?:text\.)?text_projection(?:\.weight)?")
VISION_PROJECTION = re.compile(r"visual\.(?:proj|head\.proj\.weight)")


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """The one hyperparameter of a baseline: its name, default, and grid for tuning."""

    name: str
    default: float
    grid: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The declaration of a baseline on CLIP, with its label in tables.

    `hyperparameter` is None for the learning rate. `gradients` are the roles whose stored
    gradients it needs, or whose squared gradients if `squares` is set.
    """

    label: str
    hyperparameter: Hyperparameter | None = None
    gradients: tuple[str, ...] = ()
    squares: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained(Baseline):
    """A baseline that changes all weights by epochs.

    An epoch trains on the rows of the roles `losses`, in their order. `epochs` trains the
    runner's model at a setting and yields the number of each epoch when it ends.
    """

    epochs: Epochs
    losses: tuple[str, ...] = ()

    def plan(self, plan: ClipPlan) -> ClipPlan:
        """Return the part of a plan that applies: no retain rows if it does not see any."""
        return plan if "retain" in self.losses else replace(plan, retain_rows=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedForm(Baseline):
    """A baseline that edits one layer in closed form.

    It edits the layer whose name `projection` matches, or the one of --layer. `change`
    returns the change (outputs, inputs) of a layer at a setting. The step along it is `step`,
    or searched for, beginning with `first_step`. `forget_passes` counts gradient passes over
    the forget set.
    """

    change: Change
    projection: re.Pattern[str] | None = None
    step: float | None = None
    first_step: float | None = None
    forget_passes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OnUnet:
    """A baseline that trains the UNet of a diffusion pipeline in place."""

    label: str
    train: TrainUnet


_LABELS = {Method.ORIGINAL: "Original", Method.OURS: "Ours"}
_CLIP: dict[Method, Trained | ClosedForm] = {}
_UNET: dict[Method, OnUnet] = {}


def register(method: Method, spec: Trained | ClosedForm | OnUnet) -> None:
    """Register the declaration of a baseline."""
    if isinstance(spec, OnUnet):
        _UNET[method] = spec
    else:
        _CLIP[method] = spec


def baseline(method: Method) -> Trained | ClosedForm | None:
    """Return the baseline on CLIP; None for the original, ours, and those on pipelines only."""
    _load(method)
    return _CLIP.get(method)


def unet_training(method: Method) -> TrainUnet | None:
    """Return the training of a UNet by a method; None for the original and ours."""
    _load(method)
    return _UNET[method].train if method in _UNET else None


def label_of(method: Method) -> str:
    """Return the label of a method in tables."""
    if method in _LABELS:
        return _LABELS[method]
    return (baseline(method) or _UNET[method]).label


def _load(method: Method) -> None:
    if method not in _LABELS:
        import_module(f"slsgu_cli.compare.baselines.{method.partition('-')[0]}")
