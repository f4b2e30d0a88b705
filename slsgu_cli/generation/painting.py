"""A diffusion pipeline as a source of images, with its CLIP text encoders at hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from slsgu_cli.batches import spans
from slsgu_cli.errors import InputError
from slsgu_cli.generation.live import LiveEncoder
from slsgu_cli.generation.loading import explained, library, quiet, require_family
from slsgu_cli.generation.records import PaintOptions
from slsgu_cli.models import pick_device


@dataclass(frozen=True, slots=True)
class Job:
    """One image to make: what it shall show, and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class Painter:
    """A pipeline in memory, and its text encoders."""

    pipeline: Any
    encoders: tuple[LiveEncoder, ...]
    device: str

    @classmethod
    def load(cls, path: Path, *, device: str = "auto") -> "Painter":
        """Load the pipeline in a folder: fp16 on a GPU, fp32 elsewhere.

        Raises MissingError, InputError, and UsageError where it is no pipeline.
        """
        target = require_family(path, answers=False)
        device = pick_device(device)
        diffusers = library("diffusers")
        half = device.startswith("cuda")
        with quiet(), explained(path):
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                path, local_files_only=True, torch_dtype=torch.float16 if half else torch.float32
            ).to(device)
        pipeline.set_progress_bar_config(disable=True)
        encoders = tuple(
            LiveEncoder.find(getattr(pipeline, encoder.name), encoder)
            for encoder in target.encoders
        )
        return cls(pipeline, encoders, device)

    @contextmanager
    def edited(self, values: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[None]:
        """Give layers of the text encoders other values for the length of a block."""
        with ExitStack() as stack:
            for encoder, own in zip(self.encoders, values, strict=bool(values)):
                stack.enter_context(encoder.edited(own))
            yield

    def paint(self, jobs: Sequence[Job], options: PaintOptions) -> Iterator[Image.Image]:
        """Yield an image for each job, in order. Raises InputError for a prompt it refuses."""
        extra = {} if options.guidance is None else {"guidance_scale": options.guidance}
        for start, stop in spans(len(jobs), options.batch):
            some = jobs[start:stop]
            noise = [torch.Generator("cpu").manual_seed(job.seed) for job in some]
            with torch.no_grad(), quiet():
                try:
                    made = self.pipeline(
                        [job.prompt for job in some],
                        num_inference_steps=options.steps,
                        generator=noise,
                        **extra,
                    )
                except (ValueError, TypeError) as error:
                    raise InputError(f"the pipeline refuses {some[0].prompt!r}: {error}") from error
            yield from made.images


def unfinished(count: int, batch: int, done: Callable[[int], bool]) -> list[range]:
    """Return the batches of `count` images that are not all `done`.

    A run that was cut short goes on with whole batches, so that every image is made in the
    company that it would have had: sums in another order change last digits.
    """
    batches = [range(start, stop) for start, stop in spans(count, batch)]
    return [rows for rows in batches if not all(map(done, rows))]
