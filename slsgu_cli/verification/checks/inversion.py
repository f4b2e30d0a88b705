"""`inversion`: one word learnt from images of the concept (textual inversion, arXiv 2208.01618).

The control learns words for made-up classes: retain images that have nothing in common. These
are tested on the images they were learnt from.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.clip.metrics import accuracies, ranks_of_truth
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.verification import IMAGES, MADE_UP, Attempt, Settings
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.training import Training
from slsgu_cli.verification.verdicts import attack_rows
from slsgu_cli.verification.words import FreePrompts, free_prompts, other_logits, recognition_loss

# Made-up classes, and the learning rate relative to the tokens' root mean square.
CLASSES, RATE = 4, 0.1
LEARNT = "<v>"


def inversion(model: ModelUnderTest, settings: Settings) -> list[Attempt]:
    """Learn one word from a few images of the concept, and one for each made-up class."""
    table, words = model.token_table(), model.free_words()
    prompts = free_prompts(model, model.templates, 1, words)
    generator = np.random.default_rng(settings.seed)
    shots = min(settings.shots, model.forget.rows, model.retain.rows)
    concept = _some_images(model, model.forget, 1, shots, generator)
    made_up = _some_images(model, model.retain, CLASSES, shots, generator)
    size = table[torch.tensor(list(words)).to(table.device)].square().mean().sqrt()
    images, rate = torch.cat([concept, made_up]), RATE * float(size)
    embeddings, losses = learn_words(prompts, images, steps=settings.inversion_steps, rate=rate)
    learnt = zip(made_up, embeddings[1:], strict=True)
    ranks = torch.cat([_ranks(model, group, embedding) for group, embedding in learnt])
    controls = Accuracy(*accuracies(ranks), len(ranks))
    return [
        Attempt(IMAGES, LEARNT, float(losses[0]), model.accuracy_with(embeddings[0])),
        Attempt(MADE_UP, LEARNT, float(losses[1:].mean()), controls),
    ]


SPEC = CheckSpec(
    run=inversion,
    fills="attempts",
    settings=("shots", "inversion_steps", "seed"),
    rows=attack_rows(IMAGES, MADE_UP, variant="a word from {shots} images", adds="its images add"),
    effort="learning a word ({})",
    control="images that have nothing in common",
)


def _some_images(
    model: ModelUnderTest, block: DataBlock, groups: int, size: int, generator: np.random.Generator
) -> Tensor:
    """Return features of up to `groups` random groups of images, (groups, size, E)."""
    groups = min(groups, block.rows // size)
    rows = generator.permutation(block.rows)[: groups * size]
    return model.image_features(block.take(rows)).view(groups, size, -1)


def _ranks(model: ModelUnderTest, images: Tensor, embedding: Tensor) -> Tensor:
    """Return the rank of a class in place of the concept's for each of its images."""
    logit = model.scale * images @ embedding.unsqueeze(1)
    logits = torch.cat([other_logits(model, images), logit], dim=1)
    last = torch.full((len(images),), logits.shape[1] - 1, device=images.device)
    return ranks_of_truth(logits, last)


def learn_words(
    prompts: FreePrompts, images: Tensor, *, steps: int, rate: float
) -> tuple[Tensor, Tensor]:
    """Learn the embedding of a word for each group of `images` (groups, images, E), by Adam.

    All start from the word in the prompts. Returns the class embeddings (groups, E) and the
    losses (groups,): the mean cross-entropy over the images of each group.
    """
    model = prompts.model
    tower, losses = model.evaluation.text, [recognition_loss(model, group) for group in images]
    tokens, groups = tower.trim(prompts.tokens).to(images.device), len(images)
    entering = tower.embed(tokens).detach()
    # A tower may append positions to the texts.
    is_free = torch.zeros(*entering.shape[:2], 1, device=images.device)
    is_free[torch.arange(len(tokens)), prompts.places[:, 0]] = 1
    shifts = entering.new_zeros(groups, 1, 1, entering.shape[2], requires_grad=True)

    def measured() -> tuple[Tensor, Tensor]:
        shifted = (entering + is_free * shifts).flatten(0, 1)
        features = tower.features(shifted, tokens.repeat(groups, 1), 0)
        means = F.normalize(features.view(groups, len(tokens), -1).sum(dim=1), dim=-1)
        each = [loss(mean.unsqueeze(0)) for loss, mean in zip(losses, means, strict=True)]
        return means, torch.cat(each)

    training = Training(torch.optim.Adam([shifts], lr=rate), steps, model.saved_state("a word"))
    while training.done < steps:
        with torch.enable_grad():
            (shifts.grad,) = torch.autograd.grad(measured()[1].sum(), shifts)
        training.optimizer.step()
        training.advance()
    training.remove()
    with torch.no_grad():
        return measured()
