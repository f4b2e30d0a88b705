"""What `slsgu build-sets --generate` does: a source of images that a pipeline makes.

Each image is one file, beside it its caption, in the store. What was made before is not
made again, so a run that was cut short goes on where it stopped.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.build import BuildRequest
from slsgu_cli.errors import UsageError
from slsgu_cli.generation.judging import png_bytes
from slsgu_cli.generation.loading import folder_fingerprint, require_family
from slsgu_cli.generation.painting import Job, Painter, unfinished
from slsgu_cli.generation.records import GeneratedSource, PaintOptions
from slsgu_cli.records import digest
from slsgu_cli.store import Store

FOLDER = "generated"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRequest:
    """Which images to make: `count` of them, the prompts in turn, seeds from `seed` on."""

    prompts: Sequence[str]
    pipeline: Path
    count: int
    seed: int = 0
    paint: PaintOptions = field(default_factory=PaintOptions)
    device: str = "auto"


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
    folder = f"{FOLDER}/{digest(made_from)}"
    prompts = itertools.islice(itertools.cycle(request.prompts), request.count)
    jobs = [Job(prompt, request.seed + number) for number, prompt in enumerate(prompts)]
    missing = unfinished(
        len(jobs), request.paint.batch, lambda number: store.exists(_caption(folder, number))
    )
    left = sum(map(len, missing))
    if left < len(jobs):
        progress.note(f"{len(jobs) - left} of {len(jobs)} images were generated before")
    if missing:
        painter = Painter.load(request.pipeline, device=request.device)
        with progress.bar("generating", left) as ticker:
            for rows in missing:
                images = painter.paint([jobs[n] for n in rows], request.paint)
                for number, image in zip(rows, images, strict=True):
                    store.write_bytes(f"{folder}/{number:06}.png", png_bytes(image))
                    # The caption comes last: with it, an image is complete.
                    store.write_bytes(_caption(folder, number), jobs[number].prompt.encode())
                    ticker.advance()
    store.write_record(f"{folder}.json", record)
    return store.where(folder)


def _caption(folder: str, number: int) -> str:
    return f"{folder}/{number:06}.txt"
