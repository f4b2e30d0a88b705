"""Cosines of images and names for several forgotten concepts and the classes beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from slsgu_cli.evaluation import EvaluationSet, SharedEvaluation
from slsgu_cli.metrics import cosine_matrix
from slsgu_cli.records import SetManifest
from slsgu_cli.several.combined import Combined

# As many names as the paper's Figure 8 has.
NAMES_SHOWN = 10
# Of concepts that leave no room for others, so many others all the same.
LEAST_OTHERS = 4
Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Shown:
    """The images in a matrix: those of each concept, and of other classes of one set.

    `classes` has the class of each group of images, the concepts' first.
    """

    concepts: tuple[EvaluationSet, ...]
    others: EvaluationSet
    classes: tuple[int, ...]
    names: tuple[str, ...]
    thumbnails: npt.NDArray[np.uint8]

    def cosines(self, model: Combined) -> Matrix:
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


def choose(shared: SharedEvaluation, manifests: Sequence[SetManifest]) -> Shown:
    """Show the concepts, and beside them the classes of one set with the most images.

    The set is the first that measures the forget accuracy of a concept, if there is one.
    """
    concepts = [shared.forget[manifest.name] for manifest in manifests]
    utility = shared.utility(manifests)
    known = [manifest.forget_eval for manifest in manifests if manifest.forget_eval in utility]
    group = utility[next(iter(known), None) or next(iter(utility))]
    labels = group.images.labels.cpu().numpy()
    counts = np.bincount(labels, minlength=len(group.names))
    room = max(NAMES_SHOWN - len(concepts), LEAST_OTHERS)
    common = [int(i) for i in np.argsort(-counts, kind="stable")[:room] if counts[i]]
    others = group.some(np.flatnonzero(np.isin(labels, common)))
    own = [int(each.images.labels[0]) for each in concepts]
    pictures = [each.images.block.take(each.images.rows[:1])[0] for each in concepts]
    for index in common:
        row = group.images.rows[np.flatnonzero(labels == index)[:1]]
        pictures.append(group.images.block.take(row)[0])
    names = [each.names[index] for each, index in zip(concepts, own, strict=True)]
    names += [group.names[index] for index in common]
    return Shown(tuple(concepts), others, (*own, *common), tuple(names), np.stack(pictures))
