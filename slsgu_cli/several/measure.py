"""What `slsgu eval A B ...` does: the figures of several concepts, before and after."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slsgu_cli import progress
from slsgu_cli.edits import load_edit
from slsgu_cli.evaluation import SharedEvaluation, prepare_shared
from slsgu_cli.gradients import check_inputs
from slsgu_cli.layout import joint_label, plot_path, read_manifest
from slsgu_cli.measure import with_edits
from slsgu_cli.models import load, pick_device, resolve, tokenizer
from slsgu_cli.pictures import CosineMap, cosine_maps
from slsgu_cli.records import Accuracy, ModelSpec, SetManifest
from slsgu_cli.several.combined import UNMOVED
from slsgu_cli.several.matrices import Matrix, Shown, choose
from slsgu_cli.several.searches import measured_on, require_alike, require_distinct
from slsgu_cli.store import Store


@dataclass(frozen=True, slots=True)
class SeveralFigures:
    """The figures of one model: forget accuracy by set, utility without any of the concepts."""

    label: str
    forget: dict[str, Accuracy]
    utility: dict[str, Accuracy]
    cosines: Matrix


@dataclass(frozen=True, slots=True)
class SeveralMeasured:
    """The models that were measured, and where the cosine plot is."""

    names: tuple[str, ...]
    models: tuple[SeveralFigures, ...]
    plot: str


def measure_several(
    store: Store, names: Sequence[str], *, model: ModelSpec | None, device: str
) -> SeveralMeasured:
    """Measure the original model, and `model` or else the edits of all sets in place at once.

    Raises MissingError, StaleError, UsageError, and InputError for sets that are not
    measured on the same rows.
    """
    require_distinct(names)
    manifests = [read_manifest(store, name) for name in names]
    require_alike({manifest.name: measured_on(manifest) for manifest in manifests})
    edits = [] if model is not None else [load_edit(store, name) for name in names]
    device = pick_device(device)
    with torch.no_grad():
        shared = _opened(store, manifests, manifests[0].model, device)
        shown = choose(shared, manifests)
        found = [_figures(shared, manifests, "original", shown)]
        if model is not None:
            shared = _opened(store, manifests, model, device)
        with with_edits(shared.model, edits):
            if edits:
                shared.base_pass((), cache_bytes=0)
            label = str(model) if model is not None else "all edits"
            found.append(_figures(shared, manifests, label, choose(shared, manifests)))
    path = plot_path(joint_label(names), "cosines")
    forgotten = shown.names[: len(names)]
    maps = [
        CosineMap(title, each.cosines, forgotten)
        for title, each in zip(("before", "after"), found, strict=True)
    ]
    store.write_bytes(path, cosine_maps(maps, shown.names, thumbnails=shown.thumbnails))
    return SeveralMeasured(tuple(names), tuple(found), store.where(path))


def _opened(
    store: Store, manifests: Sequence[SetManifest], spec: ModelSpec, device: str
) -> SharedEvaluation:
    model = resolve(spec)
    for manifest in manifests:
        check_inputs(manifest, model)
    module = load(model, device, warn=progress.warn)
    shared = prepare_shared(store, manifests, module, tokenize=tokenizer(model), device=device)
    shared.base_pass((), cache_bytes=0)
    return shared


def _figures(
    shared: SharedEvaluation, manifests: Sequence[SetManifest], label: str, shown: Shown
) -> SeveralFigures:
    return SeveralFigures(
        label=label,
        forget=UNMOVED.accuracies(shared.forget),
        utility=UNMOVED.accuracies(shared.utility(manifests)),
        cosines=shown.cosines(UNMOVED),
    )
