"""`retrieval`: the concept's images and name as queries to a new and to an old image index."""

import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.records.figures import Share
from slsgu_cli.records.verification import (
    Check,
    Retrieval,
    Retrieved,
    Settings,
    Shift,
    VerifiedModel,
)
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.verdicts import PARTLY_SHARE, VerdictRow

BY_IMAGE, BY_NAME = "its images", "its name"
NEW_INDEX, OLD_INDEX = "the model's own", "the original's"
OTHER_IMAGES = "other images"
# A feature that moved by more than this, as 1 - cosine, counts as far.
FAR = 0.01


def retrievals(original: VerifiedModel, other: VerifiedModel) -> tuple[Retrieval, Retrieval] | None:
    """Return the retrieval by the original and by the other model, if both are on record."""
    before, after = original.finding(Check.RETRIEVAL), other.finding(Check.RETRIEVAL)
    if not (before and after and before.retrieval and after.retrieval):
        return None
    return before.retrieval, after.retrieval


def sentence(
    original: VerifiedModel, other: VerifiedModel, _strongest: VerdictRow | None
) -> str | None:
    """Return whether an index of image features made before the edit is still valid."""
    pair = retrievals(original, other)
    if pair is None:
        return None
    before, after = pair
    if all(side.identical == side.rows for side in after.shifts):
        return "Image features equal the original's to the bit, so an image index stays valid."
    rows, far = (sum(getattr(side, of) for side in after.shifts) for of in ("rows", "far"))
    concept = after.shifts[0]
    moved = (
        f"{Share(far, rows).percent:.0f}% of image features moved by more than {FAR} "
        f"({Share(concept.far, concept.rows).percent:.0f}% of its own)"
    )
    old = [q.precision for q in after.queries if (q.query, q.index) == (BY_NAME, OLD_INDEX)]
    was = [q.precision for q in before.queries if (q.query, q.index) == (BY_NAME, NEW_INDEX)]
    if old and was and old[0] > PARTLY_SHARE * was[0]:
        return (
            f"{moved}. An index made before the edit still answers to its name (mean average "
            f"precision {old[0]:.0f}%, before {was[0]:.0f}%): rebuild it."
        )
    return f"{moved}: rebuild an index made before the edit."


def retrieval(model: ModelUnderTest, _settings: Settings) -> Retrieval:
    """Query a new and an old index with the concept's images and its name.

    An image is not in its own results. The name stands in each of the set's templates.
    """
    gallery = model.gallery()
    before = model.original().gallery() if model.original else gallery
    words = model.tokenize([template.replace("{}", model.name) for template in model.templates])
    size = gallery.concept_rows
    queries = {BY_IMAGE: gallery.features[:size], BY_NAME: model.text_features(words)}
    results = []
    for index, features in ((NEW_INDEX, gallery.features), (OLD_INDEX, before.features)):
        for query, vectors in queries.items():
            cosines = vectors @ features.T
            relevant = torch.zeros_like(cosines, dtype=torch.bool)
            relevant[:, :size] = True
            if query == BY_IMAGE:
                relevant.fill_diagonal_(False)
                cosines.fill_diagonal_(-torch.inf)
            if relevant.any():
                ranked = ranking_figures(cosines, relevant)
                results.append(Retrieved(query, index, *ranked, len(vectors), len(features)))
    shifts = [
        shift(images, before.features[part], gallery.features[part])
        for images, part in ((BY_IMAGE, slice(size)), (OTHER_IMAGES, slice(size, None)))
    ]
    return Retrieval(tuple(results), tuple(shifts))


SPEC = CheckSpec(
    run=retrieval,
    fills="retrieval",
    sentence=sentence,
)


def ranking_figures(cosines: Tensor, relevant: Tensor) -> tuple[float, float, float, float]:
    """Return mean average precision and recall at 1, 5 and 10, in percent.

    Both arguments are (queries, images), with at least one relevant image per query. Recall
    at k is the share of queries with a relevant image among the first k.
    """
    order = cosines.argsort(dim=1, descending=True, stable=True)
    hits = relevant.gather(1, order).double()
    places = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = (hits * hits.cumsum(dim=1) / places).sum(dim=1) / hits.sum(dim=1)
    recalls = [100 * float(hits[:, :k].amax(dim=1).mean()) for k in (1, 5, 10)]
    return 100 * float(precision.mean()), recalls[0], recalls[1], recalls[2]


def shift(images: str, before: Tensor, after: Tensor) -> Shift:
    """Return how far unit features (rows, width) moved."""
    same = (before == after).all(dim=1)
    cosines = F.cosine_similarity(before.double(), after.double(), dim=1)
    distances = torch.where(same, 0, (1 - cosines).clamp(min=0))
    return Shift(
        images,
        len(before),
        int(same.sum()),
        int((distances > FAR).sum()),
        float(distances.mean()),
        float(distances.max()),
    )
