"""`probe`: classifiers on image features that look for the concept, a linear probe first."""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slsgu_cli.records.verification import Check, ClassifierScore, Settings, VerifiedModel
from slsgu_cli.sources.matching import matcher
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.verification.model import Gallery, ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.verdicts import FORGOTTEN_SHARE, PARTLY_SHARE, READABLE, VerdictRow

LINEAR, NEIGHBOURS = "linear probe", "nearest neighbours"
CONCEPT, FEWER, OTHERS = "the concept", "the concept, from as few", "other classes"

# The most images of a side to train on, and how many neighbours of a side count.
MOST_IMAGES, NEAREST = 1000, 5

# How many other classes serve as controls, and the fewest images to train on.
CONTROLS, FEWEST_IMAGES = 5, 4

FALSE_POSITIVE_RATE = 0.01
TOLERANCE, ITERATIONS = 1e-8, 1000

Rows = npt.NDArray[np.integer]
Classifier = Callable[[Tensor, Tensor, Tensor], Tensor]


def score_pairs(
    original: VerifiedModel, other: VerifiedModel
) -> list[tuple[ClassifierScore, ClassifierScore]]:
    """Return the scores of each classifier on the original and on the other model."""
    before, after = original.finding(Check.PROBE), other.finding(Check.PROBE)
    if before is None or after is None:
        return []
    return list(zip(before.classifiers, after.classifiers, strict=True))


def sentence(
    original: VerifiedModel, other: VerifiedModel, _strongest: VerdictRow | None
) -> str | None:
    """Return whether a linear probe still finds the concept's images."""
    pairs = score_pairs(original, other)
    linear = {now.subject: (was, now) for was, now in pairs if now.classifier == LINEAR}
    if CONCEPT not in linear:
        return None
    was, now = linear[CONCEPT]
    others = f"; other classes: {linear[OTHERS][1].recall:.0f}%" if OTHERS in linear else ""
    finds = f"{now.recall:.0f}% of its images (original: {was.recall:.0f}%{others})"
    if was.recall < READABLE:
        return f"A linear probe on image features finds {finds}, which says nothing."
    share = now.recall / was.recall
    if share > PARTLY_SHARE:
        return (
            f"A linear probe on image features still finds {finds}: the edit unlinked the name "
            "from the look, but the look remains in the image tower."
        )
    rest = "part" if share > FORGOTTEN_SHARE else "little"
    return (
        f"A linear probe on image features finds {finds}: {rest} of the look remains in the "
        "image tower."
    )


def probe(model: ModelUnderTest, settings: Settings) -> list[ClassifierScore]:
    """Train classifiers on image features to separate the concept's images from others.

    They train on the forget and the retain set, and are tested on the evaluation images. As
    controls, they train on other classes of similar frequency, with half of their evaluation
    images, and on the concept with equally few.
    """
    gallery = model.gallery()
    first_other = gallery.concept_rows
    concept, concept_tests = _concept_images(model, gallery, settings)
    rows = _permuted(model.retain.rows, settings)[:MOST_IMAGES]
    others, other_tests = _features(model, model.retain, rows), gallery.features[first_other:]
    classes = list(_controls(gallery, settings))
    few = min([len(concept), *(len(train) for _, train, _ in classes)])
    scores = []
    for name, classifier in CLASSIFIERS.items():
        sides = others, concept_tests, other_tests
        scores.append(scored(classifier, concept, *sides, labels=(name, CONCEPT)))
        if not classes:
            continue
        scores.append(scored(classifier, concept[:few], *sides, labels=(name, FEWER)))
        controls = []
        for place, train, tests in classes:
            shows_class = matcher([gallery.names[place]])
            unlike = [not shows_class(model.retain.captions[row]) for row in rows]
            sides = (
                others[torch.tensor(unlike, device=others.device)],
                gallery.features[tests],
                other_tests[gallery.labels[first_other:] != place],
            )
            features = gallery.features[train[:few]]
            controls.append(scored(classifier, features, *sides, labels=(name, OTHERS)))
        scores.append(_mean(controls))
    return scores


SPEC = CheckSpec(
    run=probe,
    fills="classifiers",
    settings=("seed",),
    revision=2,
    needs_sklearn=True,
    sentence=sentence,
)


def _concept_images(
    model: ModelUnderTest, gallery: Gallery, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return features of the concept's images to train and to test on.

    If no evaluation set shows the concept, both are halves of the forget set.
    """
    if model.manifest.forget_eval is not None:
        rows = _permuted(model.forget.rows, settings)[:MOST_IMAGES]
        return _features(model, model.forget, rows), gallery.features[: gallery.concept_rows]
    order = torch.from_numpy(_permuted(gallery.concept_rows, settings))
    half = (gallery.concept_rows + 1) // 2
    return gallery.features[order[:half]], gallery.features[order[half:]]


def _controls(gallery: Gallery, settings: Settings) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield classes, each with the rows of its images to train and to test on.

    They are the classes whose number of images is closest to the concept's; ties by seed.
    """
    size = gallery.concept_rows
    counts = torch.bincount(gallery.labels[size:], minlength=len(gallery.names)).tolist()
    order = [int(place) for place in _permuted(len(counts), settings)]
    enough = [place for place in order if counts[place] >= 2 * FEWEST_IMAGES]
    for place in sorted(enough, key=lambda place: abs(counts[place] - size))[:CONTROLS]:
        images = (gallery.labels == place).nonzero().squeeze(1)
        images = images[torch.from_numpy(_permuted(len(images), settings))]
        half = len(images) // 2
        yield place, images[:half], images[half:]


def _permuted(count: int, settings: Settings) -> Rows:
    return np.random.default_rng(settings.seed).permutation(count)


def _features(model: ModelUnderTest, block: DataBlock, rows: Rows) -> Tensor:
    """Return the features of rows in their order; the block is read in its own."""
    features = model.image_features(block.take(np.sort(rows)))
    return features[torch.from_numpy(np.argsort(np.argsort(rows))).to(features.device)]


def scored(
    classifier: Classifier,
    concept: Tensor,
    others: Tensor,
    concept_tests: Tensor,
    other_tests: Tensor,
    *,
    labels: tuple[str, str],
) -> ClassifierScore:
    """Train a classifier on features of two sides and score it on test features.

    Accuracy has the threshold 0, recall that of a false positive rate of 1%. `labels` name
    the classifier and its subject.
    """
    tests = torch.cat([concept_tests, other_tests])
    scores = classifier(concept.double().cpu(), others.double().cpu(), tests.double().cpu())
    positive, negative = scores[: len(concept_tests)], scores[len(concept_tests) :]
    right = (positive > 0).double().mean() + (negative <= 0).double().mean()
    return ClassifierScore(
        *labels,
        len(concept),
        50 * float(right),
        100 * float((positive > threshold(negative)).double().mean()),
        len(positive),
        len(negative),
    )


def threshold(scores: Tensor) -> Tensor:
    """Return the lowest of `scores` that at most 1% of them exceed."""
    return scores.sort(descending=True).values[int(FALSE_POSITIVE_RATE * len(scores))]


def _mean(scores: list[ClassifierScore]) -> ClassifierScore:
    """Return the mean over classes, with their total of rows and the smallest other side."""
    return ClassifierScore(
        scores[0].classifier,
        scores[0].subject,
        scores[0].images,
        sum(score.accuracy for score in scores) / len(scores),
        sum(score.recall for score in scores) / len(scores),
        sum(score.rows for score in scores),
        min(score.others for score in scores),
    )


def linear_probe(concept: Tensor, others: Tensor, tests: Tensor) -> Tensor:
    """Return the logits of a balanced logistic regression on standardised features, fp64."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(class_weight="balanced", tol=TOLERANCE, max_iter=ITERATIONS)
    classifier = make_pipeline(StandardScaler(), regression)
    truth = [1] * len(concept) + [0] * len(others)
    classifier.fit(torch.cat([concept, others]).numpy(), truth)
    return torch.from_numpy(classifier.decision_function(tests.numpy()))


def neighbour_scores(concept: Tensor, others: Tensor, tests: Tensor) -> Tensor:
    """Return the mean cosine with the nearest images of the concept minus that with others.

    Features are unit vectors. Up to five nearest images of each side count.
    """
    sides = []
    for side in (concept, others):
        count = min(NEAREST, len(side))
        sides.append((tests @ side.T).topk(count, dim=1).values.mean(dim=1))
    return sides[0] - sides[1]


CLASSIFIERS: dict[str, Classifier] = {LINEAR: linear_probe, NEIGHBOURS: neighbour_scores}
