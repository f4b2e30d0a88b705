"""Edits of one layer in closed form: their layer, statistics, step and figures.

C = E[x x^T] is the covariance of the layer's inputs over retained rows, F that over all
tokens of the forget captions, and P = C + damping tr(C)/d I. G is the forget gradient of the
weight W; summed over tokens, G = R K^T with the inputs K and the gradients R at the outputs.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from slsgu_cli import progress
from slsgu_cli.checkpoints.layers import Layer, block_count
from slsgu_cli.clip.batches import text_features, to_tokens
from slsgu_cli.clip.evaluation import Evaluation
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.memory import spare
from slsgu_cli.clip.towers import text_tower
from slsgu_cli.compare.epochs import settle
from slsgu_cli.compare.layer_inputs import LayerInputs
from slsgu_cli.compare.registry import ClosedForm, baseline
from slsgu_cli.compare.runner import BaselineRunner, evaluations
from slsgu_cli.engine.covariance import chosen_rows, exact_device
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
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

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

    Without a projection of its own, a method edits the layer `wanted`, by default the output
    projection of the MLP in the middle block of the text tower. Raises UsageError for a layer
    that it cannot edit.
    """
    header = store.read_header(Artifact.GRADIENT.path(pointer.forget), GradientHeader)
    names = sorted(header.weights)
    if spec.projection is not None:
        return next(filter(spec.projection.fullmatch, names), None)
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


@dataclass
class LayerEdits:
    """Closed-form edits of a set's original model, and the statistics they are made from.

    Statistics that several methods need are computed once, and each is charged their time.
    """

    baselines: BaselineRunner
    layers: Mapping[Method, str]
    _parts: dict[tuple[str, ...], tuple[Any, float]] = field(init=False, default_factory=dict)
    _charged: float = field(init=False, default=0.0)

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
            move, step, seconds = self._move(method, setting, validation)
            chosen_by = report(validation, [(move, step)]).after
            reported = (replace(move, evaluation=test), step)
            figures = chosen_by if test is validation else report(test, [reported]).after
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

    def _move(
        self, method: Method, setting: float, evaluation: Evaluation
    ) -> tuple[Evaluator, float, float]:
        """Return the change by a method, the step along it, and the seconds of both."""
        start, self._charged = perf_counter(), 0.0
        spec, layer = closed_form_of(method), self.layers[method]
        device = self.baselines.times.device
        change = linear_map(layer, self.change(method, setting, layer))
        weight = evaluation.model.get_parameter(layer).detach().cpu().numpy()
        tower = Layer.parse(layer).recorded_tower
        score = LayerScore.unranked(layer, tower, weight.shape, norm(weight))
        move = Evaluator(evaluation, score, change.float().to(device))
        step = spec.step if spec.step is not None else _searched_step(move, spec.first_step)
        settle(self.baselines.model)
        return move, step, perf_counter() - start + self._charged

    @torch.no_grad()
    def change(self, method: Method, setting: float, layer: str) -> Tensor:
        """Return the change (outputs, inputs) of a layer by a method at a setting."""
        return closed_form_of(method).change(self, layer, setting)

    def weight(self, layer: str) -> Tensor:
        """Return the weight of a layer, (outputs, inputs)."""
        values = self.baselines.model.get_parameter(layer).data
        return linear_map(layer, values).to(self._exact)

    @cached_property
    def _evaluations(self) -> tuple[Evaluation, Evaluation]:
        """The validation and the test rows, with features by the original model."""
        runner = self.baselines
        opened = evaluations(runner.times, runner.pointer, runner.model)
        for evaluation in {id(each): each for each in opened}.values():
            evaluation.base_pass(self.layers.values(), cache_bytes=spare(runner.times.device))
        return opened

    def gradient(self, layer: str) -> Tensor:
        """Return the stored forget gradient of a layer, (outputs, inputs)."""
        values = layer_gradient(self.baselines.times.store, self.baselines.pointer.forget, layer)
        return linear_map(layer, torch.from_numpy(values)).to(self._exact)

    def metric(self, layer: str, damping: float = DAMPING) -> RetainMetric:
        """Return the damped covariance of a layer's retained inputs, computed if necessary."""
        times, pointer = self.baselines.times, self.baselines.pointer
        store, manifest, device = times.store, times.manifest, times.device
        covariances = self._once(
            ("retain covariance", layer),
            lambda: ensure_covariances(store, manifest, pointer, [layer], device=device),
        )
        if not covariances.has(layer):
            raise InputError(f"{layer}: its tower does not show the inputs of the layer")
        return RetainMetric(covariances.covariance(layer), 1, damping)

    def keys(self, layer: str, role: str) -> Tensor:
        """Return the keys of a layer over the texts, or the images, of a role, in fp64."""
        inputs = self._inputs(layer, role)
        return self._once(("keys", layer, role), lambda: inputs.keys().to(self._exact).double())

    def value_gradient(self, layer: str) -> Tensor:
        """Return the mean gradient at the outputs of a text layer for the forget keys."""
        return self._once(("value", layer), self._inputs(layer, "forget").value_gradient)

    def forget_covariance(self, layer: str) -> Tensor:
        """Return the covariance of a layer's inputs over all tokens of the forget captions."""
        return self._once(("covariance", layer), self._inputs(layer, "forget").covariance)

    def caption_feature(self) -> Tensor:
        """Return the mean unit feature of the forget captions."""
        tower, times = text_tower(self.baselines.model), self.baselines.times
        block, device = DataBlock.open(times.store, times.manifest.forget), times.device
        tokens = to_tokens(block.tokens[chosen_rows(block.rows)], "cpu")
        features = self._once(("features",), lambda: text_features(tower, tokens, device))
        return features.to(self._exact).double().mean(dim=0)

    def _once(self, name: tuple[str, ...], compute: Callable[[], T]) -> T:
        """Return the result of the first call of `compute`; charge its time at every call."""
        start = perf_counter()
        if name not in self._parts:
            value = compute()
            settle(self.baselines.model)
            self._parts[name] = value, perf_counter() - start
        value, seconds = self._parts[name]
        self._charged += seconds - (perf_counter() - start)
        return value

    def _inputs(self, layer: str, role: str) -> LayerInputs:
        times, model = self.baselines.times, self.baselines.model
        block = DataBlock.open(times.store, getattr(times.manifest, role))
        return LayerInputs(model, layer, block, times.manifest.input, times.device)

    @property
    def _exact(self) -> str:
        return exact_device(self.baselines.times.device)


def _searched_step(move: Evaluator, first: float | None) -> float:
    """Return the step that our own search would choose along a change."""
    search = LayerSearch((), move.evaluation, SearchOptions())
    search.along(move, first)
    return search.choose().step


def closed_form_of(method: Method) -> ClosedForm:
    """Return the declaration of a closed form."""
    spec = baseline(method)
    if not isinstance(spec, ClosedForm):
        raise TypeError(f"{method} is no closed form")
    return spec
