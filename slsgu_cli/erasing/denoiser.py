"""What a pipeline's UNet says to a noisy latent and a prompt, and what it should say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli.errors import InputError
from slsgu_cli.generation.loading import quiet


@dataclass(frozen=True, slots=True)
class Condition:
    """What the UNet reads of prompts: states (rows, tokens, width), and what SDXL adds."""

    states: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def repeated(self, rows: int) -> "Condition":
        """Return one prompt's condition for each of `rows`."""
        return Condition(
            self.states.expand(rows, -1, -1),
            {name: value.expand(rows, -1) for name, value in self.added.items()},
        )


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A pipeline with a UNet that is trained: fp32, whatever the pipeline paints in."""

    pipeline: Any
    device: str

    @property
    def unet(self) -> nn.Module:
        """The UNet, which all its methods run."""
        return self.pipeline.unet  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        config = self.pipeline.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    def conditions(self, prompts: Sequence[str]) -> tuple[Condition, Condition]:
        """Return the conditions of prompts, and as many of the empty prompt."""
        with torch.no_grad(), quiet():
            found = self.pipeline.encode_prompt(
                prompt=list(prompts),
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
        states, empty, *pooled = (value.float() for value in found)
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
            found = vae.encode(images.to(self.device, vae.dtype)).latent_dist.mode()
        return found.float() * vae.config.scaling_factor  # type: ignore[no-any-return]

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return latents with as much noise as the times have."""
        keep, add = self._rates(times)
        return keep * latents + add * noise

    def truth(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return what a perfect UNet says: the noise, or the velocity. Raises InputError."""
        keep, add = self._rates(times)
        kind = self.pipeline.scheduler.config.prediction_type
        match kind:
            case "epsilon":
                return noise
            case "v_prediction":
                return keep * noise - add * latents
        raise InputError(
            f"the pipeline's UNet predicts {kind!r}", hint="one that predicts noise or velocity"
        )

    def says(
        self, noisy: Tensor, times: Tensor, condition: Condition, unet: nn.Module | None = None
    ) -> Tensor:
        """Return what the UNet, or another one, says to noisy latents."""
        added = {"added_cond_kwargs": dict(condition.added)} if condition.added else {}
        run = self.unet if unet is None else unet
        said: Tensor = run(noisy, times, encoder_hidden_states=condition.states, **added).sample
        return said

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
        """Return a latent that was denoised for `until` of `steps` steps, and the time it is at.

        It is as the UNet reads it. The scheduler is the pipeline's.
        """
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(steps, device=self.device)
        extra = self.pipeline.prepare_extra_step_kwargs(generator, 0.0)
        latent = self.noise(1, generator) * scheduler.init_noise_sigma
        times = scheduler.timesteps
        with torch.no_grad():
            for time in times[:until]:
                noisy = scheduler.scale_model_input(latent, time)
                asked, plain = (self.says(noisy, time, each) for each in (condition, empty))
                said = plain + guidance * (asked - plain)
                latent = scheduler.step(said, time, latent, **extra).prev_sample
            time = times[min(until, len(times) - 1)]
            return scheduler.scale_model_input(latent, time), time

    def noise(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return seeded noise for latents."""
        return torch.randn((rows, *self.shape), generator=generator).to(self.device)

    def drawn_times(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return a seeded time for each row, all equally likely."""
        count = len(self.pipeline.scheduler.alphas_cumprod)
        return torch.randint(count, (rows,), generator=generator).to(self.device)

    def _rates(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is kept of the latent and added of the noise at times."""
        kept = self.pipeline.scheduler.alphas_cumprod.to(self.device)[times].float()
        shape = (-1, 1, 1, 1)
        return kept.sqrt().view(shape), (1 - kept).sqrt().view(shape)
