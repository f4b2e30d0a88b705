"""The UNet of a diffusion pipeline: its conditions, latents and predictions."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.errors import InputError


@dataclass(frozen=True, slots=True)
class Condition:
    """The UNet's encoding of prompts: states (rows, tokens, width), and SDXL's additions."""

    states: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A pipeline whose UNet is trained in fp32, whatever precision it generates in."""

    pipeline: Any
    device: str

    @property
    def unet(self) -> nn.Module:
        """The UNet."""
        return self.pipeline.unet  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        config = self.pipeline.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    def conditions(self, prompts: Sequence[str]) -> tuple[Condition, Condition]:
        """Return the conditions of prompts, and equally many of the empty prompt."""
        with torch.no_grad(), progress.quiet():
            encoded = self.pipeline.encode_prompt(
                prompt=list(prompts),
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
        states, empty, *pooled = (value.float() for value in encoded)
        if not pooled:
            return Condition(states), Condition(empty)
        scale = self.pipeline.vae_scale_factor
        height, width = (side * scale for side in self.shape[1:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=self.device)
        times = sizes.float().expand(len(states), -1)
        return (
            Condition(states, {"text_embeds": pooled[0], "time_ids": times}),
            Condition(empty, {"text_embeds": pooled[1], "time_ids": times}),
        )

    def latents(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """Return the means of images' latents; `pixels` are (rows, height, width, 3)."""
        vae, scale = self.pipeline.vae, self.pipeline.vae_scale_factor
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        size = tuple(side * scale for side in self.shape[1:])
        images = nn.functional.interpolate(images, size, mode="bicubic", antialias=True)
        with torch.no_grad():
            latents = vae.encode(images.to(self.device, vae.dtype)).latent_dist.mode()
        return latents.float() * vae.config.scaling_factor  # type: ignore[no-any-return]

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return latents with noise at the given times."""
        signal, added = self._rates(times)
        return signal * latents + added * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return the target of the prediction: the noise, or the velocity. Raises InputError."""
        signal, added = self._rates(times)
        kind = self.pipeline.scheduler.config.prediction_type
        match kind:
            case "epsilon":
                return noise
            case "v_prediction":
                return signal * noise - added * latents
        raise InputError(
            f"the pipeline's UNet predicts {kind!r}",
            hint="use a pipeline whose UNet predicts noise or velocity",
        )

    def predict(
        self, noisy: Tensor, times: Tensor, condition: Condition, unet: nn.Module | None = None
    ) -> Tensor:
        """Return the prediction of the UNet, or of another one, for noisy latents."""
        added = {"added_cond_kwargs": dict(condition.added)} if condition.added else {}
        run = self.unet if unet is None else unet
        output = run(noisy, times, encoder_hidden_states=condition.states, **added)
        predicted: Tensor = output.sample
        return predicted

    def partly_denoised(
        self,
        condition: Condition,
        empty: Condition,
        *,
        steps: int,
        until: int,
        guidance: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Return a latent after `until` of `steps` denoising steps, and its time.

        It is scaled as the UNet reads it. The scheduler is the pipeline's.
        """
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(steps, device=self.device)
        extra = self.pipeline.prepare_extra_step_kwargs(generator, 0.0)
        latent = self.noise(1, generator) * scheduler.init_noise_sigma
        times = scheduler.timesteps
        with torch.no_grad():
            for time in times[:until]:
                noisy = scheduler.scale_model_input(latent, time)
                prompted = self.predict(noisy, time, condition)
                unprompted = self.predict(noisy, time, empty)
                predicted = unprompted + guidance * (prompted - unprompted)
                latent = scheduler.step(predicted, time, latent, **extra).prev_sample
            time = times[min(until, len(times) - 1)]
            return scheduler.scale_model_input(latent, time), time

    def noise(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return noise for latents by a seeded generator."""
        return torch.randn((rows, *self.shape), generator=generator).to(self.device)

    def drawn_times(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return a uniformly random time for each row, by a seeded generator."""
        count = len(self.pipeline.scheduler.alphas_cumprod)
        return torch.randint(count, (rows,), generator=generator).to(self.device)

    def _rates(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rates of the latent and of the noise at the given times."""
        signal = self.pipeline.scheduler.alphas_cumprod.to(self.device)[times].float()
        shape = (-1, 1, 1, 1)
        return signal.sqrt().view(shape), (1 - signal).sqrt().view(shape)


@contextmanager
def in_fp32(pipeline: Any) -> Iterator[None]:
    """Run a block with UNet and VAE in fp32; then restore their precision.

    The UNet keeps the weights that the block gave it.
    """
    precisions = [(module, module.dtype) for module in (pipeline.unet, pipeline.vae)]
    # diffusers warns of any change of precision.
    with progress.quiet():
        for module, _ in precisions:
            module.float()
    try:
        yield
    finally:
        with progress.quiet():
            for module, precision in precisions:
                module.to(precision)
