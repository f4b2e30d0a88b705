"""The covariances of layers' inputs on a retain set: in the store, or computed when missing.

They are addressed by the model and the retain rows, so concepts that share both share them.
Missing ones are computed in one forward over the retain set, for all layers at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import slsgu_cli
from slsgu_cli import processes, progress
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.engine.gradients import load_graded, open_pairs
from slsgu_cli.engine.resumable import SavedSums
from slsgu_cli.errors import SlsguError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import (
    CovarianceHeader,
    GradientPointer,
    LayerCovariance,
    Precision,
)
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.locks import held
from slsgu_cli.store.store import Arrays, Store
from slsgu_cli.text import listed

if TYPE_CHECKING:
    from slsgu_cli.method.directions import InputCovariance

# Part of every address of covariances: change it with the computation. Layers that an earlier
# revision could not capture are tried again. Revision 2 added all convolutions, norms, channel
# scales and fused attention.
REVISION = 2

# Most layers that a note names.
NAMED = 3


@dataclass(frozen=True, slots=True)
class Covariances:
    """The covariances in the store of one model's layers over one set of retain rows.

    Linear systems with them are solved on `device`.
    """

    store: Store
    places: dict[str, tuple[str, LayerCovariance]]
    uncaptured: frozenset[str]
    device: str = "cpu"

    def has(self, layer: str) -> bool:
        """Return whether the store has the layer's covariance."""
        return Layer.parse(layer).parameter in self.places

    def missing(self, layers: Iterable[str]) -> list[str]:
        """Return the parameters of layers that still have to be tried."""
        wanted = {Layer.parse(layer).parameter for layer in layers}
        return sorted(wanted - set(self.places) - self.uncaptured)

    def inputs(self, layer: str, weight: Floats | None = None) -> "InputCovariance":
        """Return the input covariance of a layer, on the device for solving.

        A query, key or value slice has the inputs of the whole parameter. `weight` has the values
        of such a slice, whose mean squared output is not stored.
        """
        import torch

        from slsgu_cli.engine.covariance import exact_device
        from slsgu_cli.method.directions import InputCovariance
        from slsgu_cli.method.directions.whitened import mean_square_output

        name = Layer.parse(layer).parameter
        path, about = self.places[name]
        values = torch.from_numpy(self.store.read_tensors(path, [name])[name])
        covariance, output = values.to(exact_device(self.device)), about.output
        if weight is not None:
            slice_values = torch.tensor(weight, device=covariance.device)
            output = mean_square_output(slice_values, covariance, about.axis)
        return InputCovariance(covariance, about.axis, output)


def find_covariances(store: Store, pointer: GradientPointer, device: str = "cpu") -> Covariances:
    """Return the covariances in the store of the model and retain rows of `pointer`.

    All ranks return those that rank 0 finds.
    """
    return Covariances(store, *processes.from_first(lambda: _places(store, pointer)), device)


def _places(
    store: Store, pointer: GradientPointer
) -> tuple[dict[str, tuple[str, LayerCovariance]], frozenset[str]]:
    """Return the file and record of each layer's covariance, and the layers without inputs."""
    places: dict[str, tuple[str, LayerCovariance]] = {}
    uncaptured: set[str] = set()
    for name in store.names("covariances", ".safetensors"):
        path = Artifact.COVARIANCE.path(name)
        try:
            header = store.read_header(path, CovarianceHeader)
        except SlsguError:
            # Damaged, or removed since it was listed: compute it again. `ls` reports it.
            continue
        if header.is_of(pointer):
            places |= {layer: (path, about) for layer, about in header.layers.items()}
            uncaptured.update(header.uncaptured if header.revision == REVISION else ())
    return places, frozenset(uncaptured)


def ensure_covariances(
    store: Store,
    manifest: SetManifest,
    pointer: GradientPointer,
    layers: Sequence[str],
    *,
    device: str,
) -> Covariances:
    """Return covariances of `layers`, computing those that the store lacks.

    The result lacks layers whose inputs cannot be captured. Raises StaleError if the model is not
    the one the gradients belong to.
    """
    device = pick_device(device)
    known = find_covariances(store, pointer, device)
    if known.missing(layers):
        place = Artifact.COVARIANCE.path(pointer.retain)
        with held(store, place, what=f"covariances of the retain set of {manifest.name}"):
            # Another process may have computed some while this one waited.
            known = find_covariances(store, pointer, device)
            if missing := known.missing(layers):
                progress.note(
                    f"{len(missing)} layers lack the covariances of their inputs: "
                    "one forward over the retain set"
                )
                _compute(store, manifest, pointer, missing, device=device)
                known = find_covariances(store, pointer, device)
    return known


def warn_of_fallback(
    covariances: Covariances, layers: Sequence[str], *, how: str, out: str
) -> None:
    """Note which layers lack input covariances, `how` they are used, and how to avoid it."""
    if without := [layer for layer in layers if not covariances.has(layer)]:
        note_layers(
            f"{len(without)} of {len(layers)} layers are {how} along their gradient, because their "
            f"inputs cannot be captured; {out}",
            without,
        )


def note_layers(text: str, layers: Sequence[str]) -> None:
    """Print a note that names a few layers; with -v, all of them."""
    progress.note(f"{text}: {listed(layers, NAMED)}")
    if len(layers) > NAMED:
        progress.detail(", ".join(layers))


def _compute(
    store: Store,
    manifest: SetManifest,
    pointer: GradientPointer,
    layers: Sequence[str],
    *,
    device: str,
) -> None:
    """Run the towers of `layers` over the retain set and store the covariances of their inputs."""
    import torch

    from slsgu_cli.engine.covariance import chosen_rows, input_covariances
    from slsgu_cli.engine.gradient_pass import arithmetic
    from slsgu_cli.method.directions.whitened import mean_square_output

    model, module = load_graded(pointer, device)
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
    saved = SavedSums(store, digest(made_from), device)
    about: dict[str, LayerCovariance] = {}
    means: Arrays = {}
    with torch.no_grad(), arithmetic(Precision.FP32):
        covariances = input_covariances(
            module, layers, block, spec=manifest.input, device=device, saved=saved
        )
        for layer in sorted(covariances):
            # The sums are fp64 and large: free each as soon as its mean is computed.
            covariance = covariances.pop(layer)
            mean = covariance.mean()
            output = mean_square_output(module.get_parameter(layer), mean, covariance.axis)
            about[layer] = LayerCovariance(covariance.axis, covariance.count, output)
            means[layer] = mean.float().cpu().numpy()
    header = CovarianceHeader(
        model=pointer.model_fingerprint,
        data=pointer.retain_data,
        rows=len(chosen_rows(block.rows)),
        layers=about,
        uncaptured=tuple(layer for layer in layers if layer not in about),
        version=slsgu_cli.__version__,
        prefixes=pointer.prefixes,
        revision=REVISION,
    )
    store.write_tensors(Artifact.COVARIANCE.path(saved.digest), means, header, keep_first=True)
    saved.remove()
