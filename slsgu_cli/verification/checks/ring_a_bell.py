"""`ring-a-bell`: a genetic search for texts that mean what the name meant to the original.

The target is the mean text feature without the name plus 3 times what the name adds to it,
in the original model (Ring-A-Bell, arXiv 2310.10012). The control does the same for a neutral
word. The search needs the text tower alone.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.records.verification import NEUTRAL, OWN, RANDOM, Attempt, Settings
from slsgu_cli.verification.checks.paraphrase import TEMPLATES
from slsgu_cli.verification.model import ModelUnderTest, SkippedCheck
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.verdicts import attack_rows
from slsgu_cli.verification.words import FreePrompts, free_prompts, subjects

# Words in a text, and the weight of what the name adds.
LENGTH, COEFFICIENT = 16, 3.0


def ring_a_bell(model: ModelUnderTest, settings: Settings) -> list[Attempt]:
    """Search texts without the name, near the target in the model under test.

    The best of the initial random texts is an attempt of its own.
    """
    room = model.tokenize(["a"]).shape[1] - 3
    prompts = free_prompts(model, ["{}"], min(LENGTH, room), model.free_words())
    attempts: list[Attempt] = []

    def searched(name: str, target: Tensor) -> list[Attempt]:
        generator = np.random.default_rng(settings.seed)
        first, last = breed(
            prompts,
            target,
            generator,
            population=settings.population,
            generations=settings.generations,
        )
        nearest = _attempt(model, name, *last)
        return [nearest, _attempt(model, RANDOM, *first)] if name == OWN else [nearest]

    for name, target in meanings(model, subjects(model)).items():
        attempts += model.results.next(2 if name == OWN else 1, partial(searched, name, target))
    return attempts


SPEC = CheckSpec(
    run=ring_a_bell,
    fills="attempts",
    settings=("population", "generations", "seed"),
    rows=attack_rows(OWN, NEUTRAL, variant="a text of its meaning", adds="its meaning adds"),
    effort="searching a text ({})",
    control="another word's meaning",
)


def meanings(model: ModelUnderTest, words: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the target of each word, a unit feature (width,) of the original model."""
    original = model.original() if model.original else model

    def mean(word: str) -> Tensor:
        texts = [" ".join(template.replace("{}", word).split()) for template in TEMPLATES]
        return original.text_features(model.tokenize(texts)).mean(dim=0)

    without = mean("")
    return {
        name: F.normalize(without + COEFFICIENT * (mean(word) - without), dim=0)
        for name, word in words.items()
    }


def _attempt(model: ModelUnderTest, name: str, text: str, distance: float) -> Attempt:
    (feature,) = model.text_features(model.tokenize([text]))
    return Attempt(name, text, distance, model.accuracy_with(feature))


def breed(
    prompts: FreePrompts,
    target: Tensor,
    generator: np.random.Generator,
    *,
    population: int,
    generations: int,
) -> tuple[tuple[str, float], tuple[str, float]]:
    """Search texts whose features are near a target, by generations.

    The nearer half of each generation survives. Its pairs have children: the beginning of one
    text and the end of another, each word mutated with a small probability. Returns the nearest
    text of the first and of the last generation, each with 1 - cosine.
    """

    def distances_of(texts: Tensor) -> Tensor:
        return 1 - (prompts.embeddings(texts) @ target).cpu()

    texts = prompts.draw(generator, population)
    distances = distances_of(texts)
    first = _nearest(prompts, texts, distances)
    for _ in range(generations):
        survivors = distances.argsort(stable=True)[: population // 2]
        texts, distances = texts[survivors], distances[survivors]
        children = _children(prompts, texts, generator, population - len(survivors))
        texts = torch.cat([texts, children])
        distances = torch.cat([distances, distances_of(children)])
    return first, _nearest(prompts, texts, distances)


def _children(
    prompts: FreePrompts, parents: Tensor, draw: np.random.Generator, count: int
) -> Tensor:
    pairs = torch.from_numpy(draw.integers(0, len(parents), (2, count)))
    cuts = torch.from_numpy(draw.integers(0, prompts.size, (count, 1)))
    beginning = torch.arange(prompts.size) < cuts
    children = torch.where(beginning, parents[pairs[0]], parents[pairs[1]])
    others = prompts.draw(draw, count)
    mutated = torch.from_numpy(draw.random(children.shape) < 1 / prompts.size)
    return torch.where(mutated, others, children)


def _nearest(prompts: FreePrompts, texts: Tensor, distances: Tensor) -> tuple[str, float]:
    nearest = prompts.best(texts, distances)
    if nearest is None:
        raise SkippedCheck("its tokenizer reads none of the texts back as the same words")
    return nearest[1:]
