"""Folders of generated images: a source of rows; a benchmark's answer set."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import edit_digests, load_edit
from slsgu_cli.downstream.judge import Judge, judge_specs, png_bytes
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
from slsgu_cli.records.figures import Share
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.target_options import CanvasRequest, SourceRequest
from slsgu_cli.records.targets import AnswerSet, GeneratedSource
from slsgu_cli.sets.evaluation_sets import read_classes
from slsgu_cli.sources.classes import find_class
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store


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
    concept = edits[0].header.concept
    themes, objects = (_listed(name) for name in (request.themes, request.objects))
    of_theme, of_object = find_class(themes, concept), find_class(objects, concept)
    if (of_theme is None) == (of_object is None):
        what = "neither a theme nor an object" if of_theme is None else "a theme and an object"
        raise UsageError(f"{concept!r} is {what}", hint="--themes FILE, --objects FILE")
    place = Store(str(request.out))
    cells = [_Cell(*cell) for cell in itertools.product(themes, objects, request.seeds)]
    made_from = {
        "edits": edit_digests(edits),
        "target": str(request.target),
        "paint": request.paint,
    }
    _begin(place, digest(made_from))
    missing = unfinished(
        len(cells), request.paint.batch, lambda number: place.exists(cells[number].file)
    )
    if missing:
        pipe = Pipeline.load(request.target, device=request.device)
        values = new_values(pipe.encoders, edits)
        left = sum(map(len, missing))
        with progress.bar("generating", left) as ticker, pipe.edited(values):
            for rows in missing:
                images = pipe.paint([cells[number].job for number in rows], request.paint)
                for number, image in zip(rows, images, strict=True):
                    place.write_bytes(cells[number].file, _jpeg(image))
                    ticker.advance()
    figures: tuple[Share | None, Share | None, Share | None] = (None, None, None)
    if request.judges:
        prompted = themes[of_theme] if of_theme is not None else objects[of_object or 0]
        figures = _judged(place, request, cells, (themes, objects), prompted)
    record = AnswerSet(
        name=edits[0].header.name,
        concept=concept,
        domain="theme" if of_theme is not None else "object",
        images=len(cells),
        judge=str(request.judges[0]) if request.judges else None,
        ua=figures[0],
        ira=figures[1],
        cra=figures[2],
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
) -> tuple[Share, Share, Share]:
    """Return UA, IRA and CRA."""
    (spec,) = request.judges
    images = [place.read_bytes(cell.file) for cell in cells]
    hits = []
    for names, templates, attribute in zip(
        domains, (THEME_TEMPLATES, OBJECT_TEMPLATES), ("theme", "object"), strict=True
    ):
        judge = Judge.load(spec, dict.fromkeys(names, templates), device=request.device)
        verdicts = judge.verdicts(images)
        truth = [getattr(cell, attribute) for cell in cells]
        hits.append([a == b for a, b in zip(verdicts, truth, strict=True)])
    in_domain, cross = hits if forgotten in domains[0] else hits[::-1]
    shows = [forgotten in (cell.theme, cell.object) for cell in cells]
    gone = [not hit for hit, shown in zip(in_domain, shows, strict=True) if shown]
    kept = [hit for hit, shown in zip(in_domain, shows, strict=True) if not shown]
    across = [hit for hit, shown in zip(cross, shows, strict=True) if not shown]
    return tuple(Share(sum(part), len(part)) for part in (gone, kept, across))  # type: ignore[return-value]


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()
