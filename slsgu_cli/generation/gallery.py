"""The pictures by which a pipeline is judged: which prompts and seeds, and what they show."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from slsgu_cli.generation.generate import called
from slsgu_cli.generation.judging import Judge, measured_classes, png_bytes
from slsgu_cli.generation.painting import Job, Painter
from slsgu_cli.generation.records import Budget
from slsgu_cli.records import ModelSpec, SetManifest, Share
from slsgu_cli.store import Store


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture to make, and the class that it shall show."""

    label: str
    job: Job


@dataclass(slots=True)
class Gallery:
    """Pictures of the concept `name` and of the judge's other classes, by a budget's seed.

    Prompts take the concept's templates in turn. `rest` goes through the other classes in
    a drawn order.
    """

    judge: Judge
    name: str
    budget: Budget
    templates: Sequence[str]
    own: list[Frame] = field(init=False)
    rest: list[Frame] = field(init=False)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.budget.seed)
        names = [name for name in self.judge.names if name != self.name]
        order = [names[place] for place in generator.permutation(len(names))]
        chosen = [order[number % len(order)] for number in range(self.budget.others)]
        self.own = self._frames([self.name] * self.budget.concept)
        self.rest = self._frames(chosen)

    @classmethod
    def of_set(
        cls, store: Store, manifest: SetManifest, judge: ModelSpec, budget: Budget, *, device: str
    ) -> "Gallery":
        """Return the gallery of a set's concept and the classes of its evaluation sets."""
        classes = measured_classes(store, manifest)
        name = called(manifest.concept, tuple(classes))
        return cls(Judge.load(judge, classes, device=device), name, budget, tuple(classes[name]))

    def painted(self, painter: Painter, frames: Sequence[Frame]) -> Iterator[bytes]:
        """Yield the pictures as PNG, in order."""
        jobs = [frame.job for frame in frames]
        yield from map(png_bytes, painter.paint(jobs, self.budget.paint))

    def recognised(self, frames: Sequence[Frame], images: Sequence[bytes]) -> Share:
        """Return how many pictures the judge takes for what they shall show."""
        said = self.judge.verdicts(images)
        hits = [frame.label == name for frame, name in zip(frames, said, strict=True)]
        return Share(sum(hits), len(hits))

    def _frames(self, names: Sequence[str]) -> list[Frame]:
        return [
            Frame(name, Job(self.prompt(name, number), self.budget.seed + number))
            for number, name in enumerate(names)
        ]

    def prompt(self, name: str, number: int) -> str:
        """Return a prompt for a class, by the template whose turn it is."""
        return self.templates[number % len(self.templates)].replace("{}", name)
