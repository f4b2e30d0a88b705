"""Where a layer moves: along its forget gradient, or that whitened; the edit that a step is.

Whitening takes the second moments of the layers' inputs. They are addressed by the model
and the retain rows, so every concept that shares these shares them. What is missing is
computed in one forward over the retain set, for all layers that are asked for at once.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, make_edit
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.number_formats import Floats, layer_digests
from slsgu_cli.clip import processes
from slsgu_cli.clip.models import pick_device, resolve
from slsgu_cli.errors import InputError, NotFiniteError, SlsguError
from slsgu_cli.method.gradients import KeptArrays, load_graded, open_pairs
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import (
    CovarianceHeader,
    Direction,
    EditHeader,
    GradientPointer,
    LayerCovariance,
    Precision,
    SumsHeader,
    Tower,
    Trial,
)
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.targets import TargetTrial
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.locks import held
from slsgu_cli.store.store import Arrays, Store
from slsgu_cli.text import listed

if TYPE_CHECKING:
    from torch import Tensor

    from slsgu_cli.method.covariance import InputCovariances, RetainMetric


# Part of every address of covariances: a change in what is computed must change it. What was not
# seen by an earlier revision is looked for again: from 2 on, of all convolutions, of norms and
# scales of channels, and of attention in one call.
REVISION = 2

# Layers that a note names, of many.
NAMED = 3


@dataclass(frozen=True, slots=True)
class Covariances:
    """The covariances in the store of one model's layers over one set of retain rows.

    `device` is where they are solved with.
    """

    store: Store
    places: dict[str, tuple[str, LayerCovariance]]
    unseen: frozenset[str]
    device: str = "cpu"

    def has(self, layer: str) -> bool:
        """Return whether the covariances of the layer's inputs are known."""
        return Layer.parse(layer).parameter in self.places

    def without(self, layers: Iterable[str]) -> list[str]:
        """Return those layers that cannot be whitened: their inputs were not seen."""
        return [layer for layer in layers if not self.has(layer)]

    def lack(self, parameters: Collection[str]) -> list[str]:
        """Return those parameters of which it is not known whether they have covariances."""
        return sorted(set(parameters) - set(self.places) - self.unseen)

    def covariance(self, layer: str) -> "Tensor":
        """Return the covariance of the layer's inputs, on the device it is solved with.

        A third of a parameter is applied to what the whole is applied to.
        """
        import torch

        from slsgu_cli.method.covariance import exact_device

        name = Layer.parse(layer).parameter
        path, _ = self.places[name]
        values = self.store.read_tensors(path, [name])[name]
        return torch.from_numpy(values).to(exact_device(self.device))

    def metric(self, layer: str, damping: float) -> "RetainMetric":
        """Return the inner product that the layer's retained inputs make of its changes."""
        from slsgu_cli.method.covariance import RetainMetric

        _, about = self.places[Layer.parse(layer).parameter]
        return RetainMetric(self.covariance(layer), about.axis, damping)

    def output(self, parameter: str) -> float:
        """Return a whole parameter's mean squared output over the retain set."""
        return self.places[parameter][1].output


def find_covariances(store: Store, pointer: GradientPointer, device: str = "cpu") -> Covariances:
    """Return the covariances that the store has for the model and retain rows of `pointer`.

    `device` is where they are to be solved with.
    """
    places: dict[str, tuple[str, LayerCovariance]] = {}
    unseen: set[str] = set()
    for name in store.names("covariances", ".safetensors"):
        path = Artifact.COVARIANCE.path(name)
        try:
            header = store.read_header(path, CovarianceHeader)
        except SlsguError:
            # Damaged, or gone since it was listed: computed again, and `ls` tells of it.
            continue
        if header.is_of(pointer):
            places |= {layer: (path, about) for layer, about in header.layers.items()}
            unseen.update(header.unseen if header.revision == REVISION else ())
    return Covariances(store, places, frozenset(unseen), device)


def ensure_covariances(
    store: Store,
    manifest: SetManifest,
    pointer: GradientPointer,
    layers: Sequence[str],
    *,
    device: str,
    shard: bool = False,
) -> Covariances:
    """Return covariances of `layers`, computing what the store lacks; `shard` as in `grad`.

    A layer whose inputs its tower does not show has none. Raises StaleError where the model is not
    the one the gradients are of.
    """
    device = pick_device(device)
    known = _found_by_first(store, pointer, device)
    wanted = {Layer.parse(layer).parameter for layer in layers}
    if known.lack(wanted):
        of = [pointer.model_fingerprint, pointer.retain_data, *pointer.prefixes]
        place = Artifact.COVARIANCE.path(digest(of))
        with held(store, place, what=f"covariances of the retain set of {manifest.name}"):
            # Another process may have computed some meanwhile.
            known = _found_by_first(store, pointer, device)
            if missing := known.lack(wanted):
                progress.note(
                    f"{len(missing)} layers lack the covariances of their inputs: "
                    "one forward over the retain set"
                )
                _compute(store, manifest, pointer, missing, device=device, shard=shard)
                known = _found_by_first(store, pointer, device)
    return known


def tell_of_unwhitened(
    covariances: Covariances, layers: Sequence[str], *, how: str, out: str
) -> None:
    """Tell which layers cannot be whitened, `how` they go along their gradient, and the way out."""
    if unwhitened := covariances.without(layers):
        tell_of_layers(
            f"{len(unwhitened)} of {len(layers)} layers cannot be whitened, since their tower does "
            f"not show what they are applied to, and are {how} along their gradient; {out}",
            unwhitened,
        )


def tell_of_layers(text: str, layers: Sequence[str]) -> None:
    """Tell something of layers: a few are named, and with -v all."""
    progress.note(f"{text}: {listed(layers, NAMED)}")
    if len(layers) > NAMED:
        progress.detail(", ".join(layers))


def _found_by_first(store: Store, pointer: GradientPointer, device: str) -> Covariances:
    """Return the covariances that the first of several processes finds: all go on with the same."""

    def found() -> tuple[dict[str, tuple[str, LayerCovariance]], frozenset[str]]:
        known = find_covariances(store, pointer, device)
        return known.places, known.unseen

    return Covariances(store, *processes.from_first(found), device)


def layer_gradient(store: Store, address: str, name: str) -> Floats:
    """Return fp32 the gradient of a layer from the gradients at an address of the store.

    Raises NotFiniteError.
    """
    layer = Layer.parse(name)
    path = Artifact.GRADIENT.path(address)
    values: Floats = layer.rows(store.read_tensors(path, [layer.parameter])[layer.parameter])
    if not np.isfinite(values).all():
        raise NotFiniteError(
            f"the stored gradient of {name} holds values that are not finite",
            hint=f"remove {path} from the store and run `slsgu grad` for the set again",
        )
    return values


def forget_direction(
    store: Store,
    pointer: GradientPointer,
    layer: str,
    *,
    damping: float,
    covariances: Covariances | None,
) -> Floats:
    """Return fp32 where a layer moves: its forget gradient, or with `covariances` that whitened.

    PyTorch is loaded for the latter only.
    """
    gradient = layer_gradient(store, pointer.forget, layer)
    if covariances is None:
        return gradient
    if not covariances.has(layer):
        raise InputError(
            f"{layer} cannot be whitened: its tower does not show what the layer is applied to",
            hint="--direction gradient, or another layer",
        )
    import torch

    metric = covariances.metric(layer, damping)
    along = metric.whiten(torch.from_numpy(gradient).to(metric.covariance.device))
    whitened: Floats = along.float().cpu().numpy()
    return whitened


def _compute(
    store: Store,
    manifest: SetManifest,
    pointer: GradientPointer,
    layers: Sequence[str],
    *,
    device: str,
    shard: bool,
) -> None:
    """Run the towers of `layers` over the retain set and store the covariances of their inputs.

    Of several processes each has some of the covariances, and the first gets and writes the means.
    """
    import torch

    from slsgu_cli.method.covariance import chosen_rows, input_covariances, mean_square_output
    from slsgu_cli.method.gradient_pass import arithmetic

    model, module = load_graded(manifest, pointer, device, shard=shard)
    block = open_pairs(store, manifest, "retain", pointer.prefixes, model, again=1)
    made_from: dict[str, Any] = {
        "revision": REVISION,
        "model": pointer.model_fingerprint,
        "data": pointer.retain_data,
        "input": manifest.input,
        "layers": sorted(layers),
    }
    if pointer.prefixes:
        made_from |= {"prefixes": list(pointer.prefixes)}
    # Sums are alike of a whole and of a sharded model: one goes on with those of the other.
    kept = StoredCovariances(store, digest(made_from), device, sharded=False)
    about: dict[str, LayerCovariance] = {}
    means: dict[str, Tensor] = {}
    with torch.no_grad(), arithmetic(Precision.FP32):
        covariances = input_covariances(
            module, layers, block, spec=manifest.input, device=device, keeper=kept
        )
        for layer in sorted(set().union(*processes.gathered(list(covariances)))):
            weight = processes.unsharded(module.get_parameter(layer))
            # The sums are fp64 and large: each goes as soon as its mean is taken.
            if (covariance := covariances.pop(layer, None)) is not None:
                mean = covariance.mean()
                output = mean_square_output(weight, mean, covariance.axis)
                about[layer] = LayerCovariance(covariance.axis, covariance.count, output)
                means[layer] = mean.float().cpu()
    about = dict(sorted(item for part in processes.gathered(about) for item in part.items()))
    header = CovarianceHeader(
        model=pointer.model_fingerprint,
        data=pointer.retain_data,
        rows=len(chosen_rows(block.rows)),
        layers=about,
        unseen=tuple(layer for layer in layers if layer not in about),
        version=slsgu_cli.__version__,
        prefixes=pointer.prefixes,
        revision=REVISION,
    )
    arrays = processes.on_first(means)
    store.write_tensors(Artifact.COVARIANCE.path(kept.digest), arrays, header, keep_first=True)
    kept.remove()


class StoredCovariances(KeptArrays):
    """The covariances of a forward under way, kept for what they will make."""

    def restore(self, covariances: "InputCovariances", parts: int) -> int:
        """Put what was kept into covariances of nothing; return how many parts are in them."""

        def use(_header: SumsHeader, kept: Arrays) -> None:
            covariances.go_on(kept)

        done = self.go_on(parts, use)
        if done:
            progress.note(f"the covariances go on after {done} of their {parts} parts")
        return done

    def keep(self, covariances: "InputCovariances", parts: int, *, done: int) -> None:
        """Write the covariances over the first parts that are done."""
        self.write(covariances.kept, parts, added=done, done=done)


@dataclass(frozen=True, slots=True)
class LayerStep:
    """A step of a layer: the change `delta` of its values `before`.

    `share` is the length of the step over the norm of these, `damping` what whitened the
    direction, None for the gradient itself.
    """

    layer: str
    tower: Tower
    step: float
    share: float
    damping: float | None
    delta: Floats
    before: Floats

    @classmethod
    def of(
        cls,
        trial: Trial | TargetTrial,
        *,
        damping: float | None,
        direction: "Tensor",
        weight: "Tensor",
    ) -> Self:
        """Return the step that a trial tried, along `direction` from `weight`."""
        return cls(
            layer=trial.layer,
            tower=trial.tower,
            step=trial.step,
            share=trial.share,
            damping=damping,
            delta=(trial.step * direction).cpu().numpy(),
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
        direction=Direction.of(layer_step.damping),
        damping=layer_step.damping,
        retain_data=None if layer_step.damping is None else pointer.retain_data,
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
