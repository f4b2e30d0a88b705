"""The zero-shot CLIP that says what images show, and the prompts it judges."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.clip.inputs import decoder, pixel_normalizer, spans, to_tokens
from slsgu_cli.clip.models import input_spec, load, pick_device, resolve, tokenizer
from slsgu_cli.clip.towers import CacheBudget, text_tower, vision_tower
from slsgu_cli.clip.zeroshot import PromptSide
from slsgu_cli.downstream.models import ImageJob, Pipeline
from slsgu_cli.records.method import Share
from slsgu_cli.records.sets import ModelSpec, SetManifest
from slsgu_cli.records.targets import Budget
from slsgu_cli.sources.classes import find_class
from slsgu_cli.store.artifacts import Artifact, read_manifest
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store


def called(concept: str, classes: Sequence[str]) -> str:
    """Return the concept as the judge spells it."""
    place = find_class(classes, concept)
    return concept if place is None else classes[place]


BATCH = 64

# Class names, and the prompt templates that stand for each.
Classes = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Judge:
    """A CLIP and the names it tells images apart by; `embeddings` are (names, width).

    `see` turns encoded images into unit features (images, width).
    """

    spec: ModelSpec
    names: tuple[str, ...]
    embeddings: Tensor
    see: Callable[[Sequence[bytes]], Tensor]

    @classmethod
    def load(cls, spec: ModelSpec, classes: Classes, *, device: str = "auto") -> "Judge":
        """Load a CLIP to tell `classes` apart. Raises what `models.resolve` raises."""
        device = pick_device(device)
        resolved = resolve(spec)
        module, inputs = load(resolved, device), input_spec(resolved)
        names = tuple(classes)
        prompts = [text.replace("{}", name) for name in names for text in classes[name]]
        owners = np.repeat(np.arange(len(names)), [len(classes[name]) for name in names])
        tokens = to_tokens(tokenizer(resolved)(prompts), device)
        side = PromptSide(text_tower(module), tokens, to_tokens(owners, device), len(names))
        decode, normalize = decoder(inputs), pixel_normalizer(inputs, device)
        vision = vision_tower(module)

        def see(images: Sequence[bytes]) -> Tensor:
            pixels = normalize(np.stack([decode(image).pixels for image in images]))
            return vision.features(pixels, pixels)

        with torch.no_grad():
            side.base_pass((), CacheBudget(0))
        return cls(spec, names, side.embeddings, see)

    def features(self, images: Sequence[bytes]) -> Tensor:
        """Return unit features of encoded images, (images, width)."""
        with torch.no_grad():
            parts = [self.see(images[start:stop]) for start, stop in spans(len(images), BATCH)]
        return torch.cat(parts)

    def verdicts(self, images: Sequence[bytes]) -> list[str]:
        """Return for each encoded image the name of highest cosine."""
        if not images:
            return []
        places = (self.features(images) @ self.embeddings.T).argmax(dim=-1).tolist()
        return [self.names[place] for place in places]


def measured_classes(store: Store, manifest: SetManifest) -> Classes:
    """Return the classes of a set's evaluation sets, each with its templates, and the concept.

    A name that several sets have keeps the templates of the first.
    """
    templates: dict[str, tuple[str, ...]] = {}
    for _, ref in sorted(manifest.evals.items()):
        block = DataBlock.open(store, ref)
        for name in block.class_names:
            templates.setdefault(name, block.templates)
    if find_class(tuple(templates), manifest.concept) is None:
        templates[manifest.concept] = next(iter(templates.values()), ("{}",))
    return templates


def class_in(text: str, names: Sequence[str]) -> str | None:
    """Return the longest class name that stands in a text as whole words; None if none does."""
    plain = f" {_words(text)} "
    fitting = [name for name in names if (words := _words(name)) and f" {words} " in plain]
    return max(fitting, key=len, default=None)


def _words(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


def png_bytes(image: Image.Image) -> bytes:
    """Return an image as PNG, the same bytes for the same pixels."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class JudgedPrompt:
    """A picture to make, and the class that it shall show."""

    label: str
    job: ImageJob


@dataclass(slots=True)
class JudgedPrompts:
    """Pictures of the concept `name` and of the judge's other classes, by a budget's seed.

    Prompts take the concept's templates in turn. `of_others` goes through the other classes in
    a drawn order.
    """

    judge: Judge
    name: str
    budget: Budget
    templates: Sequence[str]
    of_concept: list[JudgedPrompt] = field(init=False)
    of_others: list[JudgedPrompt] = field(init=False)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.budget.seed)
        names = [name for name in self.judge.names if name != self.name]
        order = [names[place] for place in generator.permutation(len(names))]
        chosen = [order[number % len(order)] for number in range(self.budget.others)]
        self.of_concept = self._prompts([self.name] * self.budget.concept)
        self.of_others = self._prompts(chosen)

    @classmethod
    def of_set(
        cls, store: Store, manifest: SetManifest, judge: ModelSpec, budget: Budget, *, device: str
    ) -> "JudgedPrompts":
        """Return the prompts of a set's concept and the classes of its evaluation sets."""
        classes = measured_classes(store, manifest)
        name = called(manifest.concept, tuple(classes))
        return cls(Judge.load(judge, classes, device=device), name, budget, tuple(classes[name]))

    def painted(self, pipe: Pipeline, prompts: Sequence[JudgedPrompt]) -> Iterator[bytes]:
        """Yield the pictures as PNG, in order."""
        jobs = [prompt.job for prompt in prompts]
        yield from map(png_bytes, pipe.paint(jobs, self.budget.paint))

    def recognised(self, prompts: Sequence[JudgedPrompt], images: Sequence[bytes]) -> Share:
        """Return how many pictures the judge takes for what they shall show."""
        verdicts = self.judge.verdicts(images)
        hits = [prompt.label == name for prompt, name in zip(prompts, verdicts, strict=True)]
        return Share(sum(hits), len(hits))

    def _prompts(self, names: Sequence[str]) -> list[JudgedPrompt]:
        return [
            JudgedPrompt(name, ImageJob(self.prompt(name, number), self.budget.seed + number))
            for number, name in enumerate(names)
        ]

    def prompt(self, name: str, number: int) -> str:
        """Return a prompt for a class, by the template whose turn it is."""
        return self.templates[number % len(self.templates)].replace("{}", name)


# Names the CLIP that the edit was made for, as it was.
OWN = "set"


def judge_spec(store: Store, name: str, judge: ModelSpec | None) -> ModelSpec | None:
    """Return the model that judges; `set` is the one the set is for."""
    if judge is None or judge.name != OWN:
        return judge
    known = store.exists(Artifact.SET.path(name))
    return read_manifest(store, name).model if known else load_edit(store, name).header.model
