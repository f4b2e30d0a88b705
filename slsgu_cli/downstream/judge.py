"""The CLIP that says what images show, its prompts, and folders of images that it judges."""

import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import edit_digests, load_edit, warn_of_other_encoders
from slsgu_cli.clip.inputs import CacheBudget, decoder, pixel_normalizer, spans, to_tokens
from slsgu_cli.clip.models import input_spec, load, pick_device, resolve, tokenizer
from slsgu_cli.clip.towers import text_tower, vision_tower
from slsgu_cli.clip.zeroshot import PromptSide, counted_by, naming_layers, require_finite
from slsgu_cli.downstream.models import (
    ImageJob,
    Pipeline,
    folder_fingerprint,
    new_values,
    require_family,
    unfinished,
)
from slsgu_cli.errors import UsageError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.figures import Effect, Share
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import ModelSpec, SetManifest, Split
from slsgu_cli.records.targets import (
    AnswerSet,
    Budget,
    CanvasRequest,
    GeneratedSource,
    SourceRequest,
)
from slsgu_cli.sets.evaluation_sets import read_classes
from slsgu_cli.sources.captions import find_class
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
    return _encoded(image, format="PNG")


def _encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, **options)
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


def prompts_for(split: Split, templates: Sequence[str]) -> tuple[str, ...]:
    """Return the prompts of a split, of a set with `templates`: none serves both."""
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
    return _words(prompt.replace("{}", " x "))


@dataclass(slots=True)
class JudgedPrompts:
    """Pictures of the concept `name` and of the judges' other classes, for one split.

    The prompts of the purpose are taken in turn, with seeds from the budget's on.
    `of_others` goes through the other classes in an order drawn by that seed. `templates` are
    the set's own. The first judge decides, others have figures of their own.
    """

    judges: Sequence[Judge]
    name: str
    budget: Budget
    templates: Sequence[str]
    split: Split
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
        name = called(manifest.concept, tuple(classes))
        loaded = [Judge.load(judge, classes, device=device) for judge in judges]
        return cls(loaded, name, budget, tuple(classes[name]), split)

    def reporting(self, budget: Budget) -> "JudgedPrompts":
        """Return the pictures to report on, with the same judges."""
        return replace(self, budget=budget, split=Split.TEST)

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
        prompts = prompts_for(self.split, self.templates)
        first = self.budget.seed + (0 if self.split is Split.TEST else SEARCHED_FROM)
        return [
            JudgedPrompt(name, ImageJob(_in_turn(prompts, number, name), first + number))
            for number, name in enumerate(names)
        ]

    def prompt(self, name: str, number: int) -> str:
        """Return a prompt for a class, by the set's template whose turn it is."""
        return _in_turn(self.templates, number, name)


def _in_turn(prompts: Sequence[str], number: int, name: str) -> str:
    return prompts[number % len(prompts)].replace("{}", name)


# Names the CLIP that the edit was made for, as it was.
OWN = "set"


def judge_specs(store: Store, name: str, judges: Sequence[ModelSpec]) -> tuple[ModelSpec, ...]:
    """Return the models that judge; `set` is the one the set is for."""
    if not any(judge.name == OWN for judge in judges):
        return tuple(judges)
    known = store.exists(Artifact.SET.path(name))
    own = read_manifest(store, name).model if known else load_edit(store, name).header.model
    return tuple(dict.fromkeys(own if judge.name == OWN else judge for judge in judges))


def forgetting_generated(
    store: Store, request: BuildRequest, images: SourceRequest
) -> BuildRequest:
    """Return a request whose forget set is generated; its own sources are retained.

    Raises MissingError, InputError, and UsageError where nothing is left to retain.
    """
    if request.match or request.regex:
        raise UsageError("with --generate, every image made is forgotten", hint="leave --match out")
    retained = request.retain_sources or request.sources
    if not retained:
        raise UsageError("there is no source to retain", hint="name one with --source")
    made = generated_source(store, images)
    # Captions are the prompts. More images than asked for may lie there from before.
    return replace(
        request,
        sources=[made],
        retain_sources=retained,
        match=tuple(dict.fromkeys(images.prompts)),
        max_forget=request.max_forget or images.count,
    )


def generated_source(store: Store, request: SourceRequest) -> str:
    """Make what is missing of a source of generated images; return where it lies.

    Raises MissingError, InputError and UsageError.
    """
    if not request.prompts or any(not prompt.strip() for prompt in request.prompts):
        raise UsageError("--generate needs a prompt", hint="--generate 'an avocado chair'")
    require_family(request.pipeline, answers=False)
    record = GeneratedSource(
        pipeline=str(request.pipeline),
        pipeline_fingerprint=folder_fingerprint(request.pipeline),
        prompts=tuple(request.prompts),
        count=request.count,
        seed=request.seed,
        paint=request.paint,
        version=slsgu_cli.__version__,
    )
    # More images of the same prompts add to those there are; where a run of a pipeline
    # stands does not matter, nor which version made it.
    made_from = [record.pipeline_fingerprint, record.prompts, record.seed, record.paint]
    address = digest(made_from)
    folder = Artifact.GENERATED.beside(address)
    prompts = itertools.islice(itertools.cycle(request.prompts), request.count)
    jobs = [ImageJob(prompt, request.seed + number) for number, prompt in enumerate(prompts)]
    missing = unfinished(
        len(jobs), request.paint.batch, lambda number: store.exists(_caption(folder, number))
    )
    left = sum(map(len, missing))
    if left < len(jobs):
        progress.note(f"{len(jobs) - left} of {len(jobs)} images were generated before")
    if missing:
        pipe = Pipeline.load(request.pipeline, device=request.device)
        with progress.bar("generating", left) as ticker:
            for rows in missing:
                images = pipe.paint([jobs[n] for n in rows], request.paint)
                for number, image in zip(rows, images, strict=True):
                    store.write_bytes(f"{folder}/{number:06}.png", png_bytes(image))
                    # The caption comes last: with it, an image is complete.
                    store.write_bytes(_caption(folder, number), jobs[number].prompt.encode())
                    ticker.advance()
    store.write_record(Artifact.GENERATED.path(address), record)
    return store.where(folder)


def _caption(folder: str, number: int) -> str:
    return f"{folder}/{number:06}.txt"


# The benchmark's prompt, and the steps and guidance that its figures are made with.
PROMPT = "A {object} image in {theme} style."
THEME_TEMPLATES = ("an image in {} style", "{} style")
OBJECT_TEMPLATES = ("an image of a {}", "a {}", "{}")
RECORD = "answer-set.json"


@dataclass(frozen=True, slots=True)
class _Cell:
    theme: str
    object: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.theme}_{self.object}_seed{self.seed}.jpg".replace(" ", "_")

    @property
    def job(self) -> ImageJob:
        text = PROMPT.replace("{object}", self.object).replace("{theme}", self.theme)
        return ImageJob(text, self.seed)


def answer_set(store: Store, request: CanvasRequest) -> AnswerSet:
    """Make what is missing of an answer set, and judge all of it.

    Raises MissingError, InputError, StaleError, and UsageError where the concept is neither
    a theme nor an object.
    """
    if len(request.judges) > 1:
        raise UsageError("an answer set has one judge", hint="give --judge once")
    request = replace(request, judges=judge_specs(store, request.names[0], request.judges))
    edits = [load_edit(store, name) for name in request.names]
    warn_of_other_encoders(edits)
    concept = edits[0].header.concept
    themes, objects = (_listed(name) for name in (request.themes, request.objects))
    of_theme, of_object = find_class(themes, concept), find_class(objects, concept)
    if (of_theme is None) == (of_object is None):
        what = "neither a theme nor an object" if of_theme is None else "a theme and an object"
        raise UsageError(f"{concept!r} is {what}", hint="--themes FILE, --objects FILE")
    place = Store(str(request.out))
    cells = [_Cell(*cell) for cell in itertools.product(themes, objects, request.seeds)]
    target = str(request.target)
    _begin(place, digest({"edits": edit_digests(edits), "target": target, "paint": request.paint}))
    missing = unfinished(
        len(cells), request.paint.batch, lambda number: place.exists(cells[number].file)
    )
    if missing:
        pipe = Pipeline.load(request.target, device=request.device)
        values = new_values(pipe.encoders, edits)
        pipe.tell_of_readers(pipe.edited_names(values))
        left = sum(map(len, missing))
        with progress.bar("generating", left) as ticker, pipe.edited(values):
            for rows in missing:
                images = pipe.paint([cells[number].job for number in rows], request.paint)
                for number, image in zip(rows, images, strict=True):
                    place.write_bytes(
                        cells[number].file, _encoded(image, format="JPEG", quality=95)
                    )
                    ticker.advance()
    figures: Sequence[Share | None] = (None, None, None)
    if request.judges:
        prompted = themes[of_theme] if of_theme is not None else objects[of_object or 0]
        figures = _judged(place, request, cells, (themes, objects), prompted)
    ua, ira, cra = figures
    record = AnswerSet(
        name=edits[0].header.name,
        concept=concept,
        domain="theme" if of_theme is not None else "object",
        images=len(cells),
        judge=str(request.judges[0]) if request.judges else None,
        ua=ua,
        ira=ira,
        cra=cra,
        version=slsgu_cli.__version__,
    )
    place.write_record(RECORD, record)
    return record


def _listed(name: str) -> tuple[str, ...]:
    classes = read_classes(name)
    return classes.names if classes else ()


def _begin(place: Store, made_from: str) -> None:
    """Refuse to add to images of another edit; a run that was cut short is gone on with."""
    mark = ".made-from"
    if place.exists(mark) and place.read_bytes(mark).decode() != made_from:
        raise UsageError(
            f"{place.url} holds the answer set of another edit or other options",
            hint="another --out, or remove it",
        )
    place.write_bytes(mark, made_from.encode())


def _judged(
    place: Store,
    request: CanvasRequest,
    cells: Sequence[_Cell],
    domains: tuple[Sequence[str], Sequence[str]],
    forgotten: str,
) -> list[Share]:
    """Return UA, IRA and CRA."""
    (spec,) = request.judges
    images = [place.read_bytes(cell.file) for cell in cells]
    asked = [(cell.theme, cell.object) for cell in cells]
    hits = []
    for names, templates, truth in zip(
        domains, (THEME_TEMPLATES, OBJECT_TEMPLATES), zip(*asked, strict=True), strict=True
    ):
        judge = Judge.load(spec, dict.fromkeys(names, templates), device=request.device)
        hits.append([a == b for a, b in zip(judge.verdicts(images), truth, strict=True)])
    in_domain, cross = hits if forgotten in domains[0] else hits[::-1]
    shows = [forgotten in pair for pair in asked]
    gone = [not hit for hit, shown in zip(in_domain, shows, strict=True) if shown]
    kept = [hit for hit, shown in zip(in_domain, shows, strict=True) if not shown]
    across = [hit for hit, shown in zip(cross, shows, strict=True) if not shown]
    return [Share(sum(part), len(part)) for part in (gone, kept, across)]
