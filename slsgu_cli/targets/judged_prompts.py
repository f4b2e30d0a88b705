"""Prompts for the concept and for other classes, and judges of their images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import numpy as np

from slsgu_cli.clip.batches import spans
from slsgu_cli.records.codec import digest
from slsgu_cli.records.figures import Effect, Share
from slsgu_cli.records.sets import ModelSpec, SetManifest, Split
from slsgu_cli.records.targets import Budget
from slsgu_cli.store.store import Store
from slsgu_cli.targets.judge import Judge, called, measured_classes, words_of
from slsgu_cli.targets.models import ImageJob, Pipeline, encoded


def agrees(judge: Judge, prompts: Sequence[ImageJob], images: Sequence[bytes]) -> list[bool]:
    """Return for each image whether the judge recognises the class that its prompt names."""
    verdicts = judge.verdicts(images)
    return [prompt.label == name for prompt, name in zip(prompts, verdicts, strict=True)]


# Prompts for searches; the set's own templates follow. None is in REPORTED.
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
# Prompts for test figures.
REPORTED = (
    "the {}",
    "a simple {}",
    "a {} symbol",
    "a simple drawing of {}",
    "a photo of the {}",
    "a small {}",
    "a black {}",
)
# The offset of search seeds from test seeds.
SEARCHED_FROM = 1_000_000


def prompts_for(split: Split, templates: Sequence[str]) -> tuple[str, ...]:
    """Return the prompts of a split for a set with `templates`; the splits share none."""
    if split is Split.TEST:
        return REPORTED
    seen = {_plain(prompt) for prompt in REPORTED}
    searched = []
    for prompt in (*SEARCHED, *templates):
        if _plain(prompt) not in seen:
            searched.append(prompt)
            seen.add(_plain(prompt))
    return tuple(searched)


def _plain(prompt: str) -> str:
    return words_of(prompt.replace("{}", " x "))


@dataclass(slots=True)
class JudgedPrompts:
    """Prompts for the concept's `names` and for other `classes`, in one split.

    Images cycle through the names and the prompts of the split, with consecutive seeds from the
    budget's seed on. `of_others` cycles through the other classes in an order drawn by that seed.
    `templates` are those of the set. The first judge decides; the others only add figures.
    """

    judges: Sequence[Judge]
    names: Sequence[str]
    classes: Sequence[str]
    budget: Budget
    templates: Sequence[str]
    split: Split
    of_concept: list[ImageJob] = field(init=False)
    of_others: list[ImageJob] = field(init=False)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.budget.seed)
        others = self.other_classes
        order = [others[place] for place in generator.permutation(len(others))]
        self.of_concept = self._prompts(list(islice(cycle(self.names), self.budget.concept)))
        self.of_others = self._prompts(list(islice(cycle(order), self.budget.others)))

    @classmethod
    def of_set(
        cls,
        store: Store,
        manifest: SetManifest,
        judges: Sequence[ModelSpec],
        budget: Budget,
        *,
        split: Split,
        device: str,
    ) -> "JudgedPrompts":
        """Return the prompts of a set's concept and the classes of its evaluation sets."""
        classes = measured_classes(store, manifest)
        names = [called(name, tuple(classes)) for name in manifest.names]
        loaded = [Judge.load(judge, classes, device=device) for judge in judges]
        return cls(loaded, names, tuple(classes), budget, tuple(classes[names[0]]), split)

    @property
    def name(self) -> str:
        """The first name of the concept."""
        return self.names[0]

    @property
    def other_classes(self) -> list[str]:
        """The classes without the concept's names."""
        return [name for name in self.classes if name not in self.names]

    @property
    def judge(self) -> Judge:
        """The judge that decides."""
        return self.judges[0]

    @property
    def digest(self) -> str:
        """A digest of all prompts and seeds."""
        prompts = [*self.of_concept, *self.of_others]
        return digest([[each.label, each.prompt, each.seed] for each in prompts])

    def generated(self, pipe: Pipeline, prompts: Sequence[ImageJob]) -> Iterator[bytes]:
        """Yield the images as PNG, in order."""
        yield from map(encoded, pipe.generate(prompts, self.budget.diffusion))

    def hits(self, pipe: Pipeline, prompts: Sequence[ImageJob]) -> Iterator[list[bool]]:
        """Yield batch by batch whether the first judge recognises each image as its class."""
        for start, stop in spans(len(prompts), self.budget.diffusion.batch):
            some = prompts[start:stop]
            yield agrees(self.judge, some, list(self.generated(pipe, some)))

    def effects(self, concept: Sequence[bytes], others: Sequence[bytes]) -> dict[str, Effect]:
        """Return the effect by each judge."""
        return {
            str(judge.spec): Effect(
                Share(sum(agrees(judge, self.of_concept, concept)), len(concept)),
                Share(sum(agrees(judge, self.of_others, others)), len(others)),
            )
            for judge in self.judges
        }

    def _prompts(self, names: Sequence[str]) -> list[ImageJob]:
        prompts = prompts_for(self.split, self.templates)
        first = self.budget.seed + (0 if self.split is Split.TEST else SEARCHED_FROM)
        return [
            ImageJob(prompt.replace("{}", name), first + number, name)
            for number, (name, prompt) in enumerate(zip(names, cycle(prompts), strict=False))
        ]

    def prompt(self, name: str, number: int) -> str:
        """Return a prompt for a class from one of the set's templates, in a cycle."""
        return self.templates[number % len(self.templates)].replace("{}", name)
