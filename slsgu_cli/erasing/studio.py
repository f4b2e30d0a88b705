"""A pipeline that each method is run on in turn, from its original weights every time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import nn

from slsgu_cli import progress
from slsgu_cli.batches import spans
from slsgu_cli.edits import Edit
from slsgu_cli.erasing import esd, salun
from slsgu_cli.erasing.denoiser import Denoiser
from slsgu_cli.erasing.records import Method, Plan
from slsgu_cli.generation.gallery import Gallery
from slsgu_cli.generation.live import new_values
from slsgu_cli.generation.loading import quiet
from slsgu_cli.generation.painting import Painter
from slsgu_cli.moments import chosen_rows
from slsgu_cli.records import DataRef, SetManifest
from slsgu_cli.sets import DataBlock
from slsgu_cli.store import Store

ROWS = 16


@dataclass(frozen=True, slots=True)
class Studio:
    """A pipeline, the pictures it is judged by, and the set it is to forget."""

    store: Store
    manifest: SetManifest
    painter: Painter
    gallery: Gallery

    def painted(self, label: str) -> list[bytes]:
        """Return the gallery's pictures by the pipeline as it is now, the concept's first."""
        frames = [*self.gallery.own, *self.gallery.rest]
        found = []
        with progress.bar(f"pictures of {label}", len(frames)) as ticker:
            for image in self.gallery.painted(self.painter, frames):
                found.append(image)
                ticker.advance()
        return found

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """Have our edit in place for the length of a block."""
        with self.painter.edited(new_values(self.painter.encoders, [edit])):
            yield

    @contextmanager
    def trained(self, method: Method, plan: Plan) -> Iterator[float]:
        """Have the UNet trained by a method for the length of a block; yield the seconds."""
        pipeline = self.painter.pipeline
        unet, vae = pipeline.unet, pipeline.vae
        kinds = unet.dtype, vae.dtype
        before = {name: value.clone() for name, value in unet.state_dict().items()}
        start = perf_counter()
        try:
            _cast((unet, torch.float32), (vae, torch.float32))
            self._train(method, plan)
            _cast((unet, kinds[0]), (vae, kinds[1]))
            yield perf_counter() - start
        finally:
            unet.load_state_dict(before)

    def _train(self, method: Method, plan: Plan) -> None:
        denoiser = Denoiser(self.painter.pipeline, self.painter.device)
        if method is Method.ESD:
            name, templates = self.gallery.name, self.gallery.templates
            prompts = [self.gallery.prompt(name, number) for number in range(len(templates))]
            esd.erase(denoiser, prompts, plan)
            return
        forget, _ = self._latents(denoiser, self.manifest.forget)
        retain, captions = self._latents(denoiser, self.manifest.retain)
        lessons = salun.Lessons(
            forget=forget,
            retain=retain,
            captions=captions,
            concept=self.gallery.name,
            others=[name for name in self.gallery.judge.names if name != self.gallery.name],
            prompt=self.gallery.prompt,
        )
        salun.unlearn(denoiser, lessons, plan)

    def _latents(self, denoiser: Denoiser, ref: DataRef) -> tuple[torch.Tensor, Sequence[str]]:
        """Return the latents and captions of a block, of at most as many rows as moments take."""
        block = DataBlock.open(self.store, ref)
        rows = chosen_rows(block.rows)
        parts = [
            denoiser.latents(block.take(rows[start:stop])) for start, stop in spans(len(rows), ROWS)
        ]
        return torch.cat(parts), [block.captions[row] for row in rows]


def _cast(*parts: tuple[nn.Module, torch.dtype]) -> None:
    """Give parts of the pipeline a precision; diffusers warns of any."""
    with quiet():
        for module, kind in parts:
            module.to(kind)
