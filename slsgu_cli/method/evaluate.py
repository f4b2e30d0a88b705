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
from slsgu_cli.clip.evaluation import EvaluationSet, SharedEvaluation, prepare_shared
from slsgu_cli.clip.models import load, pick_device, resolve, tokenizer
from slsgu_cli.clip.zeroshot import cosine_matrix, moved
from slsgu_cli.figures.pictures import cosine_plot
from slsgu_cli.method.gradients import check_inputs
from slsgu_cli.method.search_plan import evaluation_digest, require_alike, require_distinct_names
from slsgu_cli.method.trial import UNMOVED, MovedModel
from slsgu_cli.records.method import Accuracy
from slsgu_cli.records.sets import ModelSpec, SetManifest
from slsgu_cli.store.artifacts import Artifact, joint_label, plot_path, read_manifest
from slsgu_cli.store.store import Store

# As many names as the paper's Figures 3 and 8 have.
NAMES_SHOWN = 10

# Of concepts that leave no room for others, so many others all the same.
LEAST_OTHERS = 4

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """The figures of one model.

    `forget` is the accuracy on each concept, by the name of its set; `utility` is without
    the images of any of them. `cosines` is mean image-to-name cosine, (names, names).
    """

    label: str
    forget: dict[str, Accuracy]
    utility: dict[str, Accuracy]
    cosines: Matrix


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The models that were measured on some sets, and where the cosine plot is."""

    names: tuple[str, ...]
    models: tuple[EvaluatedModel, ...]
    plot: str


def evaluate(
    store: Store, names: Sequence[str], *, model: ModelSpec | None, device: str
) -> EvalResult:
    """Measure the original model, and `model` or else the edits of all sets in place at once.

    A single set without an edit has its original measured alone. Raises MissingError,
    StaleError, UsageError, and InputError for sets that are not measured on the same rows.
    """
    require_distinct_names(names)
    manifests = [read_manifest(store, name) for name in names]
    require_alike({manifest.name: evaluation_digest(manifest) for manifest in manifests})
    edits: list[Edit] = []
    if model is None and (len(names) > 1 or store.exists(Artifact.EDIT.path(names[0]))):
        edits = [load_edit(store, name) for name in names]
    device = pick_device(device)
    with torch.no_grad():
        evaluation = _run_model(store, manifests, manifests[0].model, device)
        shown = choose_shown(evaluation, manifests)
        models = [_figures(evaluation, manifests, "original")]
        if model is not None:
            evaluation = _run_model(store, manifests, model, device)
            models.append(_figures(evaluation, manifests, str(model)))
        elif edits:
            label = "all edits" if len(names) > 1 else f"edit {names[0]}"
            with with_edits(evaluation.model, edits):
                evaluation.base_pass((), cache_bytes=0)
                models.append(_figures(evaluation, manifests, label))
    path = plot_path(joint_label(names) if len(names) > 1 else names[0], "cosines")
    plot = cosine_plot(
        models[0].cosines,
        models[1].cosines if len(models) > 1 else None,
        shown.names,
        forgotten=shown.names[: len(names)],
        thumbnails=shown.thumbnails,
    )
    store.write_bytes(path, plot)
    return EvalResult(tuple(names), tuple(models), store.where(path))


def _run_model(
    store: Store, manifests: Sequence[SetManifest], spec: ModelSpec, device: str
) -> SharedEvaluation:
    """Load a model and run it over what all sets measure on."""
    model = resolve(spec)
    for manifest in manifests:
        check_inputs(manifest, model)
    module = load(model, device, warn=progress.warn)
    evaluation = prepare_shared(store, manifests, module, tokenize=tokenizer(model), device=device)
    evaluation.base_pass((), cache_bytes=0)
    return evaluation


@contextmanager
def with_edits(model: nn.Module, edits: Sequence[Edit]) -> Iterator[None]:
    """Put edits into a model for the length of a block; those of one layer are summed."""
    moves = ((e.header.layer, torch.from_numpy(e.delta()), e.factor) for e in edits)
    with moved(model, moves):
        yield


@dataclass(frozen=True, slots=True)
class ShownClasses:
    """The classes whose images and names are compared: each concept, and others of one set.

    `classes` has the class of each group of images and `names` what it is called, the
    concepts' first; `thumbnails` has one image of each. Features are those of the base pass
    before the choice.
    """

    concepts: tuple[EvaluationSet, ...]
    others: EvaluationSet
    classes: tuple[int, ...]
    names: tuple[str, ...]
    thumbnails: npt.NDArray[np.uint8]

    @property
    def other_classes(self) -> tuple[int, ...]:
        """The classes beside the concepts, that of the most images first."""
        return self.classes[len(self.concepts) :]

    def rows_of_others(self, images: int) -> npt.NDArray[np.integer]:
        """Return the first rows of `others` that show each class, a class after another."""
        labels = self.others.images.labels.cpu().numpy()
        return np.concatenate([np.flatnonzero(labels == i)[:images] for i in self.other_classes])

    def cosines(self, model: MovedModel = UNMOVED) -> Matrix:
        """Return the mean cosine of each class's images with each name, (names, names)."""
        features, owners, texts = [], [], []
        for place, concept in enumerate(self.concepts):
            features.append(model.features(concept.images))
            owners.append(torch.full((len(concept.images),), place))
            texts.append(model.classes(concept.prompts)[[self.classes[place]]])
        places = {index: at for at, index in enumerate(self.other_classes, len(self.concepts))}
        labels = self.others.images.labels.tolist()
        features.append(model.features(self.others.images))
        owners.append(torch.tensor([places[label] for label in labels], dtype=torch.long))
        texts.append(model.classes(self.others.prompts)[list(self.other_classes)])
        images = torch.cat(features)
        labels_of_rows = torch.cat(owners).to(images.device)
        return cosine_matrix(images, labels_of_rows, torch.cat(texts)).cpu().numpy()


def choose_shown(evaluation: SharedEvaluation, manifests: Sequence[SetManifest]) -> ShownClasses:
    """Choose the concepts, and beside them the classes of one set with the most images.

    The set is the first that measures the forget accuracy of a concept, if there is one.
    """
    concepts = [evaluation.forget[manifest.name] for manifest in manifests]
    utility = evaluation.utility(manifests)
    measuring = [manifest.forget_eval for manifest in manifests if manifest.forget_eval in utility]
    group = utility[next(iter(measuring), None) or next(iter(utility))]
    labels = group.images.labels.cpu().numpy()
    counts = np.bincount(labels, minlength=len(group.names))
    room = max(NAMES_SHOWN - len(concepts), LEAST_OTHERS)
    common = [int(i) for i in np.argsort(-counts, kind="stable")[:room] if counts[i]]
    forgotten = [int(concept.images.labels[0]) for concept in concepts]
    pictures = [concept.images.block.take(concept.images.rows[:1])[0] for concept in concepts]
    for index in common:
        row = group.images.rows[np.flatnonzero(labels == index)[:1]]
        pictures.append(group.images.block.take(row)[0])
    names = [concept.names[i] for concept, i in zip(concepts, forgotten, strict=True)]
    return ShownClasses(
        concepts=tuple(concepts),
        others=group.some(np.flatnonzero(np.isin(labels, common))),
        classes=(*forgotten, *common),
        names=(*names, *(group.names[index] for index in common)),
        thumbnails=np.stack(pictures),
    )


def _figures(
    evaluation: SharedEvaluation, manifests: Sequence[SetManifest], label: str
) -> EvaluatedModel:
    """Return the figures of a model by its last base pass."""
    return EvaluatedModel(
        label=label,
        forget=UNMOVED.accuracies(evaluation.forget),
        utility=UNMOVED.accuracies(evaluation.utility(manifests)),
        cosines=choose_shown(evaluation, manifests).cosines(),
    )
