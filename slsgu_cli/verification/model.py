"""A model under test with the data of its set: measured as it is, or with other weights."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.clip.activations import CacheBudget
from slsgu_cli.clip.batches import (
    IMAGES_PER_FORWARD,
    Pixels,
    pixel_normalizer,
    spans,
    text_features,
    to_tokens,
)
from slsgu_cli.clip.evaluation import Evaluation, EvaluationSet, prepare, prompt_side
from slsgu_cli.clip.tokenizers import Tokenize
from slsgu_cli.clip.towers import EMBED, SplitTower
from slsgu_cli.engine.resumable import SavedSums
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.verification import Settings
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store
from slsgu_cli.verification.resumable import PartialResults, Training

Utility = dict[str, Accuracy]
Words = Mapping[int, str]
# Shorter words may be part of another word by chance.
SHORT = 3


class SkippedCheck(Exception):
    """Raised by a check that cannot run on a model; the text says why."""


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
    `whole` has all rows. `templates` are those that name the concept in the set. `words`
    returns the words that are one token each, by token id. `original` returns the gallery of
    the original model, `original_text` its text tower (None if this is the original).
    `results` has the partial results of the current check, and `saved_state` returns the
    saved state of a training by its name (None to save nothing).
    """

    manifest: SetManifest
    evaluation: Evaluation
    whole: dict[str, EvaluationSet]
    forget: DataBlock
    retain: DataBlock
    templates: tuple[str, ...]
    tokenize: Tokenize
    device: str
    is_original: bool
    words: Callable[[], Words]
    ticker: progress.Ticker | None = None
    results: PartialResults = field(default_factory=lambda: PartialResults([]))
    saved_state: Callable[[str], SavedSums] | None = None
    original: Callable[[], Gallery] | None = None
    original_text: Callable[[], SplitTower] | None = None
    normalize: Pixels = field(init=False)
    _gallery: Gallery | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.normalize = pixel_normalizer(self.manifest.input, self.device)

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
    def bias(self) -> Tensor | None:
        """The logit bias of a model with the sigmoid loss; None for others."""
        value: Any = getattr(self.module, "logit_bias", None)
        return None if value is None else torch.as_tensor(value.reshape(()))

    @property
    def names(self) -> tuple[str, ...]:
        """The classes among which the concept's images are recognised."""
        return self.evaluation.forget.names

    @property
    def concept_class(self) -> int:
        """The index of the concept in `names`."""
        return int(self.evaluation.forget.images.labels[0])

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

    def original_gallery(self) -> Gallery:
        """Return the features of all evaluation images by the original model."""
        return self.original() if self.original else self.gallery()

    def free_words(self) -> Words:
        """Return the words that a search may use, by token.

        Words that contain a part of the name, or that a part of it contains, are excluded:
        they would be the name again. Raises SkippedCheck if no word remains.
        """
        name = self.names[self.concept_class]
        parts = re.findall(r"\w+", name.lower())
        tokens = set(self.tokenize([name])[0].tolist())

        def is_of_name(word: str) -> bool:
            return any(
                part == word
                or (min(len(part), len(word)) >= SHORT and (part in word or word in part))
                for part in parts
            )

        words = {
            n: word for n, word in self.words().items() if n not in tokens and not is_of_name(word)
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

    def renamed(self, name: str) -> tuple[str, ...]:
        """Return the classes with another name for the concept."""
        return (*self.names[: self.concept_class], name, *self.names[self.concept_class + 1 :])

    def training(self, optimizer: torch.optim.Optimizer, steps: int, name: str) -> Training:
        """Return the training `name` of the current check, resumed if its state is saved."""
        saved = self.saved_state(name) if self.saved_state else None
        return Training.resume(optimizer, steps, saved)

    def tick(self) -> None:
        """Advance the progress bar by one measurement."""
        if self.ticker:
            self.ticker.advance()

    def classes(self, names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        """Return class embeddings with the current weights, (classes, width)."""
        side = prompt_side(
            self.evaluation.text, names, templates, tokenize=self.tokenize, device=self.device
        )
        return side.after_edit(EMBED)

    def measure(self, *, utility: bool) -> tuple[Accuracy, Utility | None]:
        """Measure forget accuracy, and utility if asked, with the current weights."""
        embeddings: dict[int, Tensor] = {}
        groups = {"": self.evaluation.forget} | (self.evaluation.utility if utility else {})
        accuracies = {}
        for name, group in groups.items():
            if id(group.prompts) not in embeddings:
                embeddings[id(group.prompts)] = group.prompts.after_edit(EMBED)
            features = group.images.after_edit(EMBED)
            accuracies[name] = group.accuracy(features, embeddings[id(group.prompts)])
        self.tick()
        return accuracies.pop(""), accuracies if utility else None

    def forget_accuracy(self, embeddings: Tensor, features: Tensor | None = None) -> Accuracy:
        """Return the forget accuracy, by default with the image features of the model as it is."""
        group = self.evaluation.forget
        self.tick()
        features = group.images.features if features is None else features
        return group.accuracy(features, embeddings)

    def accuracy_with(self, embedding: Tensor) -> Accuracy:
        """Return the forget accuracy with another class embedding (width,) of the concept."""
        embeddings = self.evaluation.forget.prompts.embeddings.clone()
        embeddings[self.concept_class] = embedding
        return self.forget_accuracy(embeddings)

    def image_features(self, images: npt.NDArray[np.uint8]) -> Tensor:
        """Return unit features of uint8 (N, H, W, 3) with the current weights."""
        tower = self.evaluation.vision
        parts = []
        for start, stop in spans(len(images), IMAGES_PER_FORWARD[torch.device(self.device).type]):
            pixels = self.normalize(images[start:stop])
            parts.append(tower.features(pixels, pixels))
        return torch.cat(parts)

    def text_features(
        self, tokens: npt.NDArray[np.integer], tower: SplitTower | None = None
    ) -> Tensor:
        """Return unit features of token ids (N, L), by default with the current weights."""
        tower = self.evaluation.text if tower is None else tower
        return text_features(tower, to_tokens(tokens, "cpu"), self.device)


def open_model(
    store: Store,
    manifest: SetManifest,
    module: nn.Module,
    *,
    tokenize: Tokenize,
    settings: Settings,
    device: str,
    is_original: bool,
    words: Callable[[], Words],
) -> ModelUnderTest:
    """Join a model with the data of a set; draw some rows of each evaluation set by seed."""
    evaluation = prepare(store, manifest, module, tokenize=tokenize, device=device)
    drawn = {}
    for name, group in evaluation.utility.items():
        order = np.random.default_rng(settings.seed).permutation(len(group.images))
        fewer = settings.rows < len(group.images)
        drawn[name] = group.some(np.sort(order[: settings.rows])) if fewer else group
    naming = manifest.evals[manifest.forget_eval or sorted(manifest.evals)[0]]
    return ModelUnderTest(
        manifest=manifest,
        evaluation=replace(evaluation, utility=drawn),
        whole=evaluation.utility,
        forget=DataBlock.open(store, manifest.forget),
        retain=DataBlock.open(store, manifest.retain),
        templates=DataBlock.open(store, naming).templates,
        tokenize=tokenize,
        device=device,
        is_original=is_original,
        words=words,
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
