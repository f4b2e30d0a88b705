"""A model under test with the data of its set: measured as it is, or with other weights."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli.clip.activations import CacheBudget
from slsgu_cli.clip.batches import (
    IMAGES_PER_FORWARD,
    pixel_normalizer,
    spans,
    text_features,
    to_tokens,
)
from slsgu_cli.clip.evaluation import Evaluation, EvaluationSet, prepare, prompt_side
from slsgu_cli.clip.models import ResolvedModel
from slsgu_cli.clip.tokenizers import Tokenize, token_words, tokenizer
from slsgu_cli.clip.towers import EMBED
from slsgu_cli.clip.zeroshot import PromptSide
from slsgu_cli.engine.resumable import SavedSums
from slsgu_cli.engine.text_structure import embedded, prompts_without
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.verification import Settings
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

Utility = dict[str, Accuracy]
Words = Mapping[int, str]
T = TypeVar("T")
# Shorter words may be part of another word by chance.
SHORT = 3


class SkippedCheck(Exception):
    """Raised by a check that cannot run on a model; the text says why."""


@dataclass(slots=True)
class PartialResults:
    """The results of a check so far, and how to save them.

    A check computes its results in the same order every time. They are independent.
    """

    results: list[Any]
    save: Callable[[Sequence[Any]], None] = lambda _: None
    _position: int = field(init=False, default=0)

    def next(self, count: int, compute: Callable[[], Sequence[T]]) -> list[T]:
        """Return the next `count` results: saved ones, or else computed now."""
        start, self._position = self._position, self._position + count
        if len(self.results) < self._position:
            self.results[start:] = compute()
            self.save(self.results)
        return self.results[start : self._position]


@dataclass(frozen=True, slots=True)
class Gallery:
    """Image features (rows, width) of all evaluation images, the `concept_rows` first.

    `labels` are indices into the sorted `names` of the other classes; the concept has -1.
    """

    features: Tensor
    labels: Tensor
    names: tuple[str, ...]
    concept_rows: int


@dataclass(slots=True)
class ModelUnderTest:
    """One model, the data it is measured on, and the rows it may be trained on.

    `evaluation` has the features of the model as it is, and utility sets with few rows;
    `whole` has all rows. `templates` are those that name the concept in the set. `original`
    returns the original model, None if this is it. `results` has the partial results of the
    current check, and `saved_state` returns the saved state of a training by its name (None
    to save nothing).
    """

    manifest: SetManifest
    evaluation: Evaluation
    whole: dict[str, EvaluationSet]
    forget: DataBlock
    retain: DataBlock
    templates: tuple[str, ...]
    resolved: ResolvedModel
    tokenize: Tokenize
    device: str
    original: "Callable[[], ModelUnderTest] | None"
    results: PartialResults = field(default_factory=lambda: PartialResults([]))
    saved_state: Callable[[str], SavedSums | None] = lambda _: None
    _gallery: Gallery | None = field(init=False, default=None)
    _neutral: PromptSide | None = field(init=False, default=None)

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self.evaluation.model

    @property
    def scale(self) -> Tensor:
        """The scale of the cosines, exp(logit_scale)."""
        value: Any = self.module.logit_scale
        return torch.as_tensor(value.reshape(()).exp())

    @property
    def names(self) -> tuple[str, ...]:
        """The classes among which the concept's images are recognised."""
        return self.evaluation.forget.names

    @property
    def concept_class(self) -> int:
        """The index of the concept in `names`."""
        return int(self.evaluation.forget.images.labels[0])

    @property
    def name(self) -> str:
        """The class name of the concept."""
        return self.names[self.concept_class]

    def renamed(self, name: str) -> tuple[str, ...]:
        """Return the classes with another name for the concept."""
        return (*self.names[: self.concept_class], name, *self.names[self.concept_class + 1 :])

    @property
    def concept_embedding(self) -> Tensor:
        """The class embedding of the concept's name, (width,), by the model as it is."""
        return self.evaluation.forget.prompts.embeddings[self.concept_class]

    def groups(self) -> dict[str, EvaluationSet]:
        """Return the evaluation sets with the features of all images by the model as it is.

        The first call computes the features of images that utility is not measured on.
        """
        for group in self.whole.values():
            if not hasattr(group.images, "features"):
                for _ in group.images.base_pass({}, CacheBudget(0)):
                    pass
        return self.whole

    def gallery(self) -> Gallery:
        """Return the features of all evaluation images by the model as it is."""
        if self._gallery is None:
            concept, groups = self.evaluation.forget.images, self.groups().values()
            names = tuple(sorted({name for group in groups for name in group.names}))
            places = {name: place for place, name in enumerate(names)}
            labels = [torch.full((len(concept),), -1, device=concept.labels.device)]
            for group in groups:
                of_set = torch.tensor([places[name] for name in group.names])
                labels.append(of_set.to(concept.labels.device)[group.images.labels])
            features = torch.cat([concept.features, *(group.images.features for group in groups)])
            self._gallery = Gallery(features, torch.cat(labels), names, len(concept))
        return self._gallery

    def neutral_prompts(self) -> PromptSide:
        """Return the neutral prompts with their embeddings by the model as it is."""
        if self._neutral is None:
            self._neutral = embedded(
                self.evaluation.text,
                prompts_without([self.manifest]),
                tokenize=self.tokenize,
                device=self.device,
            )
        return self._neutral

    def free_words(self) -> Words:
        """Return the words that a search may use, by token; each is one token.

        Words that contain a part of the name, or that a part of it contains, are excluded:
        they would be the name again. Raises SkippedCheck if no word remains.
        """
        parts = re.findall(r"\w+", self.name.lower())
        tokens = set(self.tokenize([self.name])[0].tolist())

        def is_of_name(word: str) -> bool:
            return any(
                part == word
                or (min(len(part), len(word)) >= SHORT and (part in word or word in part))
                for part in parts
            )

        words = {
            token: word
            for token, word in token_words(self.resolved).items()
            if token not in tokens and not is_of_name(word)
        }
        if not words:
            raise SkippedCheck("its tokenizer does not show which words are one token")
        return words

    def token_table(self) -> Tensor:
        """Return the embeddings of the tokens, (vocabulary, width). Raises SkippedCheck."""
        table = self.evaluation.text.token_table
        if table is None:
            raise SkippedCheck("its text tower does not show the embeddings of tokens")
        return table.detach()

    def classes(self, names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        """Return class embeddings with the current weights, (classes, width)."""
        side = prompt_side(
            self.evaluation.text, names, templates, tokenize=self.tokenize, device=self.device
        )
        return side.after_edit(EMBED)

    def accuracy_now(self, group: EvaluationSet) -> Accuracy:
        """Return the accuracy on an evaluation set with the current weights."""
        return group.accuracy(group.images.after_edit(EMBED), group.prompts.after_edit(EMBED))

    def utility_now(self) -> Utility:
        """Return the utility with the current weights."""
        return {name: self.accuracy_now(each) for name, each in self.evaluation.utility.items()}

    def forget_accuracy(self, embeddings: Tensor, features: Tensor | None = None) -> Accuracy:
        """Return the forget accuracy, by default with the image features of the model as it is."""
        group = self.evaluation.forget
        return group.accuracy(group.images.features if features is None else features, embeddings)

    def accuracy_with(self, embedding: Tensor) -> Accuracy:
        """Return the forget accuracy with another class embedding (width,) of the concept."""
        embeddings = self.evaluation.forget.prompts.embeddings.clone()
        embeddings[self.concept_class] = embedding
        return self.forget_accuracy(embeddings)

    def image_features(self, images: npt.NDArray[np.uint8]) -> Tensor:
        """Return unit features of uint8 (N, H, W, 3) with the current weights."""
        tower = self.evaluation.vision
        normalize = pixel_normalizer(self.manifest.input, self.device)
        parts = []
        for start, stop in spans(len(images), IMAGES_PER_FORWARD[torch.device(self.device).type]):
            pixels = normalize(images[start:stop])
            parts.append(tower.features(pixels, pixels))
        return torch.cat(parts)

    def text_features(self, tokens: npt.NDArray[np.integer]) -> Tensor:
        """Return unit features of token ids (N, L) with the current weights."""
        return text_features(self.evaluation.text, to_tokens(tokens, "cpu"), self.device)


def open_model(
    store: Store,
    manifest: SetManifest,
    module: nn.Module,
    resolved: ResolvedModel,
    *,
    settings: Settings,
    device: str,
    original: Callable[[], ModelUnderTest] | None,
) -> ModelUnderTest:
    """Join a model with the data of a set, and compute its features.

    Some rows of each evaluation set are drawn by seed.
    """
    tokenize = tokenizer(resolved)
    whole = prepare(store, manifest, module, tokenize=tokenize, device=device)
    drawn = {}
    for name, group in whole.utility.items():
        order = np.random.default_rng(settings.seed).permutation(len(group.images))
        fewer = settings.rows < len(group.images)
        drawn[name] = group.some(np.sort(order[: settings.rows])) if fewer else group
    evaluation = replace(whole, utility=drawn)
    evaluation.base_pass((), cache_bytes=0)
    naming = manifest.evals[manifest.forget_eval or sorted(manifest.evals)[0]]
    return ModelUnderTest(
        manifest=manifest,
        evaluation=evaluation,
        whole=whole.utility,
        forget=DataBlock.open(store, manifest.forget),
        retain=DataBlock.open(store, manifest.retain),
        templates=DataBlock.open(store, naming).templates,
        resolved=resolved,
        tokenize=tokenize,
        device=device,
        original=original,
    )


@contextmanager
def altered(model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Replace every parameter by `change` of its name and values within a block."""
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = change(name, before[name])
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = before[name]
