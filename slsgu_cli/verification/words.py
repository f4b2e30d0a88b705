"""Prompts with free words, and the loss by which word searches and inversion choose them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.clip.batches import to_tokens
from slsgu_cli.records.verification import NEUTRAL, OWN
from slsgu_cli.verification.model import ModelUnderTest, SkippedCheck, Words

NEUTRAL_WORDS = ("thing", "item", "stuff")
Loss = Callable[[Tensor], Tensor]


def subjects(model: ModelUnderTest) -> dict[str, str]:
    """Return the concept's name, and a neutral word for the control."""
    names = set(model.names)
    neutral = next((word for word in NEUTRAL_WORDS if word not in names), NEUTRAL_WORDS[0])
    return {OWN: model.name, NEUTRAL: neutral}


@dataclass(frozen=True, slots=True)
class FreePrompts:
    """Prompts with a sequence of free words, each one of `words`.

    `texts` have `{}` in their place, which is `places` (prompts, free words) in `tokens`
    (prompts, length).
    """

    model: ModelUnderTest
    words: Words
    texts: tuple[str, ...]
    tokens: Tensor
    places: Tensor

    @property
    def size(self) -> int:
        """The number of free words."""
        return self.places.shape[1]

    def draw(self, generator: np.random.Generator, rows: int) -> Tensor:
        """Return random words, uniform with replacement, (rows, free words)."""
        vocabulary = torch.tensor(list(self.words))
        drawn = generator.integers(0, len(vocabulary), (rows, self.size))
        return vocabulary[torch.from_numpy(drawn)]

    def text_of(self, ids: Tensor) -> str:
        """Return the text of words (free words,)."""
        return " ".join(self.words[number] for number in ids.tolist())

    def filled(self, ids: Tensor) -> Tensor:
        """Return the prompts with each row of `ids` (n, free words): (n, prompts, length)."""
        rows = self.tokens.repeat(len(ids), 1, 1)
        words = ids.unsqueeze(1).expand(-1, len(self.tokens), -1)
        return rows.scatter_(2, self.places.expand(len(ids), -1, -1), words)

    def embeddings(self, ids: Tensor) -> Tensor:
        """Return the class embeddings with each row of `ids` (n, free words), (n, width)."""
        rows = self.filled(ids)
        features = self.model.text_features(rows.flatten(0, 1).numpy())
        return F.normalize(features.view(*rows.shape[:2], -1).sum(dim=1), dim=-1)

    def reads_back(self, ids: Tensor, text: str) -> bool:
        """Return whether the prompts with `text` have the tokens `ids` (free words,)."""
        tokens = self.model.tokenize([prompt.replace("{}", text) for prompt in self.texts])
        return bool((to_tokens(tokens, "cpu") == self.filled(ids.unsqueeze(0))[0]).all())

    def best(self, rows: Tensor, losses: Tensor) -> tuple[Tensor, str, float] | None:
        """Return the words of the lowest loss that the tokenizer reads back, text and loss."""
        for index in losses.argsort(stable=True).tolist():
            text = self.text_of(rows[index])
            if self.reads_back(rows[index], text):
                return rows[index], text, float(losses[index])
        return None


def free_prompts(
    model: ModelUnderTest, texts: Sequence[str], size: int, words: Words
) -> FreePrompts:
    """Put `size` free words in place of `{}`. Raises SkippedCheck if no text has room."""
    used = {*model.tokenize([text.replace("{}", "") for text in texts]).flatten().tolist()}
    fillers = [number for number in words if number not in used][:size]
    filling = " ".join(words[number] for number in fillers)
    prompts = [text.replace("{}", filling) for text in texts]
    tokens = to_tokens(model.tokenize(prompts), "cpu")
    longer = to_tokens(
        model.tokenize([f"{prompt} {words[fillers[0]]}" for prompt in prompts]), "cpu"
    )
    if size >= tokens.shape[1]:
        raise SkippedCheck(
            f"its texts have {tokens.shape[1]} tokens, and {size} words are too many"
        )
    here = (tokens.unfold(1, size, 1) == torch.tensor(fillers)).all(dim=2)
    # Adding a word does not change a prompt that fills the context.
    usable = (here.sum(dim=1) == 1) & (tokens != longer).any(dim=1)
    if not usable.any():
        raise SkippedCheck(f"no prompt of its {tokens.shape[1]} tokens has room for {size} words")
    places = here[usable].int().argmax(dim=1, keepdim=True) + torch.arange(size)
    fitting = tuple(text for text, whole in zip(texts, usable.tolist(), strict=True) if whole)
    return FreePrompts(model, words, fitting, tokens[usable], places)


def recognition_loss(model: ModelUnderTest, images: Tensor) -> Loss:
    """Return the loss (n,) of class embeddings (n, width) of the concept on its `images`.

    It is the mean cross-entropy among all classes: log(1 + exp(rest - s)), with s an image's
    logit by the embedding and rest the log-sum-exp of its other logits.
    """
    rest = other_logits(model, images).logsumexp(dim=1, keepdim=True)
    return lambda embeddings: F.softplus(rest - model.scale * images @ embeddings.T).mean(dim=0)


def other_logits(model: ModelUnderTest, images: Tensor) -> Tensor:
    """Return the logits of images (n, width) for all classes except the concept's."""
    embeddings = model.evaluation.forget.prompts.embeddings
    others = torch.arange(len(embeddings), device=embeddings.device) != model.concept_class
    return model.scale * images @ embeddings[others].T
