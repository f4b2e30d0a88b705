"""What `slsgu eval` does: the built sets' figures for the original and one other model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slsgu_cli import progress
from slsgu_cli.edits import Edit, load_edit
from slsgu_cli.evaluation import Evaluation, prepare
from slsgu_cli.gradients import check_inputs
from slsgu_cli.layout import edit_path, plot_path, read_manifest
from slsgu_cli.metrics import cosine_matrix
from slsgu_cli.models import load, pick_device, resolve, tokenizer
from slsgu_cli.plots import cosine_plot
from slsgu_cli.records import Accuracy, ModelSpec, SetManifest
from slsgu_cli.store import Store
from slsgu_cli.zeroshot import moved

# As many names as the paper's Figure 3 has.
NAMES_SHOWN = 10
Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """The figures of one model. `cosines` is mean image-to-name cosine, (names, names)."""

    label: str
    forget: Accuracy
    utility: dict[str, Accuracy]
    cosines: Matrix


@dataclass(frozen=True, slots=True)
class Measured:
    """The models that were measured, and where the cosine plot is."""

    models: tuple[MeasuredModel, ...]
    plot: str


def measure(store: Store, name: str, *, model: ModelSpec | None, device: str) -> Measured:
    """Measure the original model, and `model` or else the set's own edit."""
    manifest = read_manifest(store, name)
    device = pick_device(device)
    edit = load_edit(store, name) if model is None and store.exists(edit_path(name)) else None
    shown: Shown | None = None
    found = []
    with torch.no_grad():
        for label, spec in {"original": manifest.model, str(model): model}.items():
            if spec is None:
                continue
            evaluation = _evaluation(store, manifest, spec, device)
            shown = shown or choose(evaluation, manifest)
            found.append(_figures(evaluation, label, shown))
            if edit is not None:
                with with_edits(evaluation.model, [edit]):
                    evaluation.base_pass((), cache_bytes=0)
                    found.append(_figures(evaluation, f"edit {name}", shown))
    path = plot_path(name, "cosines")
    if shown is not None:
        store.write_bytes(path, _plot(found, shown, manifest))
    return Measured(tuple(found), store.where(path))


@dataclass(frozen=True, slots=True)
class Shown:
    """The classes whose cosines are shown, the evaluation set they are from, a picture of each."""

    evaluation: str
    classes: tuple[int, ...]
    names: tuple[str, ...]
    thumbnails: npt.NDArray[np.uint8]


def _evaluation(store: Store, manifest: SetManifest, spec: ModelSpec, device: str) -> Evaluation:
    model = resolve(spec)
    check_inputs(manifest, model)
    module = load(model, device, warn=progress.warn)
    evaluation = prepare(store, manifest, module, tokenize=tokenizer(model), device=device)
    evaluation.base_pass((), cache_bytes=0)
    return evaluation


def choose(evaluation: Evaluation, manifest: SetManifest) -> Shown:
    """Choose the concept and the classes with the most images beside it."""
    name = manifest.forget_eval or ""
    if name not in evaluation.utility:
        name = sorted(evaluation.utility)[0]
    group, forget = evaluation.utility[name], evaluation.forget
    counts = np.bincount(group.images.labels.cpu().numpy(), minlength=len(group.names))
    common = [int(i) for i in np.argsort(-counts, kind="stable")[: NAMES_SHOWN - 1] if counts[i]]
    own = int(forget.images.labels[0])
    pictures = [forget.images.block.take(forget.images.rows[:1])[0]]
    labels = group.images.labels.cpu().numpy()
    for index in common:
        row = group.images.rows[int(np.flatnonzero(labels == index)[0])]
        pictures.append(group.images.block.take(np.array([row]))[0])
    names = (forget.names[own], *(group.names[i] for i in common))
    return Shown(name, (own, *common), names, np.stack(pictures))


def _figures(evaluation: Evaluation, label: str, shown: Shown) -> MeasuredModel:
    return MeasuredModel(
        label=label,
        forget=evaluation.forget.base_accuracy(),
        utility={name: own.base_accuracy() for name, own in evaluation.utility.items()},
        cosines=cosines(evaluation, shown),
    )


def cosines(evaluation: Evaluation, shown: Shown) -> Matrix:
    """Return the mean cosine of each shown class's images with each shown name."""
    group, forget = evaluation.utility[shown.evaluation], evaluation.forget
    position = {index: place for place, index in enumerate(shown.classes[1:], start=1)}
    labels = group.images.labels
    keep = torch.isin(labels, torch.tensor(shown.classes[1:], device=labels.device))
    features = torch.cat([forget.images.features, group.images.features[keep]])
    places = [position[int(index)] for index in labels[keep]]
    owners = torch.tensor([0] * len(forget.images) + places, device=labels.device)
    texts = torch.cat(
        [
            forget.prompts.embeddings[shown.classes[:1], :],
            group.prompts.embeddings[list(shown.classes[1:]), :],
        ]
    )
    return cosine_matrix(features, owners, texts).cpu().numpy()


def _plot(found: list[MeasuredModel], shown: Shown, manifest: SetManifest) -> bytes:
    after = found[1].cosines if len(found) > 1 else None
    return cosine_plot(
        found[0].cosines,
        after,
        shown.names,
        forgotten=[shown.names[0]],
        thumbnails=shown.thumbnails,
    )


@contextmanager
def with_edits(model: nn.Module, edits: Sequence[Edit]) -> Iterator[None]:
    """Put edits into a model for the length of a block; those of one layer are summed."""
    moves = ((e.header.layer, torch.from_numpy(e.delta()), e.factor) for e in edits)
    with moved(model, moves):
        yield
