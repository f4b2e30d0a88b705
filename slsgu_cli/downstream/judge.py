"""The zero-shot CLIP that says what images show, and the prompts it judges."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.clip.inputs import decoder, pixel_normalizer, spans, to_tokens
from slsgu_cli.clip.models import input_spec, load, pick_device, resolve, tokenizer
from slsgu_cli.clip.towers import CacheBudget, text_tower, vision_tower
from slsgu_cli.clip.zeroshot import PromptSide, counted_by, naming_layers, require_finite
from slsgu_cli.downstream.models import ImageJob, Pipeline
from slsgu_cli.records.codec import digest
from slsgu_cli.records.figures import Effect, Share
from slsgu_cli.records.sets import ModelSpec, Purpose, SetManifest
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
class JudgedPrompt:
    """A picture to make, and the class that it shall show."""

    label: str
    job: ImageJob


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

        with torch.no_grad(), counted_by(f"the judge {spec}"), naming_layers(module):
            side.base_pass((), CacheBudget(0))
        return cls(spec, names, side.embeddings, see)

    def features(self, images: Sequence[bytes]) -> Tensor:
        """Return unit features of encoded images, (images, width)."""
        with torch.no_grad():
            parts = [self.see(images[start:stop]) for start, stop in spans(len(images), BATCH)]
        with counted_by(f"the judge {self.spec}"):
            return require_finite(torch.cat(parts), "image features")

    def verdicts(self, images: Sequence[bytes]) -> list[str]:
        """Return for each encoded image the name of highest cosine."""
        if not images:
            return []
        places = (self.features(images) @ self.embeddings.T).argmax(dim=-1).tolist()
        return [self.names[place] for place in places]

    def agrees(self, prompts: Sequence[JudgedPrompt], images: Sequence[bytes]) -> list[bool]:
        """Return for each image whether it is taken for what its prompt asks for."""
        verdicts = self.verdicts(images)
        return [prompt.label == name for prompt, name in zip(prompts, verdicts, strict=True)]


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


# Prompts that are searched by, before those of the set's own templates. None of REPORTED is.
SEARCHED = (
    "a picture of {}",
    "{}",
    "a {}",
    "a drawing of {}",
    "a {} sign",
    "a single {}",
    "a photo of {}",
    "a big {}",
)
# Prompts that figures are of.
REPORTED = (
    "the {}",
    "a simple {}",
    "a {} symbol",
    "a simple drawing of {}",
    "a photo of the {}",
    "a small {}",
    "a black {}",
)
# Seeds of pictures that are searched by begin so far behind those of reported ones.
SEARCHED_FROM = 1_000_000


def prompts_for(purpose: Purpose, templates: Sequence[str]) -> tuple[str, ...]:
    """Return the prompts of a purpose, of a set with `templates`: none serves both."""
    if purpose is Purpose.REPORT:
        return REPORTED
    seen = {_plain(prompt) for prompt in REPORTED}
    searched = []
    for prompt in (*SEARCHED, *templates):
        if _plain(prompt) not in seen:
            searched.append(prompt)
            seen.add(_plain(prompt))
    return tuple(searched)


def _plain(prompt: str) -> str:
    return _words(prompt.replace("{}", " x "))


@dataclass(slots=True)
class JudgedPrompts:
    """Pictures of the concept `name` and of the judges' other classes, for one purpose.

    The prompts of the purpose are taken in turn, with seeds from the budget's on.
    `of_others` goes through the other classes in an order drawn by that seed. `templates` are
    the set's own. The first judge decides, others have figures of their own.
    """

    judges: Sequence[Judge]
    name: str
    budget: Budget
    templates: Sequence[str]
    purpose: Purpose
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
        cls, store: Store, manifest: SetManifest, judges: Sequence[ModelSpec], budget: Budget,
        *, purpose: Purpose, device: str,
    ) -> "JudgedPrompts":  # fmt: skip
        """Return the prompts of a set's concept and the classes of its evaluation sets."""
        classes = measured_classes(store, manifest)
        name = called(manifest.concept, tuple(classes))
        loaded = [Judge.load(judge, classes, device=device) for judge in judges]
        return cls(loaded, name, budget, tuple(classes[name]), purpose)

    def reporting(self, budget: Budget) -> "JudgedPrompts":
        """Return the pictures to report on, with the same judges."""
        return replace(self, budget=budget, purpose=Purpose.REPORT)

    @property
    def judge(self) -> Judge:
        """The judge that decides."""
        return self.judges[0]

    @property
    def digest(self) -> str:
        """A digest of all prompts and seeds."""
        prompts = [*self.of_concept, *self.of_others]
        return digest([[each.label, each.job.prompt, each.job.seed] for each in prompts])

    def painted(self, pipe: Pipeline, prompts: Sequence[JudgedPrompt]) -> Iterator[bytes]:
        """Yield the pictures as PNG, in order."""
        jobs = [prompt.job for prompt in prompts]
        yield from map(png_bytes, pipe.paint(jobs, self.budget.paint))

    def hits(self, pipe: Pipeline, prompts: Sequence[JudgedPrompt]) -> Iterator[list[bool]]:
        """Yield batch by batch which pictures the first judge takes for what they shall show.

        A batch does not depend on those behind it.
        """
        for start, stop in spans(len(prompts), self.budget.paint.batch):
            some = prompts[start:stop]
            yield self.judge.agrees(some, list(self.painted(pipe, some)))

    def effects(self, concept: Sequence[bytes], others: Sequence[bytes]) -> dict[str, Effect]:
        """Return what each judge makes of all pictures."""
        return {
            str(judge.spec): Effect(
                Share(sum(judge.agrees(self.of_concept, concept)), len(concept)),
                Share(sum(judge.agrees(self.of_others, others)), len(others)),
            )
            for judge in self.judges
        }

    def _prompts(self, names: Sequence[str]) -> list[JudgedPrompt]:
        prompts = prompts_for(self.purpose, self.templates)
        first = self.budget.seed + (0 if self.purpose is Purpose.REPORT else SEARCHED_FROM)
        return [
            JudgedPrompt(name, ImageJob(prompt.replace("{}", name), first + number))
            for (number, name), prompt in zip(enumerate(names), cycle(prompts), strict=False)
        ]

    def prompt(self, name: str, number: int) -> str:
        """Return a prompt for a class, by the set's template whose turn it is."""
        return self.templates[number % len(self.templates)].replace("{}", name)


# Names the CLIP that the edit was made for, as it was.
OWN = "set"


def judge_specs(store: Store, name: str, judges: Sequence[ModelSpec]) -> tuple[ModelSpec, ...]:
    """Return the models that judge; `set` is the one the set is for."""
    if not any(judge.name == OWN for judge in judges):
        return tuple(judges)
    known = store.exists(Artifact.SET.path(name))
    own = read_manifest(store, name).model if known else load_edit(store, name).header.model
    return tuple(dict.fromkeys(own if judge.name == OWN else judge for judge in judges))
