"""`neighbours`: the names nearest to the forgotten one, and the guesses for its images."""

import torch

from slsgu_cli.records.verification import Guess, NearName, Neighbourhood, Settings
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec

SHOWN = 5


def neighbours(model: ModelUnderTest, _settings: Settings) -> Neighbourhood:
    """Return the nearest names and the most frequent first guesses."""
    group = model.evaluation.forget
    cosines = group.prompts.embeddings @ model.concept_embedding
    order = [i for i in torch.argsort(-cosines, stable=True).tolist() if i != model.concept_class]
    guesses = (group.images.features @ group.prompts.embeddings.T).argmax(dim=1)
    counts = torch.bincount(guesses, minlength=len(group.names))
    frequent = torch.argsort(-counts, stable=True)[:SHOWN].tolist()
    return Neighbourhood(
        tuple(NearName(group.names[i], float(cosines[i])) for i in order[:SHOWN]),
        tuple(Guess(group.names[i], int(counts[i])) for i in frequent if counts[i]),
        len(group.images),
    )


SPEC = CheckSpec(run=neighbours, fills="neighbourhood")
