"""The classes whose images and names are compared with those of the concept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from slsgu_cli.clip.evaluation import EvaluationSet, SharedEvaluation
from slsgu_cli.clip.metrics import cosine_matrix
from slsgu_cli.engine.edited_model import UNEDITED, EditedModel
from slsgu_cli.figures.pictures import Images
from slsgu_cli.records.sets import SetManifest

# As many names as the paper's Figures 3 and 8 have.
NAMES_SHOWN = 10
# Other classes, at least, next to many concepts.
LEAST_OTHERS = 4

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ShownClasses:
    """The classes whose images and names are compared: each concept, and others of one set.

    `classes` are the indices of the concepts and then of the other classes, and `names` their
    names. Features are those of the base pass before the choice.
    """

    concepts: tuple[EvaluationSet, ...]
    others: EvaluationSet
    classes: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def other_classes(self) -> tuple[int, ...]:
        """The other classes, those with the most images first."""
        return self.classes[len(self.concepts) :]

    @property
    def has_images(self) -> bool:
        """Whether the classes have images, and not prompts."""
        return all(group.images.block.has_images for group in (*self.concepts, self.others))

    @property
    def thumbnails(self) -> Images:
        """One image of each class. Raises NoImagesError."""
        one = self.first(1)
        return np.concatenate([pixels_of(group) for group in (*one.concepts, one.others)])

    def first(self, images: int) -> "ShownClasses":
        """Return the first images of each class, one class after another."""
        labels = self.others.images.labels.cpu().numpy()
        rows = [np.flatnonzero(labels == index)[:images] for index in self.other_classes]
        concepts = tuple(first_images(concept, images) for concept in self.concepts)
        return replace(self, concepts=concepts, others=self.others.some(np.concatenate(rows)))

    def cosines(self, model: EditedModel = UNEDITED) -> Matrix:
        """Return the mean cosine of each class's images with each name, (names, names)."""
        count, others = len(self.concepts), list(self.other_classes)
        labels = self.others.images.labels
        places = torch.zeros(len(self.others.names), dtype=torch.long, device=labels.device)
        places[others] = torch.arange(count, count + len(others), device=labels.device)
        owners = [torch.full_like(c.images.labels, at) for at, c in enumerate(self.concepts)]
        concepts = zip(self.concepts, self.classes, strict=False)
        texts = [model.classes(concept.prompts)[[label]] for concept, label in concepts]
        features = [model.features(group.images) for group in (*self.concepts, self.others)]
        return (
            cosine_matrix(
                torch.cat(features),
                torch.cat([*owners, places[labels]]),
                torch.cat([*texts, model.classes(self.others.prompts)[others]]),
            )
            .cpu()
            .numpy()
        )


def choose_shown(evaluation: SharedEvaluation, manifests: Sequence[SetManifest]) -> ShownClasses:
    """Choose the concepts, and the classes of one set with the most images.

    The set is the first that has a concept as a class, or else the first of all.
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
    names = [concept.names[i] for concept, i in zip(concepts, forgotten, strict=True)]
    return ShownClasses(
        concepts=tuple(concepts),
        others=group.some(np.flatnonzero(np.isin(labels, common))),
        classes=(*forgotten, *common),
        names=(*names, *(group.names[index] for index in common)),
    )


def first_images(group: EvaluationSet, images: int) -> EvaluationSet:
    """Return an evaluation set with the first images only."""
    return group.some(np.arange(min(images, len(group.images))))


def pixels_of(group: EvaluationSet) -> Images:
    """Return the images of an evaluation set, uint8 (rows, H, W, 3)."""
    return group.images.block.take(group.images.rows)
