"""The statistics of layers on a retain set: in the store, or computed when missing.

They are addressed by the model and the retain rows, so concepts that share both share them.
Missing ones are computed in one pass over the retain set, for all layers at once.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
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
from slsgu_cli.records.directions import FALLBACK, DirectionSpec, Statistic, needed
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
    from torch import Tensor

    from slsgu_cli.method.directions import InputCovariance, LayerStatistics

# Part of every address: change it with the computation. Layers that an earlier revision could not
# capture are tried again. Revision 2 of inputs added all convolutions, norms, channel scales and
# fused attention.
REVISIONS = {Statistic.INPUTS: 2, Statistic.DERIVATIVES: 1}

WORDS = {
    Statistic.INPUTS: ("the covariances of their inputs", "one forward"),
    Statistic.DERIVATIVES: ("the derivatives of features at their outputs", "one backward"),
}

# Most layers that a note names.
NAMED = 3

Places = dict[str, tuple[str, LayerCovariance]]


@dataclass(frozen=True, slots=True)
class Covariances:
    """The statistics in the store of one model's layers over one set of retain rows.

    Linear systems with them are solved on `device`.
    """

    store: Store
    places: dict[Statistic, Places] = field(default_factory=dict)
    uncaptured: dict[Statistic, frozenset[str]] = field(default_factory=dict)
    device: str = "cpu"

    def has(self, layer: str, needs: Iterable[Statistic]) -> bool:
        """Return whether the store has some statistics of a layer."""
        return all(Layer.parse(layer).parameter in self.places[kind] for kind in needs)

    def able(self, layer: str, directions: Collection[DirectionSpec]) -> list[DirectionSpec]:
        """Return the directions that a layer can move in, or the fallback if they have one."""
        able = [each for each in directions if self.has(layer, each.needs)]
        falls_back = any(each.entry.falls_back for each in directions)
        return able or ([FALLBACK] if falls_back else [])

    def missing(self, layers: Iterable[str], kind: Statistic) -> list[str]:
        """Return the parameters of layers whose statistic still has to be tried."""
        wanted = {Layer.parse(layer).parameter for layer in layers}
        return sorted(wanted - set(self.places[kind]) - self.uncaptured[kind])

    def statistics(
        self,
        layer: str,
        direction: DirectionSpec,
        *,
        weight_norm: float = 1.0,
        weight: Floats | None = None,
    ) -> "LayerStatistics":
        """Return what a direction needs to know of a layer, on the device for solving.

        A query, key or value slice has the inputs of the whole parameter. `weight` has the values
        of such a slice, whose mean squared output is not stored.
        """
        from slsgu_cli.method.directions import LayerStatistics

        return LayerStatistics(
            weight_norm,
            self.inputs(layer, weight) if Statistic.INPUTS in direction.needs else None,
            self.derivatives(layer) if Statistic.DERIVATIVES in direction.needs else None,
        )

    def inputs(self, layer: str, weight: Floats | None = None) -> "InputCovariance":
        """Return the input covariance of a layer; `weight` has the values of a slice."""
        import torch

        from slsgu_cli.method.directions import InputCovariance
        from slsgu_cli.method.directions.whitened import mean_square_output

        covariance, about = self._read(layer, Statistic.INPUTS)
        output = about.output
        if weight is not None:
            slice_values = torch.tensor(weight, device=covariance.device)
            output = mean_square_output(slice_values, covariance, about.axis)
        return InputCovariance(covariance, about.axis, output)

    def derivatives(self, layer: str) -> "Tensor":
        """Return the second moment of the features' derivatives at the outputs of a layer."""
        return self._read(layer, Statistic.DERIVATIVES)[0]

    def _read(self, layer: str, kind: Statistic) -> "tuple[Tensor, LayerCovariance]":
        """Return the matrix of a layer's parameter, and what is known of it."""
        import torch

        from slsgu_cli.engine.covariance import exact_device

        name = Layer.parse(layer).parameter
        path, about = self.places[kind][name]
        values = torch.from_numpy(self.store.read_tensors(path, [name])[name])
        return values.to(exact_device(self.device)), about


def find_covariances(store: Store, pointer: GradientPointer, device: str = "cpu") -> Covariances:
    """Return the statistics in the store of the model and retain rows of `pointer`.

    All ranks return those that rank 0 finds.
    """
    return Covariances(store, *processes.from_first(lambda: _places(store, pointer)), device)


def _places(
    store: Store, pointer: GradientPointer
) -> tuple[dict[Statistic, Places], dict[Statistic, frozenset[str]]]:
    """Return the file and record of each layer's statistics, and the layers without them."""
    places: dict[Statistic, Places] = {kind: {} for kind in Statistic}
    uncaptured = dict.fromkeys(Statistic, frozenset[str]())
    for name in store.names("covariances", ".safetensors"):
        path = Artifact.COVARIANCE.path(name)
        try:
            header = store.read_header(path, CovarianceHeader)
        except SlsguError:
            # Damaged, or removed since it was listed: compute it again. `ls` reports it.
            continue
        kind = header.statistic
        if header.is_of(pointer):
            places[kind] |= {layer: (path, about) for layer, about in header.layers.items()}
            if header.revision == REVISIONS[kind]:
                uncaptured[kind] |= set(header.uncaptured)
    return places, uncaptured


def ensure_covariances(
    store: Store,
    manifest: SetManifest,
    pointer: GradientPointer,
    layers: Sequence[str],
    *,
    needs: Collection[Statistic],
    device: str,
) -> Covariances:
    """Return the statistics of `layers` that are needed, computing those that the store lacks.

    The result lacks layers that cannot be captured. Raises StaleError if the model is not the one
    the gradients belong to.
    """
    if not needs:
        return Covariances(store)
    device = pick_device(device)
    known = find_covariances(store, pointer, device)
    for kind in needs:
        if not known.missing(layers, kind):
            continue
        place, (noun, cost) = Artifact.COVARIANCE.path(pointer.retain), WORDS[kind]
        with held(store, place, what=f"covariances of the retain set of {manifest.name}"):
            # Another process may have computed some while this one waited.
            known = find_covariances(store, pointer, device)
            if missing := known.missing(layers, kind):
                progress.note(f"{len(missing)} layers lack {noun}: {cost} over the retain set")
                _compute(store, manifest, pointer, missing, kind, device=device)
                known = find_covariances(store, pointer, device)
    return known


def warn_of_fallback(
    covariances: Covariances,
    layers: Sequence[str],
    directions: Collection[DirectionSpec],
    *,
    how: str,
    out: str,
) -> None:
    """Note which layers follow their gradient instead, `how` they are used, and the way out."""
    needs = needed(each.kind for each in directions if each.entry.falls_back)
    if without := [layer for layer in layers if not covariances.has(layer, needs)]:
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
    kind: Statistic,
    *,
    device: str,
) -> None:
    """Run the towers of `layers` over the retain set and store a statistic of these."""
    import torch

    from slsgu_cli.engine.covariance import chosen_rows, layer_sums
    from slsgu_cli.engine.gradient_pass import arithmetic
    from slsgu_cli.method.directions.whitened import mean_square_output

    model, module = load_graded(pointer, device)
    block = open_pairs(store, manifest, "retain", pointer.prefixes, model, again=1)
    made_from: dict[str, Any] = {
        "revision": REVISIONS[kind],
        "model": pointer.model_fingerprint,
        "data": pointer.retain_data,
        "input": manifest.input,
        "layers": sorted(layers),
    }
    if kind is not Statistic.INPUTS:
        made_from |= {"statistic": kind}
    if pointer.prefixes:
        made_from |= {"prefixes": list(pointer.prefixes)}
    saved = SavedSums(store, digest(made_from), device)
    about: dict[str, LayerCovariance] = {}
    means: Arrays = {}
    with torch.no_grad(), arithmetic(Precision.FP32):
        covariances = layer_sums(
            kind, module, layers, block, spec=manifest.input, device=device, saved=saved
        )
        for layer in sorted(covariances):
            # The sums are fp64 and large: free each as soon as its mean is computed.
            covariance = covariances.pop(layer)
            mean = covariance.mean()
            output = 0.0
            if kind is Statistic.INPUTS:
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
        revision=REVISIONS[kind],
        statistic=kind,
    )
    store.write_tensors(Artifact.COVARIANCE.path(saved.digest), means, header, keep_first=True)
    saved.remove()
