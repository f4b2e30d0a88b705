"""Edits of one layer in closed form: ROME, MEMIT, UCE and AlphaEdit, LEACE and CCUP.

A layer is a linear map y = W x. A *key* is what it is applied to where a text becomes its
features (the end of the text), or an image does. C = E[x x^T] is the second moment of the
layer's inputs over retained rows, F that over all tokens of the forget captions, and
P = C + damping tr(C)/d I. G is the forget gradient of W; summed over tokens, G = R K^T with
the inputs K and the gradients R at the outputs.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.checkpoints.layers import Layer, block_count
from slsgu_cli.clip.batches import (
    IMAGES_PER_FORWARD,
    TEXTS_PER_FORWARD,
    by_length,
    pixel_normalizer,
    spans,
    text_features,
    to_tokens,
)
from slsgu_cli.clip.evaluation import Evaluation
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.memory import spare
from slsgu_cli.clip.towers import OpenClipText, text_tower, vision_tower
from slsgu_cli.compare.methods import BaselineRunner, evaluations, settle
from slsgu_cli.engine.applied_layers import AppliedLayers, Use
from slsgu_cli.engine.covariance import chosen_rows, exact_device, input_covariances
from slsgu_cli.engine.directions import layer_gradient
from slsgu_cli.engine.effect import report
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.gradient_pass import arithmetic
from slsgu_cli.engine.layer_search import LayerSearch
from slsgu_cli.engine.set_edits import named_layer
from slsgu_cli.engine.stored_covariances import ensure_covariances
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.method.directions.whitened import RetainMetric
from slsgu_cli.method.scores import norm
from slsgu_cli.records.directions import DAMPING
from slsgu_cli.records.method import (
    GradientHeader,
    GradientPointer,
    LayerScore,
    Precision,
    Qkv,
    Tower,
)
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.sets import InputSpec
from slsgu_cli.records.studies import ClipOutcome, Method
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

T = TypeVar("T")


def rome(value: Tensor, key: Tensor, metric: RetainMetric) -> Tensor:
    """Return the change (outputs, inputs) that moves one key's output by `value`: ROME.

    value (P^-1 k)^T / (k^T P^-1 k): of all changes that do so, the one of least mean square
    over retained inputs (arXiv 2202.05262, Eq. 2).
    """
    along = metric.steepest(key[None])[0]
    return torch.outer(value.double(), along) / (key.double() @ along)


def memit(gradient: Tensor, forget: Tensor, metric: RetainMetric, weight: float) -> Tensor:
    """Return R K^T (weight P + F)^-1: MEMIT (arXiv 2210.07229, Eq. 14), with R K^T = G."""
    return RetainMetric(weight * metric.damped() + forget, 1, 0.0).steepest(gradient)


def alphaedit(gradient: Tensor, forget: Tensor, covariance: Tensor, share: float) -> Tensor:
    """Return R K^T Q (F Q + l I)^-1: AlphaEdit (arXiv 2410.02355), with R K^T = G.

    Q projects on the eigenvectors of C whose eigenvalues are below `share` of their mean, at
    least on that of the least one. l is the mean eigenvalue of F.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    quiet = vectors[:, : max(1, int((values < share * values.mean()).sum()))]
    projector = quiet @ quiet.T
    damped = forget.double() @ projector
    damped.diagonal().add_(forget.double().diagonal().mean())
    solved: Tensor = torch.linalg.solve(damped, gradient.double() @ projector, left=False)
    return solved


def uce(
    weight: Tensor, keys: Tensor, guide: Tensor, metric: RetainMetric, preserve: float
) -> Tensor:
    """Return the change by which keys (rows, inputs) give what `guide` gives: UCE.

    E[(W g - W k) k^T] (E[k k^T] + preserve P)^-1, expectations over the keys
    (arXiv 2308.14761).
    """
    k, w = keys.double(), weight.double()
    second = k.T @ k / len(k)
    wanted = torch.outer(w @ guide.double(), k.mean(dim=0)) - w @ second
    return memit(wanted, second, metric, preserve)


def leace(weight: Tensor, apart: Tensor, metric: RetainMetric) -> Tensor:
    """Return the change that makes outputs tell nothing linear of a label: LEACE.

    -W m (P^-1 m)^T / (m^T P^-1 m), where m = `apart` is the mean input of one label less that
    of the other. Of all linear A with A m = 0, x -> A x moves retained inputs least
    (arXiv 2306.03819, of rank one and without its shift of the mean).
    """
    return -rome(weight.double() @ apart.double(), apart, metric)


def ccup(weight: Tensor, feature: Tensor, share: float) -> Tensor:
    """Return -share u u^T W, with u the direction of a text feature: CCUP (arXiv 2512.14137)."""
    u = F.normalize(feature.double(), dim=0)
    return -share * torch.outer(u, u @ weight.double())


class Uses(AppliedLayers):
    """While active, remembers what one layer was last applied to, and what came out."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__(model, [layer])
        self.inputs, self.outputs = torch.empty(0), torch.empty(0)

    def applied(self, use: Use, inputs: Iterable[Tensor], outputs: Tensor) -> None:
        """Remember a call."""
        (self.inputs,), self.outputs = inputs, outputs


@dataclass(frozen=True, slots=True)
class KeyReader:
    """A model with a layer that is listened to while it runs over rows of a block.

    Of a large block, as many rows are run as covariances are taken of. Gradients are off.
    """

    model: nn.Module
    layer: str
    block: DataBlock
    spec: InputSpec
    device: str

    def keys(self) -> Tensor:
        """Return the layer's keys (rows, inputs) over the block, those of texts in no order.

        In the vision tower, the layer is the projection of image features.
        """
        if Layer.parse(self.layer).tower is Tower.TEXT:
            return torch.cat([_at(uses.inputs, ends) for uses, _, ends, _ in self._texts()])
        return torch.cat([uses.inputs for uses, _ in self._images()])

    def value_gradient(self) -> Tensor:
        """Return the mean gradient of 1 - cos(v, t) at a text layer's outputs for its keys."""
        images = torch.cat([features for _, features in self._images()])
        total = torch.zeros((), dtype=torch.float64, device=exact_device(self.device))
        with torch.enable_grad():
            for uses, texts, ends, rows in self._texts():
                losses = 1 - (images[rows.to(images.device)] * texts).sum(dim=-1)
                (gradient,) = torch.autograd.grad(losses.sum(), [uses.outputs])
                total = total + _at(gradient, ends).to(total.device).double().sum(dim=0)
        return total / len(images)

    def covariance(self) -> Tensor:
        """Return the second moment of all that the layer is applied to, fp64 (inputs, inputs)."""
        spec, device = self.spec, self.device
        covariances = input_covariances(
            self.model, [self.layer], self.block, spec=spec, device=device
        )
        return covariances[self.layer].mean()

    def _texts(self) -> Iterator[tuple[Uses, Tensor, Tensor, Tensor]]:
        """Yield what was used, features, where the texts end, and which of the rows these are."""
        tower, uses = text_tower(self.model), Uses(self.model, self.layer)
        if not isinstance(tower, OpenClipText):
            raise InputError("the text tower of this model does not show where its texts end")
        tokens = to_tokens(self.block.tokens[chosen_rows(self.block.rows)], "cpu")
        for rows in by_length(tower, tokens, TEXTS_PER_FORWARD[torch.device(self.device).type]):
            short = tower.trim(tokens[rows]).to(self.device)
            with uses:
                features = tower.features(short, short)
            yield uses, features, tower.pooled_at(short), rows

    def _images(self) -> Iterator[tuple[Uses, Tensor]]:
        tower, uses = vision_tower(self.model), Uses(self.model, self.layer)
        normalize, rows = pixel_normalizer(self.spec, self.device), chosen_rows(self.block.rows)
        with progress.bar("images of keys", len(rows)) as ticker:
            size = IMAGES_PER_FORWARD[torch.device(self.device).type]
            for start, stop in spans(len(rows), size):
                pixels = normalize(self.block.take(rows[start:stop]))
                with uses:
                    features = tower.features(pixels, pixels)
                yield uses, features
                ticker.advance(stop - start)


def _at(states: Tensor, ends: Tensor) -> Tensor:
    """Return the states at the ends of texts, of (rows, length, width) or of those alone."""
    return states if states.ndim == 2 else states[torch.arange(len(states)), ends]


def linear_map(layer: str, values: Tensor) -> Tensor:
    """Return a layer's values as (outputs, inputs), or such a change as the layer's own.

    A parameter that is no module's weight is applied as x @ W.
    """
    return values if layer.endswith(".weight") else values.T


# What gives the output of an MLP, and what makes features of states.
MLP_OUTPUT = re.compile(r"\.mlp\.(?:c_proj|fc2)\.weight$")
TEXT_PROJECTION = re.compile(r"(?:text\.)?text_projection(?:\.weight)?")
VISION_PROJECTION = re.compile(r"visual\.(?:proj|head\.proj\.weight)")
PROJECTIONS = {
    **dict.fromkeys((Method.LEACE_TEXT, Method.CCUP_TEXT), TEXT_PROJECTION),
    **dict.fromkeys((Method.LEACE_VISION, Method.CCUP_VISION), VISION_PROJECTION),
}
GRADED = (Method.ROME, Method.MEMIT, Method.ALPHAEDIT)


def layer_for(
    method: Method, store: Store, pointer: GradientPointer, wanted: str | None
) -> str | None:
    """Return the layer that a method edits of the model of some gradients, None without any.

    ROME, MEMIT, UCE and AlphaEdit edit the one `wanted`, by default the output projection of
    the MLP in the middle block of the text tower. Raises UsageError for one that they cannot
    edit.
    """
    header = store.read_header(Artifact.GRADIENT.path(pointer.forget), GradientHeader)
    names = sorted(header.weights)
    if method in PROJECTIONS:
        return next(filter(PROJECTIONS[method].fullmatch, names), None)
    if wanted is None:
        texts = [layer for layer in map(Layer.parse, names) if layer.tower is Tower.TEXT]
        middle = block_count(layer.name for layer in texts) // 2
        of_middle = (layer.name for layer in texts if layer.block == middle)
        return next(filter(MLP_OUTPUT.search, of_middle), None)
    layer = named_layer(store, pointer, wanted)
    is_matrix = layer.part is None and len(header.weights[layer.name].shape) == 2
    if layer.tower is not Tower.TEXT or not is_matrix or not layer.is_of(Qkv.SPLIT):
        raise UsageError(
            f"--layer {wanted} is no linear map of texts that is applied as a whole",
            hint="--layer with an mlp.c_proj, mlp.c_fc, attn.out_proj or text_projection",
        )
    return layer.name


@dataclass
class ClosedForms:
    """The closed forms run on a set's original model.

    What several of them need of its rows is computed once, and each is charged for it.
    """

    baselines: BaselineRunner
    layers: Mapping[Method, str]
    _parts: dict[tuple[str, ...], tuple[Any, float]] = field(init=False, default_factory=dict)
    _charged: float = field(init=False, default=0.0)

    def run(self, method: Method, setting: float) -> ClipOutcome:
        """Edit the original model by a method and measure what that leaves.

        The seconds are those of the edit and of the search for its step; not of loading, nor
        of running the original model over the evaluation sets.
        """
        runner, layer = self.baselines, self.layers[method]
        runner.restore()
        label = f"{method} {setting:g}"
        with torch.no_grad(), arithmetic(Precision.FP32), counted_by(label):
            choosing, reporting = self._evaluations
            evaluator, step, seconds = self._move(method, setting, choosing)
            chosen_by = report(choosing, [(evaluator, step)]).after
            reported = (replace(evaluator, evaluation=reporting), step)
            figures = chosen_by if reporting is choosing else report(reporting, [reported]).after
        if method in (Method.MEMIT, Method.ALPHAEDIT):
            pointer, model = runner.pointer, runner.model
            seconds += runner.times.seconds(pointer, ["forget"], squares=False, model=model)
        progress.detail(f"{label}: FA@1 {figures.forget.top1:.1f} on {layer}")
        return ClipOutcome(
            method=method,
            setting=setting,
            forget=figures.forget,
            utility=figures.utility,
            seconds=seconds,
            forget_passes=float(method in GRADED),
            retain_passes=0.0,
            where=runner.times.where,
            layer=layer,
            step=step,
            chosen_by=chosen_by,
        )

    def _move(
        self, method: Method, setting: float, evaluation: Evaluation
    ) -> tuple[Evaluator, float, float]:
        """Return a method's move, the step along it, and how long both took."""
        start, self._charged = perf_counter(), 0.0
        layer, device = self.layers[method], self.baselines.times.device
        change = linear_map(layer, self.change(method, setting, layer))
        weight = evaluation.model.get_parameter(layer).detach().cpu().numpy()
        tower = Layer.parse(layer).recorded_tower
        score = LayerScore.unranked(layer, tower, weight.shape, norm(weight))
        evaluator = Evaluator(evaluation, score, change.float().to(device))
        step = 1.0 if method in PROJECTIONS else _chosen_step(evaluator, method)
        settle(self.baselines.model)
        return evaluator, step, perf_counter() - start + self._charged

    @torch.no_grad()
    def change(self, method: Method, setting: float, layer: str) -> Tensor:
        """Return the change (outputs, inputs) that a method makes of a layer at a setting."""
        weight = linear_map(layer, self.baselines.model.get_parameter(layer).data).to(self._exact)
        if method in (Method.CCUP_TEXT, Method.CCUP_VISION):
            return ccup(weight, self._feature(), setting)
        damped = method in (Method.ROME, Method.LEACE_TEXT, Method.LEACE_VISION)
        metric = self._metric(layer, setting if damped else DAMPING)
        reader = self._reader(layer, "forget")
        if method in (Method.MEMIT, Method.ALPHAEDIT):
            forget = self._once(("forget covariance", layer), reader.covariance)
            if method is Method.MEMIT:
                return memit(self._gradient(layer), forget, metric, setting)
            return alphaedit(self._gradient(layer), forget, metric.covariance, setting)
        keys = self._keys(layer, "forget")
        if method is Method.ROME:
            value = self._once(("value", layer), reader.value_gradient)
            return rome(value, keys.mean(dim=0), metric)
        guide = self._keys(layer, "retain").mean(dim=0)
        if method is Method.UCE:
            return uce(weight, keys, guide, metric, setting)
        return leace(weight, keys.mean(dim=0) - guide, metric)

    @cached_property
    def _evaluations(self) -> tuple[Evaluation, Evaluation]:
        """The rows to choose by and those to report on, after the original model's pass."""
        runner = self.baselines
        opened = evaluations(runner.times, runner.pointer, runner.model)
        for evaluation in {id(each): each for each in opened}.values():
            evaluation.base_pass(self.layers.values(), cache_bytes=spare(runner.times.device))
        return opened

    def _gradient(self, layer: str) -> Tensor:
        values = layer_gradient(self.baselines.times.store, self.baselines.pointer.forget, layer)
        return linear_map(layer, torch.from_numpy(values)).to(self._exact)

    def _metric(self, layer: str, damping: float) -> RetainMetric:
        """Return P of a layer; its covariance is computed where the store lacks it."""
        times, pointer = self.baselines.times, self.baselines.pointer
        store, manifest, device = times.store, times.manifest, times.device
        covariances = self._once(
            ("retain covariance", layer),
            lambda: ensure_covariances(store, manifest, pointer, [layer], device=device),
        )
        if not covariances.has(layer):
            raise InputError(f"{layer}: its tower does not show what the layer is applied to")
        return RetainMetric(covariances.covariance(layer), 1, damping)

    def _keys(self, layer: str, role: str) -> Tensor:
        """Return fp64 the keys of a layer over the texts, or the images, of a role."""
        reader = self._reader(layer, role)
        return self._once(("keys", layer, role), lambda: reader.keys().to(self._exact).double())

    def _feature(self) -> Tensor:
        """Return the mean unit feature of the forget captions."""
        tower, times = text_tower(self.baselines.model), self.baselines.times
        block, device = DataBlock.open(times.store, times.manifest.forget), times.device
        tokens = to_tokens(block.tokens[chosen_rows(block.rows)], "cpu")
        features = self._once(("features",), lambda: text_features(tower, tokens, device))
        return features.to(self._exact).double().mean(dim=0)

    def _once(self, name: tuple[str, ...], compute: Callable[[], T]) -> T:
        """Return what `compute` gives, computed at the first call; charge its time at each."""
        start = perf_counter()
        if name not in self._parts:
            value = compute()
            settle(self.baselines.model)
            self._parts[name] = value, perf_counter() - start
        value, seconds = self._parts[name]
        self._charged += seconds - (perf_counter() - start)
        return value

    def _reader(self, layer: str, role: str) -> KeyReader:
        times, model = self.baselines.times, self.baselines.model
        block = DataBlock.open(times.store, getattr(times.manifest, role))
        return KeyReader(model, layer, block, times.manifest.input, times.device)

    @property
    def _exact(self) -> str:
        return exact_device(self.baselines.times.device)


def _chosen_step(evaluator: Evaluator, method: Method) -> float:
    """Return the step that our own search would choose along a change.

    UCE's change has a length of its own, which is tried first.
    """
    search = LayerSearch((), evaluator.evaluation, SearchOptions())
    search.along(evaluator, 1.0 if method is Method.UCE else None)
    return search.choose().step
