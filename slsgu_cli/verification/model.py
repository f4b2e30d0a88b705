"""A model under test with the set's data: measured as it is, or while its weights are others."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

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
from slsgu_cli.engine.resumable import KeptArrays
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import SumsHeader
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.verification import Settings
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Arrays, Store

Utility = dict[str, Accuracy]
Words = Mapping[int, str]
# What is shorter may stand in another word by chance.
SHORT = 3
# What Adam keeps of a parameter, and what is kept beside it.
STEP = "step"
ADAM = (STEP, "exp_avg", "exp_avg_sq")
FIGURES = "figures"
T = TypeVar("T")


class LeftOut(Exception):
    """A check that cannot be made on a model; the text says why."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Image features (rows, width) of all evaluation images, the concept's `own` first.

    `labels` are the places of the others' classes in `names`, which is sorted; -1 for the
    concept's.
    """

    features: Tensor
    labels: Tensor
    names: tuple[str, ...]
    own: int


@dataclass(slots=True)
class Parts:
    """What a long check has found so far, part by part, and where that is kept.

    A check makes its parts in the same order each time, none of which depends on another.
    """

    found: list[Any]
    keep: Callable[[Sequence[Any]], None] | None = None
    _asked: int = field(init=False, default=0)

    def made(self, count: int, make: Callable[[], Sequence[T]]) -> list[T]:
        """Return the next `count` results: those of an earlier run, or else made now."""
        start, self._asked = self._asked, self._asked + count
        if len(self.found) < self._asked:
            self.found[start:] = make()
            if self.keep is not None:
                self.keep(self.found)
        return self.found[start : self._asked]


@dataclass(slots=True)
class Training:
    """Parameters that a check trains by Adam, and where their state is kept meanwhile.

    `figures` are what was measured on the way. Whoever goes on from what was kept ends, on a
    CPU, with the bytes of a run that nothing stopped.
    """

    optimizer: torch.optim.Optimizer
    steps: int
    kept: KeptArrays | None = None
    figures: list[Accuracy] = field(default_factory=list)
    done: int = 0

    @classmethod
    def of(
        cls, model: "ModelUnderTest", what: str, optimizer: torch.optim.Optimizer, steps: int
    ) -> Self:
        """Return a training to learn `what` for a check, as far as an earlier run came with it."""
        kept = model.keeper(what) if model.keeper else None
        training = cls(optimizer, steps, kept)
        if kept is not None and (done := kept.go_on(steps, training._go_on)):
            training.done = done
            progress.note(f"training goes on after {done} of its {steps} steps")
        return training

    def advance(self) -> None:
        """Count a step that was taken, and keep the state if it is time to."""
        self.done += 1
        if self.kept is not None and self.kept.due:
            self.kept.write(self._arrays, self.steps, added=self.done, done=self.done)

    def remove(self) -> None:
        """Remove what was kept."""
        if self.kept is not None:
            self.kept.remove()

    @property
    def _parameters(self) -> list[Tensor]:
        return [each for group in self.optimizer.param_groups for each in group["params"]]

    def _arrays(self) -> Arrays:
        figures = [(each.top1, each.top5, each.rows, each.unseen) for each in self.figures]
        arrays = {FIGURES: np.array(figures, dtype=np.float64).reshape(-1, 4)}
        for index, parameter in enumerate(self._parameters):
            arrays[f"{index}"] = parameter.detach().cpu().numpy()
            for name, value in self.optimizer.state[parameter].items():
                arrays[f"{index}.{name}"] = value.cpu().numpy()
        return arrays

    @torch.no_grad()
    def _go_on(self, _header: SumsHeader, arrays: Arrays) -> None:
        for top1, top5, rows, unseen in arrays[FIGURES].tolist():
            self.figures.append(Accuracy(top1, top5, int(rows), bool(unseen)))
        for index, parameter in enumerate(self._parameters):
            parameter.copy_(torch.tensor(arrays[f"{index}"]))
            state = {name: f"{index}.{name}" for name in ADAM if f"{index}.{name}" in arrays}
            self.optimizer.state[parameter] = {
                name: torch.tensor(arrays[key], device="cpu" if name == STEP else parameter.device)
                for name, key in state.items()
            }


@dataclass(slots=True)
class ModelUnderTest:
    """One model, what it is measured on, and the rows it may be trained on.

    `evaluation` holds the features of the model as it is; utility is measured on some
    rows of each set only, `whole` has all of them. `templates` are those by which the set
    names the concept. `words` gives those that are one token each, by their ids. `original`
    gives the gallery of the original model; `original_text` its text tower, None where this
    is the original. `keeper` says where the state of a training is kept that a check does,
    by what it teaches.
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
    parts: Parts = field(default_factory=lambda: Parts([]))
    keeper: Callable[[str], KeptArrays] | None = None
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
        """What the model multiplies cosines with, exp(logit_scale)."""
        value: Any = self.module.logit_scale
        return torch.as_tensor(value.reshape(()).exp())

    @property
    def bias(self) -> Tensor | None:
        """What a model with the sigmoid loss adds to its logits; None for others."""
        value: Any = getattr(self.module, "logit_bias", None)
        return None if value is None else torch.as_tensor(value.reshape(()))

    @property
    def names(self) -> tuple[str, ...]:
        """The classes that the concept's images are told apart among."""
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
        """Return the evaluation sets with all images, their features by the model as it is.

        The model runs over the images that utility is not measured on the first time.
        """
        for group in self.whole.values():
            if not hasattr(group.images, "features"):
                for _ in group.images.base_pass({}, CacheBudget(0)):
                    pass
        return self.whole

    def gallery(self) -> Gallery:
        """Return the features of all evaluation images by the model as it is."""
        if self._gallery is None:
            own, groups = self.evaluation.forget.images, self.groups().values()
            names = tuple(sorted({name for group in groups for name in group.names}))
            places = {name: place for place, name in enumerate(names)}
            labels = [torch.full((len(own),), -1, device=own.labels.device)]
            for group in groups:
                of_set = torch.tensor([places[name] for name in group.names])
                labels.append(of_set.to(own.labels.device)[group.images.labels])
            features = torch.cat([own.features, *(group.images.features for group in groups)])
            self._gallery = Gallery(features, torch.cat(labels), names, len(own))
        return self._gallery

    def original_gallery(self) -> Gallery:
        """Return the features of all evaluation images by the original model."""
        return self.original() if self.original else self.gallery()

    def free_words(self) -> Words:
        """Return the words that a search may use, by token: all but what the name is made of.

        A word that holds one of the name's, or is part of one, would be the name again. Raises
        LeftOut without any.
        """
        name = self.names[self.concept_class]
        parts = re.findall(r"\w+", name.lower())
        tokens = set(self.tokenize([name])[0].tolist())

        def tells(word: str) -> bool:
            return any(
                part == word
                or (min(len(part), len(word)) >= SHORT and (part in word or word in part))
                for part in parts
            )

        words = {n: word for n, word in self.words().items() if n not in tokens and not tells(word)}
        if not words:
            raise LeftOut("its tokenizer does not tell which words are one token")
        return words

    def token_table(self) -> Tensor:
        """Return the embeddings of the tokens, (vocabulary, width). Raises LeftOut."""
        table = self.evaluation.text.token_table
        if table is None:
            raise LeftOut("its text tower does not show the tokens' embeddings")
        return table.detach()

    def renamed(self, name: str) -> tuple[str, ...]:
        """Return the classes with another name for the concept."""
        return (*self.names[: self.concept_class], name, *self.names[self.concept_class + 1 :])

    def tick(self) -> None:
        """Count one more measurement as done."""
        if self.ticker:
            self.ticker.advance()

    def classes(self, names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        """Return class embeddings by the weights as they are now, (classes, width)."""
        side = prompt_side(
            self.evaluation.text, names, templates, tokenize=self.tokenize, device=self.device
        )
        return side.after_edit(EMBED)

    def figures(self, *, utility: bool) -> tuple[Accuracy, Utility | None]:
        """Measure with the weights as they are now."""
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
        """Return how often the concept is recognised; by the images as they are by default."""
        group = self.evaluation.forget
        self.tick()
        features = group.images.features if features is None else features
        return group.accuracy(features, embeddings)

    def called(self, embedding: Tensor) -> Accuracy:
        """Return the forget accuracy with another embedding (width,) of the concept's class."""
        embeddings = self.evaluation.forget.prompts.embeddings.clone()
        embeddings[self.concept_class] = embedding
        return self.forget_accuracy(embeddings)

    def image_features(self, images: npt.NDArray[np.uint8]) -> Tensor:
        """Return unit features of uint8 (N, H, W, 3) by the weights as they are now."""
        tower = self.evaluation.vision
        parts = []
        for start, stop in spans(len(images), IMAGES_PER_FORWARD[torch.device(self.device).type]):
            pixels = self.normalize(images[start:stop])
            parts.append(tower.features(pixels, pixels))
        return torch.cat(parts)

    def text_features(
        self, tokens: npt.NDArray[np.integer], tower: SplitTower | None = None
    ) -> Tensor:
        """Return unit features of token ids (N, L), by default by the weights as they are now."""
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
    """Join a model with a set's data; of each evaluation set, some rows are drawn by seed."""
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
    """Give every parameter the values that `change` makes of it, for the length of a block."""
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = change(name, before[name])
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = before[name]
