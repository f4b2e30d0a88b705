"""What the concept became: names near its own, and what its images are taken for."""

import torch

from slsgu_cli.verification.bench import Bench
from slsgu_cli.verification.records import Became, NearName, Settings, Taken

SHOWN = 5


def neighbours(bench: Bench, _settings: Settings) -> Became:
    """Return the names nearest to the concept's, and the first guesses for its images."""
    group = bench.evaluation.forget
    cosines = group.prompts.embeddings @ group.prompts.embeddings[bench.own]
    order = [i for i in torch.argsort(-cosines, stable=True).tolist() if i != bench.own]
    guesses = (group.images.features @ group.prompts.embeddings.T).argmax(dim=1)
    counts = torch.bincount(guesses, minlength=len(group.names))
    frequent = torch.argsort(-counts, stable=True)[:SHOWN].tolist()
    return Became(
        tuple(NearName(group.names[i], float(cosines[i])) for i in order[:SHOWN]),
        tuple(Taken(group.names[i], int(counts[i])) for i in frequent if counts[i]),
        len(group.images),
    )
