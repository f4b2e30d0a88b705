"""Edits of one layer in closed form: their layer, statistics, step and figures.

C = E[x x^T] is the covariance of the layer's inputs over retained rows, F that over all
tokens of the forget captions, and P = C + damping tr(C)/d I. G is the forget gradient of the
weight W; summed over tokens, G = R K^T with the inputs K and the gradients R at the outputs.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from time import perf_counter
from typing import Any, TypeVar

import torch
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
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.clip.towers import OpenClipText, text_tower, vision_tower
from slsgu_cli.compare.epochs import settle
from slsgu_cli.compare.registry import ClosedForm, baseline
from slsgu_cli.compare.runner import BaselineRunner, evaluations
from slsgu_cli.engine.applied_layers import AppliedLayers, Use
from slsgu_cli.engine.covariance import chosen_rows, exact_device, layer_sums
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
from slsgu_cli.records.comparison import ClipOutcome, Method
from slsgu_cli.records.directions import DAMPING, Statistic
from slsgu_cli.records.method import (
    GradientHeader,
    GradientPointer,
    Precision,
    Qkv,
    Tower,
)
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.sources.matching import in_place_of_names, up_to_names
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store

INPUTS = (Statistic.INPUTS,)
T = TypeVar("T")
MLP_OUTPUT = re.compile(r"\.mlp\.(?:c_proj|fc2)\.weight$")


def linear_map(layer: str, values: Tensor) -> Tensor:
    """Convert a layer's values to (outputs, inputs), or such a change back.

    A parameter that is not the weight of a module is applied as x @ W.
    """
    return values if layer.endswith(".weight") else values.T


def layer_for(
    spec: ClosedForm, store: Store, pointer: GradientPointer, wanted: str | None
) -> str | None:
    """Return the layer that a closed form edits, None if the model has none.

    Without a layer of its own, a method edits the layer `wanted`, by default the output
    projection of the MLP in the middle block of the text tower. Raises UsageError for a layer
    that it cannot edit.
    """
    header = store.read_header(Artifact.GRADIENT.path(pointer.forget), GradientHeader)
    names = sorted(header.weights)
    if spec.only is not None:
        return next(filter(spec.only.fullmatch, names), None)
    if wanted is None:
        texts = [layer for layer in map(Layer.parse, names) if layer.tower is Tower.TEXT]
        middle = block_count(layer.name for layer in texts) // 2
        of_middle = (layer.name for layer in texts if layer.block == middle)
        return next(filter(MLP_OUTPUT.search, of_middle), None)
    layer = named_layer(store, pointer, wanted)
    is_matrix = layer.part is None and len(header.weights[layer.name].shape) == 2
    if layer.tower is not Tower.TEXT or not is_matrix or not layer.is_of(Qkv.SPLIT):
        raise UsageError(
            f"--layer {wanted} is not a weight matrix of the text tower that is applied as a whole",
            hint="--layer with an mlp.c_proj, mlp.c_fc, attn.out_proj or text_projection",
        )
    return layer.name


class LastCall(AppliedLayers):
    """While active, records the inputs and outputs of the last call of one layer."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__(model, [layer])
        self.inputs, self.outputs = torch.empty(0), torch.empty(0)

    def applied(self, use: Use, inputs: Iterable[Tensor], outputs: Tensor) -> None:
        """Record a call."""
        (self.inputs,), self.outputs = inputs, outputs


def _once(compute: Callable[..., T]) -> Callable[..., T]:
    """Compute a statistic of LayerEdits at its first call; charge its time at every call."""

    @wraps(compute)
    def statistic(edits: "LayerEdits", *names: str) -> T:
        start, key = perf_counter(), (compute.__name__, *names)
        if key not in edits.statistics:
            value = compute(edits, *names)
            settle(edits.baselines.model)
            edits.statistics[key] = value, perf_counter() - start
        value, seconds = edits.statistics[key]
        edits.charged += seconds - (perf_counter() - start)
        return value

    return statistic


@dataclass
class LayerEdits:
    """Closed-form edits of a set's original model, and the statistics they are made from.

    A key of a layer is its input at the position whose state becomes the features: the end of a
    text, or the pooled state of an image. Statistics that several methods need are computed once,
    of at most as many rows as covariances take, and each method is charged their time.
    """

    baselines: BaselineRunner
    layers: Mapping[Method, str]
    statistics: dict[tuple[str, ...], tuple[Any, float]] = field(default_factory=dict)
    charged: float = 0.0

    def run(self, method: Method, setting: float) -> ClipOutcome:
        """Edit the original model by a method and measure it.

        The seconds are those of the edit and of the search for its step, without loading the
        model and running it over the evaluation sets.
        """
        spec, runner, layer = closed_form_of(method), self.baselines, self.layers[method]
        runner.restore()
        label = f"{method} {setting:g}"
        with torch.no_grad(), arithmetic(Precision.FP32), counted_by(label):
            validation, test = self._evaluations
            start, self.charged = perf_counter(), 0.0
            change = linear_map(layer, spec.change(self, layer, setting)).float()
            weight = runner.model.get_parameter(layer).detach().cpu().numpy()
            move = Evaluator(validation, layer, norm(weight), change.to(runner.times.device))
            step = spec.step
            if step is None:
                search = LayerSearch((), validation, SearchOptions())
                search.along(move, spec.first_step)
                step = search.choose().step
            settle(runner.model)
            seconds = perf_counter() - start + self.charged
            changes = [move.change(step)]
            chosen_by = report(validation, changes).after
            figures = chosen_by if test is validation else report(test, changes).after
        pointer, model = runner.pointer, runner.model
        seconds += runner.times.seconds(pointer, spec.gradients, squares=False, model=model)
        progress.detail(f"{label}: FA@1 {figures.forget.top1:.1f} on {layer}")
        return ClipOutcome(
            method=method,
            setting=setting,
            forget=figures.forget,
            utility=figures.utility,
            seconds=seconds,
            forget_passes=float(spec.forget_passes),
            retain_passes=0.0,
            where=runner.times.where,
            layer=layer,
            step=step,
            chosen_by=chosen_by,
        )

    @torch.no_grad()
    def change(self, method: Method, setting: float, layer: str) -> Tensor:
        """Return the change (outputs, inputs) of a layer by a method at a setting."""
        return closed_form_of(method).change(self, layer, setting)

    @cached_property
    def _evaluations(self) -> tuple[Evaluation, Evaluation]:
        """The validation and the test rows, with features by the original model."""
        runner = self.baselines
        opened = evaluations(runner.times, runner.pointer, runner.model)
        for evaluation in {id(each): each for each in opened}.values():
            evaluation.base_pass(self.layers.values(), cache_bytes=spare(runner.times.device))
        return opened

    def weight(self, layer: str) -> Tensor:
        """Return the weight of a layer, (outputs, inputs)."""
        values = self.baselines.model.get_parameter(layer).data
        return linear_map(layer, values).to(self._exact)

    def gradient(self, layer: str) -> Tensor:
        """Return the stored forget gradient of a layer, (outputs, inputs)."""
        values = layer_gradient(self.baselines.times.store, self.baselines.pointer.forget, layer)
        return linear_map(layer, torch.from_numpy(values)).to(self._exact)

    def metric(self, layer: str, damping: float = DAMPING) -> RetainMetric:
        """Return the damped covariance of a layer's retained inputs."""
        return RetainMetric(self._retain_covariance(layer), 1, damping)

    @_once
    def _retain_covariance(self, layer: str) -> Tensor:
        times, pointer = self.baselines.times, self.baselines.pointer
        covariances = ensure_covariances(
            times.store, times.manifest, pointer, [layer], needs=INPUTS, device=times.device
        )
        if not covariances.has(layer, INPUTS):
            raise InputError(f"the inputs of {layer} cannot be captured")
        return covariances.inputs(layer).matrix

    @_once
    def forget_covariance(self, layer: str) -> Tensor:
        """Return the covariance of a layer's inputs over all tokens of the forget captions."""
        runner, times = self.baselines, self.baselines.times
        covariances = layer_sums(
            Statistic.INPUTS,
            runner.model,
            [layer],
            runner.block("forget"),
            spec=times.manifest.input,
            device=times.device,
        )
        return covariances[layer].mean()

    @_once
    def keys(self, layer: str, role: str) -> Tensor:
        """Return the keys (rows, inputs) of a layer over a role in fp64, of texts in any order.

        A layer of the vision tower must be the projection of image features.
        """
        if Layer.parse(layer).tower is Tower.TEXT:
            keys = [_at(call.inputs, ends) for call, _, ends, _ in self._texts(layer, role)]
        else:
            keys = [call.inputs for call, _ in self._images(layer, role)]
        return torch.cat(keys).to(self._exact).double()

    @_once
    def value_gradient(self, layer: str) -> Tensor:
        """Return the mean gradient of 1 - cos(v, t) at a text layer's outputs for its keys."""
        images = torch.cat([features for _, features in self._images(layer, "forget")])
        total = torch.zeros((), dtype=torch.float64, device=self._exact)
        with torch.enable_grad():
            for call, texts, ends, rows in self._texts(layer, "forget"):
                losses = 1 - (images[rows.to(images.device)] * texts).sum(dim=-1)
                (gradient,) = torch.autograd.grad(losses.sum(), [call.outputs])
                total = total + _at(gradient, ends).to(total.device).double().sum(dim=0)
        return total / len(images)

    @_once
    def caption_feature(self) -> Tensor:
        """Return the mean unit feature of the forget captions."""
        block, tower = self.baselines.block("forget"), text_tower(self.baselines.model)
        tokens = to_tokens(block.tokens[chosen_rows(block.rows)], "cpu")
        features = text_features(tower, tokens, self.baselines.times.device)
        return features.to(self._exact).double().mean(dim=0)

    @_once
    def named_keys(self, layer: str, anchor: str) -> tuple[Tensor, Tensor]:
        """Return the keys (rows, inputs) of a text layer for the name and for an anchor, in fp64.

        They are those of the end of each distinct forget caption and of the last token of its
        name, and those of the same captions with the anchor in place of the name. If later tokens
        can influence a key, only the ends count.
        """
        runner, tower = self.baselines, text_tower(self.baselines.model)
        block, patterns = runner.block("forget"), runner.times.manifest.patterns
        tokenize = tokenizer(resolve(runner.pointer.model))
        captions = list(dict.fromkeys(block.captions[row] for row in chosen_rows(block.rows)))
        # The state of a token is that of the text that ends with it.
        parts = [(captions, 0), (up_to_names(captions, patterns), 1)]
        if not (isinstance(tower, OpenClipText) and tower.shortens):
            parts = parts[:1]

        def keys(texts: Sequence[str], before: int) -> Tensor:
            tokens, found = to_tokens(tokenize(texts), "cpu"), torch.empty(0)
            for call, _, ends, rows in self._calls(layer, tokens):
                at = _at(call.inputs, ends - before).to(self._exact).double()
                found = at.new_empty((len(tokens), at.shape[1])) if found.ndim == 1 else found
                found[rows] = at
            return found

        named = [keys(texts, before) for texts, before in parts]
        others = [keys(in_place_of_names(each, patterns, anchor), before) for each, before in parts]
        return torch.cat(named), torch.cat(others)

    def _texts(self, layer: str, role: str) -> Iterator[tuple[LastCall, Tensor, Tensor, Tensor]]:
        """Yield the call, features, the ends of the texts, and the numbers of their rows."""
        block = self.baselines.block(role)
        yield from self._calls(layer, to_tokens(block.tokens[chosen_rows(block.rows)], "cpu"))

    def _calls(
        self, layer: str, tokens: Tensor
    ) -> Iterator[tuple[LastCall, Tensor, Tensor, Tensor]]:
        model, device = self.baselines.model, self.baselines.times.device
        tower, call = text_tower(model), LastCall(model, layer)
        if not isinstance(tower, OpenClipText):
            raise InputError("the text tower of this model does not tell where its texts end")
        for rows in by_length(tower, tokens, TEXTS_PER_FORWARD[torch.device(device).type]):
            short = tower.trim(tokens[rows]).to(device)
            with call:
                features = tower.features(short, short)
            yield call, features, tower.pooled_at(short), rows

    def _images(self, layer: str, role: str) -> Iterator[tuple[LastCall, Tensor]]:
        model, times = self.baselines.model, self.baselines.times
        tower, call, block = vision_tower(model), LastCall(model, layer), self.baselines.block(role)
        normalize, rows = (
            pixel_normalizer(times.manifest.input, times.device),
            chosen_rows(block.rows),
        )
        size = IMAGES_PER_FORWARD[torch.device(times.device).type]
        for start, stop in spans(len(rows), size):
            pixels = normalize(block.take(rows[start:stop]))
            with call:
                features = tower.features(pixels, pixels)
            yield call, features

    @property
    def _exact(self) -> str:
        return exact_device(self.baselines.times.device)


def _at(states: Tensor, ends: Tensor) -> Tensor:
    """Return the states at the ends of texts; `states` may have only those."""
    return states if states.ndim == 2 else states[torch.arange(len(states)), ends]


def closed_form_of(method: Method) -> ClosedForm:
    """Return the declaration of a closed form."""
    spec = baseline(method)
    if not isinstance(spec, ClosedForm):
        raise TypeError(f"{method} is not a closed form")
    return spec
