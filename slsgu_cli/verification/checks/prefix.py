"""`prefix`: a search for words before the name by which the model recognises the concept.

Such a search also finds words that work without the name, in any model. The control is the
same search before a neutral word; what counts is the difference.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.records.verification import (
    NEUTRAL,
    OWN,
    Attempt,
    Check,
    Settings,
    VerifiedModel,
)
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.verdicts import READABLE, VerdictRow, attack_rows
from slsgu_cli.verification.words import FreePrompts, Loss, free_prompts, recognition_loss, subjects

# How many of the set's templates and images of the forget set a search uses.
PROMPTS, IMAGES = 8, 128
# How many words per place are candidates, and how many replacements to try per step.
CANDIDATES, REPLACEMENTS = 256, 64

CONTROL = "another word in its place"
rows = attack_rows(OWN, NEUTRAL, variant="{attack_tokens} words before it", adds="the name adds")


def sentence(
    original: VerifiedModel, other: VerifiedModel, strongest: VerdictRow | None
) -> str | None:
    """Return what the search finds, if another check brings back more."""
    before, after = original.finding(Check.PREFIX), other.finding(Check.PREFIX)
    row = next(rows(before, after), None) if before and after else None
    if row is None or strongest in (None, row) or row.after.top1 < READABLE or not row.control:
        return None
    return (
        f"A word search with access to the weights finds it too: {row.variant}, "
        f"{row.after.top1:.0f}%, against {row.control.top1:.0f}% for {CONTROL}; the name adds "
        f"{row.added}."
    )


def prefix(model: ModelUnderTest, settings: Settings) -> list[Attempt]:
    """Search words before the name, and before a neutral word, from random starts.

    Both searches start from the same words.
    """
    words, table, block = model.free_words(), model.token_table(), model.forget
    drawn = np.random.default_rng(settings.seed).permutation(block.rows)[:IMAGES]
    loss = recognition_loss(model, model.image_features(block.take(np.sort(drawn))))
    some = model.templates[:: -(-len(model.templates) // PROMPTS)]
    attempts: list[Attempt] = []

    def searched(start: int, name: str, word: str, prompts: FreePrompts) -> list[Attempt]:
        generator = np.random.default_rng((settings.seed, start))
        search = WordSearch(prompts, table, loss, generator)
        text, value, tried = search.run(settings.attack_steps)
        (embedding,) = model.classes((f"{text} {word}",), model.templates)
        accuracy = model.accuracy_with(embedding)
        return [Attempt(name, f"{text} {word}", value, accuracy, tried)]

    for name, word in subjects(model).items():
        texts = [template.replace("{}", f"{{}} {word}") for template in some]
        prompts = free_prompts(model, texts, settings.attack_tokens, words)
        for start in range(settings.attack_starts):
            attempts += model.results.next(1, partial(searched, start, name, word, prompts))
    return attempts


SPEC = CheckSpec(
    run=prefix,
    fills="attempts",
    settings=("attack_tokens", "attack_steps", "attack_starts", "seed"),
    revision=2,
    rows=rows,
    effort="searching words ({})",
    control=CONTROL,
    sentence=sentence,
)


@dataclass(frozen=True, slots=True)
class WordSearch:
    """Greedy coordinate search of the free words (as in GCG, arXiv 2307.15043).

    Each step replaces one word. The gradient of the loss in the words' embeddings selects
    candidates for each place. Random replacements among them are evaluated, and the search
    continues from the best of these, even if it is worse than before.
    """

    prompts: FreePrompts
    table: Tensor
    loss: Loss
    generator: np.random.Generator

    def run(self, steps: int) -> tuple[str, float, tuple[str, ...]]:
        """Return the best text, its loss, and the texts of all steps without repetition."""
        (ids,) = self.prompts.draw(self.generator, 1)
        best = self.prompts.text_of(ids), float(self.losses(ids.unsqueeze(0))[0])
        tried = []
        for _ in range(steps):
            ids, text, loss = self._step(ids)
            tried.append(text)
            if loss < best[1]:
                best = text, loss
        return *best, tuple(dict.fromkeys(tried))

    def losses(self, ids: Tensor) -> Tensor:
        """Return the loss of each row of words (n, free words)."""
        return self.loss(self.prompts.embeddings(ids)).cpu()

    def gradient(self, ids: Tensor) -> Tensor:
        """Return the gradient of the loss in each free word's embedding, (words, width).

        Its product with a row of the token table is the gradient in that word's one-hot code.
        """
        tower = self.prompts.model.evaluation.text
        tokens = tower.trim(self.prompts.filled(ids.unsqueeze(0))[0]).to(self.table.device)
        with torch.enable_grad():
            entering = tower.embed(tokens).detach().requires_grad_()
            features = tower.features(entering, tokens, 0)
            loss = self.loss(F.normalize(features.sum(dim=0, keepdim=True), dim=-1)).sum()
            (gradient,) = torch.autograd.grad(loss, entering)
        rows = torch.arange(len(tokens)).unsqueeze(1)
        return gradient[rows, self.prompts.places].sum(dim=0)

    def _step(self, ids: Tensor) -> tuple[Tensor, str, float]:
        """Return the best of some replacements of one word, its text and its loss."""
        vocabulary = torch.tensor(list(self.prompts.words))
        decrease = -self.gradient(ids) @ self.table[vocabulary.to(self.table.device)].T
        candidates = decrease.topk(min(CANDIDATES, len(vocabulary)), dim=1).indices.cpu()
        places = torch.from_numpy(self.generator.integers(0, len(ids), REPLACEMENTS))
        choices = torch.from_numpy(self.generator.integers(0, candidates.shape[1], REPLACEMENTS))
        tried = ids.repeat(REPLACEMENTS, 1)
        tried[torch.arange(REPLACEMENTS), places] = vocabulary[candidates[places, choices]]
        best = self.prompts.best(tried, self.losses(tried))
        return best or (ids, self.prompts.text_of(ids), float("inf"))
