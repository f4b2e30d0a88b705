"""Forget sets whose images a pipeline generates."""

import itertools
from dataclasses import replace

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.errors import UsageError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.targets import GeneratedSource, SourceRequest
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store
from slsgu_cli.targets.models import (
    ImageJob,
    Pipeline,
    encoded,
    folder_fingerprint,
    require_family,
)


def forgetting_generated(
    store: Store, request: BuildRequest, images: SourceRequest
) -> BuildRequest:
    """Return a request whose forget set is generated; its own sources become retain sources.

    Raises MissingError, InputError, and UsageError if there is no source to retain.
    """
    if request.match or request.regex:
        raise UsageError("--generate forgets all generated images", hint="leave --match out")
    retained = request.retain_sources or request.sources
    if not retained:
        raise UsageError("there is no source to retain", hint="name one with --source")
    if not images.prompts or any(not prompt.strip() for prompt in images.prompts):
        raise UsageError("--generate needs a prompt", hint="--generate 'an avocado chair'")
    require_family(images.pipeline, answers=False)
    record = GeneratedSource(
        pipeline=str(images.pipeline),
        pipeline_fingerprint=folder_fingerprint(images.pipeline),
        prompts=tuple(images.prompts),
        count=images.count,
        seed=images.seed,
        diffusion=images.diffusion,
        version=slsgu_cli.__version__,
    )
    # More images of the same prompts are added to the existing ones. Neither the pipeline's
    # location nor the version matters.
    made_from = [record.pipeline_fingerprint, record.prompts, record.seed, record.diffusion]
    address = digest(made_from)
    folder = Artifact.GENERATED.folder_of(address)
    prompts = itertools.islice(itertools.cycle(images.prompts), images.count)
    jobs = [ImageJob(prompt, images.seed + number) for number, prompt in enumerate(prompts)]
    done = [store.exists(_caption(folder, number)) for number in range(len(jobs))]
    if any(done):
        progress.note(f"{sum(done)} of {len(jobs)} images already exist")
    if not all(done):
        pipe = Pipeline.load(images.pipeline, device=images.device)
        for number, image in pipe.generate_missing(jobs, images.diffusion, done):
            store.write_bytes(f"{folder}/{number:06}.png", encoded(image))
            # The caption is written last: it marks the image as complete.
            store.write_bytes(_caption(folder, number), jobs[number].prompt.encode())
    store.write_record(Artifact.GENERATED.path(address), record)
    # Captions are the prompts. An earlier run may have left more images than requested.
    return replace(
        request,
        sources=[store.where(folder)],
        retain_sources=retained,
        match=tuple(dict.fromkeys(images.prompts)),
        max_forget=request.max_forget or images.count,
    )


def _caption(folder: str, number: int) -> str:
    return f"{folder}/{number:06}.txt"
