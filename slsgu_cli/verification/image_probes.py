"""Checks by images: changed ones, what features still tell apart, and what an index finds."""

import io
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from slsgu_cli.records.verification import (
    Check,
    Moved,
    ProbeFigures,
    Retrieval,
    Retrieved,
    Settings,
    Told,
    VerifiedModel,
)
from slsgu_cli.sources.matching import matcher
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.verification.model import Gallery, ModelUnderTest

Images = npt.NDArray[np.uint8]
Change = Callable[[Image.Image, np.random.Generator], Image.Image]
CROP = (0.7, 0.9)
DEGREES = 20.0
STRENGTH = 0.4
HUE = 16
BLUR = 0.015
JPEG_QUALITY = 30


def changed(images: Images, kind: str, *, seed: int) -> Images:
    """Return images (N, H, W, 3) each changed in the way called `kind`.

    What is drawn for an image depends on the seed, the kind and its place alone.
    """
    change, number = CHANGES[kind], list(CHANGES).index(kind)
    out = np.empty_like(images)
    for row, pixels in enumerate(images):
        generator = np.random.default_rng((seed, number, row))
        out[row] = np.asarray(change(Image.fromarray(pixels), generator))
    return out


def augment(model: ModelUnderTest, settings: Settings) -> list[ProbeFigures]:
    """Measure forget accuracy on the concept's images after each kind of change."""
    group = model.evaluation.forget
    images = group.images.block.take(group.images.rows)
    probes = []
    for kind in CHANGES:
        features = model.image_features(changed(images, kind, seed=settings.seed))
        forget = model.forget_accuracy(group.prompts.embeddings, features)
        probes.append(ProbeFigures(kind, forget))
    return probes


def _flip(image: Image.Image, _generator: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(image)


def _crop(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Cut out 70 to 90% of each side, somewhere, and scale it up."""
    share = generator.uniform(*CROP)
    width, height = (max(1, round(share * side)) for side in image.size)
    left = int(generator.integers(0, image.width - width + 1))
    top = int(generator.integers(0, image.height - height + 1))
    part = image.crop((left, top, left + width, top + height))
    return part.resize(image.size, Image.Resampling.BICUBIC)


def _colour(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation by up to 40%, and the hue a little."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(generator.uniform(1 - STRENGTH, 1 + STRENGTH))
    hue, *rest = image.convert("HSV").split()
    turn = int(generator.integers(-HUE, HUE + 1))
    turned = Image.fromarray((np.asarray(hue).astype(int) + turn).astype(np.uint8))
    return Image.merge("HSV", (turned, *rest)).convert("RGB")


def _rotation(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Turn by up to 20 degrees; what comes into view has the mean colour of the corners."""
    pixels = np.asarray(image)
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=0)
    fill = tuple(int(round(value)) for value in corners)
    angle = generator.uniform(-DEGREES, DEGREES)
    return image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=fill)


def _blur(image: Image.Image, _generator: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR * min(image.size)))


def _jpeg(image: Image.Image, _generator: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Image.open(buffer).convert("RGB")


CHANGES: dict[str, Change] = {
    "flip": _flip,
    "crop": _crop,
    "colour": _colour,
    "rotation": _rotation,
    "blur": _blur,
    "jpeg": _jpeg,
}


LINEAR, NEIGHBOURS = "linear probe", "nearest neighbours"
CONCEPT, FEWER, OTHERS = "the concept", "the concept, from as few", "other classes"

# At most so many images of a side train a classifier, and so many neighbours of a side count.
MOST_IMAGES, NEIGHBOURS_LOOKED_AT = 1000, 5

# So many other classes show what a classifier gets for any, each by half of its images.
CONTROLS, FEWEST_IMAGES = 5, 4

# Of the images that do not show the concept, the share that may be taken for it.
FALSE_POSITIVES = 0.01
UPDATES, SLOPE = 500, 1e-8

Rows = npt.NDArray[np.integer]
Classifier = Callable[[Tensor, Tensor, Tensor], Tensor]


def probe(model: ModelUnderTest, settings: Settings) -> list[Told]:
    """Train classifiers on image features to tell the concept's images from others.

    They learn from the forget set and the retain set and are tried on the evaluation images.
    As a control, they learn other classes about as frequent as the concept from half of
    their evaluation images, and the concept from as few.
    """
    gallery = model.gallery()
    shown, hidden = _concept_images(model, gallery, settings)
    rows = _drawn(model.retain.rows, MOST_IMAGES, settings)
    others, rest = _features(model, model.retain, rows), gallery.features[gallery.own :]
    classes = list(_controls(gallery, settings))
    few = min([len(shown), *(len(learnt) for _, learnt, _ in classes)])
    told = []
    for name, classifier in CLASSIFIERS.items():
        told.append(tried(classifier, shown, others, hidden, rest, (name, CONCEPT)))
        if classes:
            told.append(tried(classifier, shown[:few], others, hidden, rest, (name, FEWER)))
        each = []
        for place, learnt, kept in classes:
            about = matcher([gallery.names[place]])
            unlike = np.array([not about(model.retain.captions[row]) for row in rows])
            against = others[torch.from_numpy(unlike).to(others.device)]
            elsewhere = rest[gallery.labels[gallery.own :] != place]
            sides = gallery.features[learnt[:few]], against, gallery.features[kept], elsewhere
            each.append(tried(classifier, *sides, (name, OTHERS)))
        told += [_mean(each)] if each else []
    model.tick()
    return told


def _concept_images(
    model: ModelUnderTest, gallery: Gallery, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return features of the concept's images to learn from and to be tried on.

    Where no evaluation set shows the concept, half of the forget set is for either.
    """
    if model.manifest.forget_eval is not None:
        rows = _drawn(model.forget.rows, MOST_IMAGES, settings)
        return _features(model, model.forget, rows), gallery.features[: gallery.own]
    order = _shuffled(gallery.own, settings)
    half = (gallery.own + 1) // 2
    return gallery.features[order[:half]], gallery.features[order[half:]]


def _controls(gallery: Gallery, settings: Settings) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield classes with the places of the images to learn from and of those to be tried on.

    Those that have most nearly as many images as the concept, of equals by seed.
    """
    counts = torch.bincount(gallery.labels[gallery.own :], minlength=len(gallery.names)).tolist()
    order = [int(place) for place in _shuffled(len(counts), settings)]
    enough = [place for place in order if counts[place] >= 2 * FEWEST_IMAGES]
    for place in sorted(enough, key=lambda place: abs(counts[place] - gallery.own))[:CONTROLS]:
        images = (gallery.labels == place).nonzero().squeeze(1)
        images = images[_shuffled(len(images), settings)]
        half = len(images) // 2
        yield place, images[:half], images[half:]


def _shuffled(count: int, settings: Settings) -> Tensor:
    return torch.from_numpy(np.random.default_rng(settings.seed).permutation(count))


def _drawn(count: int, most: int, settings: Settings) -> Rows:
    """Return up to `most` of so many rows, in an order drawn by seed."""
    return np.random.default_rng(settings.seed).permutation(count)[:most]


def _features(model: ModelUnderTest, block: DataBlock, rows: Rows) -> Tensor:
    """Return the features of some rows in their order, read in that of the block."""
    features = model.image_features(block.take(np.sort(rows)))
    return features[torch.from_numpy(np.argsort(np.argsort(rows))).to(features.device)]


def tried(
    classifier: Classifier,
    own: Tensor,
    others: Tensor,
    own_tried: Tensor,
    others_tried: Tensor,
    called: tuple[str, str],
) -> Told:
    """Train a classifier on features of two sides and try it on others of them.

    Its threshold for accuracy is 0; for recall, what at most one in a hundred of the others
    lies above.
    """
    tests = torch.cat([own_tried, others_tried])
    scores = classifier(own.double().cpu(), others.double().cpu(), tests.double().cpu())
    found, against = scores[: len(own_tried)], scores[len(own_tried) :]
    right = (found > 0).double().mean() + (against <= 0).double().mean()
    return Told(
        *called,
        len(own),
        50 * float(right),
        100 * float((found > threshold(against)).double().mean()),
        len(found),
        len(against),
    )


def threshold(others: Tensor) -> Tensor:
    """Return the least score that at most one in a hundred of `others` lies above."""
    return others.sort(descending=True).values[int(FALSE_POSITIVES * len(others))]


def _mean(each: list[Told]) -> Told:
    """Return the mean of several classes, of how many images in all, among how many at least."""
    return Told(
        each[0].classifier,
        each[0].subject,
        each[0].images,
        sum(told.accuracy for told in each) / len(each),
        sum(told.recall for told in each) / len(each),
        sum(told.rows for told in each),
        min(told.others for told in each),
    )


def linear_probe(own: Tensor, others: Tensor, tests: Tensor) -> Tensor:
    """Return the logits of a logistic regression; features (rows, width) in fp64.

    Each dimension is brought to mean 0 and deviation 1. Minimises |w|^2 / 2 plus the sum of
    the log losses, in which both sides weigh the same, as scikit-learn does with
    class_weight="balanced"; by L-BFGS over all rows, from zeros.
    """
    train = torch.cat([own, others])
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1)
    inputs = (train - mean) / deviation
    sign = torch.ones(len(train), dtype=train.dtype)
    sign[len(own) :] = -1
    weight = torch.full_like(sign, len(train) / (2 * len(own)))
    weight[len(own) :] = len(train) / (2 * len(others))
    unknown = torch.zeros(train.shape[1] + 1, dtype=train.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [unknown],
        max_iter=UPDATES,
        tolerance_grad=SLOPE,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        logits = inputs @ unknown[:-1] + unknown[-1]
        value = unknown[:-1].square().sum() / 2 - (weight * F.logsigmoid(sign * logits)).sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    found = unknown.detach()
    return (tests - mean) / deviation @ found[:-1] + found[-1]


def neighbour_scores(own: Tensor, others: Tensor, tests: Tensor) -> Tensor:
    """Return the mean cosine with the nearest images of the concept less that with others.

    Features are unit vectors; the five nearest of either side count, or as many as there are.
    """
    sides = []
    for side in (own, others):
        count = min(NEIGHBOURS_LOOKED_AT, len(side))
        sides.append((tests @ side.T).topk(count, dim=1).values.mean(dim=1))
    return sides[0] - sides[1]


CLASSIFIERS: dict[str, Classifier] = {LINEAR: linear_probe, NEIGHBOURS: neighbour_scores}


def pairs_of(original: VerifiedModel, other: VerifiedModel) -> list[tuple[Told, Told]]:
    """Return what each classifier on image features tells of the original and of the other."""
    before, after = original.finding(Check.PROBE), other.finding(Check.PROBE)
    known = {(told.classifier, told.subject): told for told in before.told} if before else {}
    return [
        (known[told.classifier, told.subject], told)
        for told in (after.told if after else ())
        if (told.classifier, told.subject) in known
    ]


BY_IMAGE, BY_NAME = "its images", "its name"
OWN_INDEX, OLD_INDEX = "the model's own", "the original's"
OTHER_IMAGES = "other images"
# A cosine by which a feature that moved is said to be elsewhere.
FAR = 0.01


def retrieval(model: ModelUnderTest, _settings: Settings) -> Retrieval:
    """Look for the concept's images by each other and by its name, in a new and in an old index.

    An image is not looked for by itself. The name stands in each of the set's templates.
    """
    gallery, before = model.gallery(), model.original_gallery()
    name = model.names[model.concept_class]
    words = model.tokenize([template.replace("{}", name) for template in model.templates])
    by = {BY_IMAGE: gallery.features[: gallery.own], BY_NAME: model.text_features(words)}
    found = []
    for index, features in ((OWN_INDEX, gallery.features), (OLD_INDEX, before.features)):
        for query, vectors in by.items():
            cosines = vectors @ features.T
            relevant = torch.zeros_like(cosines, dtype=torch.bool)
            relevant[:, : gallery.own] = True
            if query == BY_IMAGE:
                relevant.fill_diagonal_(False)
                cosines.fill_diagonal_(-torch.inf)
            if relevant.any():
                ranked = ranking_figures(cosines, relevant)
                found.append(Retrieved(query, index, *ranked, len(vectors), len(features)))
    model.tick()
    sides = {BY_IMAGE: slice(None, gallery.own), OTHER_IMAGES: slice(gallery.own, None)}
    moves = [
        moved(images, before.features[part], gallery.features[part])
        for images, part in sides.items()
    ]
    return Retrieval(tuple(found), tuple(moves))


def ranking_figures(cosines: Tensor, relevant: Tensor) -> tuple[float, float, float, float]:
    """Return mean average precision and how many queries have a hit in 1, 5, 10, in percent.

    Both are (queries, images), of at least one relevant image for each query. Average
    precision is the mean, over the relevant images, of the share of relevant ones up to each.
    """
    order = cosines.argsort(dim=1, descending=True, stable=True)
    hits = relevant.gather(1, order).double()
    places = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = (hits * hits.cumsum(dim=1) / places).sum(dim=1) / hits.sum(dim=1)
    shares = [100 * float(hits[:, :k].amax(dim=1).mean()) for k in (1, 5, 10)]
    return 100 * float(precision.mean()), shares[0], shares[1], shares[2]


def moved(images: str, before: Tensor, after: Tensor) -> Moved:
    """Return how far unit features (rows, width) lie from what they were."""
    same = (before == after).all(dim=1)
    cosines = F.cosine_similarity(before.double(), after.double(), dim=1)
    distances = torch.where(same, 0, (1 - cosines).clamp(min=0))
    return Moved(
        images,
        len(before),
        int(same.sum()),
        int((distances > FAR).sum()),
        float(distances.mean()),
        float(distances.max()),
    )


def retrievals(original: VerifiedModel, other: VerifiedModel) -> tuple[Retrieval, Retrieval] | None:
    """Return what is found by the original and by the other model, if both were tried."""
    before, after = original.finding(Check.RETRIEVAL), other.finding(Check.RETRIEVAL)
    if not (before and after and before.retrieval and after.retrieval):
        return None
    return before.retrieval, after.retrieval
