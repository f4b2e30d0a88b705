"""`eval`: figures of the original and of another model, on one set or several."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, load_edit
from slsgu_cli.clip.evaluation import (
    Evaluation,
    EvaluationSet,
    SharedEvaluation,
    prepare,
    prepare_shared,
)
from slsgu_cli.clip.models import load, pick_device, resolve, tokenizer
from slsgu_cli.clip.zeroshot import cosine_matrix, moved
from slsgu_cli.figures.pictures import CosineMap, cosine_maps, cosine_plot
from slsgu_cli.method.gradients import check_inputs
from slsgu_cli.method.search import evaluation_digest, require_alike, require_distinct_names
from slsgu_cli.method.trial import UNMOVED, MovedModel
from slsgu_cli.records.method import Accuracy
from slsgu_cli.records.sets import ModelSpec, SetManifest
from slsgu_cli.store.artifacts import edit_path, joint_label, plot_path, read_manifest
from slsgu_cli.store.store import Store

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
    shown: ShownClasses | None = None
    found = []
    with torch.no_grad():
        for label, spec in {"original": manifest.model, str(model): model}.items():
            if spec is None:
                continue
            evaluation = _evaluation(store, manifest, spec, device)
            shown = shown or choose_shown(evaluation, manifest)
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
class ShownClasses:
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


def choose_shown(evaluation: Evaluation, manifest: SetManifest) -> ShownClasses:
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
    return ShownClasses(name, (own, *common), names, np.stack(pictures))


def _figures(evaluation: Evaluation, label: str, shown: ShownClasses) -> MeasuredModel:
    return MeasuredModel(
        label=label,
        forget=evaluation.forget.base_accuracy(),
        utility={name: own.base_accuracy() for name, own in evaluation.utility.items()},
        cosines=cosines(evaluation, shown),
    )


def cosines(evaluation: Evaluation, shown: ShownClasses) -> Matrix:
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


def _plot(found: list[MeasuredModel], shown: ShownClasses, manifest: SetManifest) -> bytes:
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


# As many names as the paper's Figure 8 has.
NAMES_BESIDE = 10

# Of concepts that leave no room for others, so many others all the same.
LEAST_OTHERS = 4


@dataclass(frozen=True, slots=True)
class SeveralClasses:
    """The images in a matrix: those of each concept, and of other classes of one set.

    `classes` has the class of each group of images, the concepts' first.
    """

    concepts: tuple[EvaluationSet, ...]
    others: EvaluationSet
    classes: tuple[int, ...]
    names: tuple[str, ...]
    thumbnails: npt.NDArray[np.uint8]

    def cosines(self, model: MovedModel) -> Matrix:
        """Return the mean cosine of each class's images with each name, (names, names)."""
        own = self.classes[: len(self.concepts)]
        features = [model.features(group.images) for group in self.concepts]
        owners = [torch.full((len(f),), place) for place, f in enumerate(features)]
        texts = [
            model.classes(group.prompts)[[index]]
            for group, index in zip(self.concepts, own, strict=True)
        ]
        position = {index: place for place, index in enumerate(self.classes) if place >= len(own)}
        labels = self.others.images.labels.tolist()
        features.append(model.features(self.others.images))
        owners.append(torch.tensor([position[label] for label in labels], dtype=torch.long))
        texts.append(model.classes(self.others.prompts)[list(self.classes[len(own) :])])
        images = torch.cat(features)
        places = torch.cat(owners).to(images.device)
        return cosine_matrix(images, places, torch.cat(texts)).cpu().numpy()


def choose_classes(shared: SharedEvaluation, manifests: Sequence[SetManifest]) -> SeveralClasses:
    """Show the concepts, and beside them the classes of one set with the most images.

    The set is the first that measures the forget accuracy of a concept, if there is one.
    """
    concepts = [shared.forget[manifest.name] for manifest in manifests]
    utility = shared.utility(manifests)
    known = [manifest.forget_eval for manifest in manifests if manifest.forget_eval in utility]
    group = utility[next(iter(known), None) or next(iter(utility))]
    labels = group.images.labels.cpu().numpy()
    counts = np.bincount(labels, minlength=len(group.names))
    room = max(NAMES_BESIDE - len(concepts), LEAST_OTHERS)
    common = [int(i) for i in np.argsort(-counts, kind="stable")[:room] if counts[i]]
    others = group.some(np.flatnonzero(np.isin(labels, common)))
    own = [int(each.images.labels[0]) for each in concepts]
    pictures = [each.images.block.take(each.images.rows[:1])[0] for each in concepts]
    for index in common:
        row = group.images.rows[np.flatnonzero(labels == index)[:1]]
        pictures.append(group.images.block.take(row)[0])
    names = [each.names[index] for each, index in zip(concepts, own, strict=True)]
    names += [group.names[index] for index in common]
    return SeveralClasses(
        tuple(concepts), others, (*own, *common), tuple(names), np.stack(pictures)
    )


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
    require_distinct_names(names)
    manifests = [read_manifest(store, name) for name in names]
    require_alike({manifest.name: evaluation_digest(manifest) for manifest in manifests})
    edits = [] if model is not None else [load_edit(store, name) for name in names]
    device = pick_device(device)
    with torch.no_grad():
        shared = _opened(store, manifests, manifests[0].model, device)
        shown = choose_classes(shared, manifests)
        found = [_figures_of_each(shared, manifests, "original", shown)]
        if model is not None:
            shared = _opened(store, manifests, model, device)
        with with_edits(shared.model, edits):
            if edits:
                shared.base_pass((), cache_bytes=0)
            label = str(model) if model is not None else "all edits"
            found.append(
                _figures_of_each(shared, manifests, label, choose_classes(shared, manifests))
            )
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


def _figures_of_each(
    shared: SharedEvaluation, manifests: Sequence[SetManifest], label: str, shown: SeveralClasses
) -> SeveralFigures:
    return SeveralFigures(
        label=label,
        forget=UNMOVED.accuracies(shared.forget),
        utility=UNMOVED.accuracies(shared.utility(manifests)),
        cosines=shown.cosines(UNMOVED),
    )
