"""ESD-x and SalUn on the UNet of a diffusion pipeline."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.clip.batches import spans
from slsgu_cli.compare.methods import mask_gradients, saliency_mask
from slsgu_cli.errors import InputError
from slsgu_cli.records.studies import PipelinePlan


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
    """A pipeline with a UNet that is trained: fp32, whatever the pipeline generates in."""

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
        """Return latents with as much noise as the times have."""
        keep, add = self._rates(times)
        return keep * latents + add * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return what a perfect UNet predicts: the noise, or the velocity. Raises InputError."""
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

    def predict(
        self, noisy: Tensor, times: Tensor, condition: Condition, unet: nn.Module | None = None
    ) -> Tensor:
        """Return what the UNet, or another one, predicts of noisy latents."""
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
                prompted = self.predict(noisy, time, condition)
                unprompted = self.predict(noisy, time, empty)
                predicted = unprompted + guidance * (prompted - unprompted)
                latent = scheduler.step(predicted, time, latent, **extra).prev_sample
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


ERASING = 1.0

# The guidance that latents are denoised with.
GUIDANCE = 3.0


def erase(denoiser: Denoiser, prompts: Sequence[str], plan: PipelinePlan) -> None:
    """Train the UNet in place; the concept's `prompts` take turns.

    Raises InputError where the UNet has no cross-attention.
    """
    unet = denoiser.unet
    original = copy.deepcopy(unet).requires_grad_(False)
    attention = cross_attention(unet)
    unet.requires_grad_(False)
    for parameter in attention.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(attention.values(), lr=plan.rate)
    generator = torch.Generator("cpu").manual_seed(plan.seed)
    conditions = [denoiser.conditions([prompt]) for prompt in prompts]
    with progress.bar(f"ESD {plan.rate:g}", plan.iterations) as ticker:
        for number in range(plan.iterations):
            condition, empty = conditions[number % len(conditions)]
            until = int(torch.randint(plan.steps, (), generator=generator))
            noisy, time = denoiser.partly_denoised(
                condition,
                empty,
                steps=plan.steps,
                until=until,
                guidance=GUIDANCE,
                generator=generator,
            )
            goal = negated(denoiser, original, noisy, time, condition, empty)
            loss = nn.functional.mse_loss(denoiser.predict(noisy, time, condition), goal)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            ticker.advance()
    unet.requires_grad_(True)


def negated(
    denoiser: Denoiser,
    original: nn.Module,
    noisy: Tensor,
    time: Tensor,
    condition: Condition,
    empty: Condition,
) -> Tensor:
    """Return what leads away from a prompt, by the original UNet."""
    with torch.no_grad():
        prompted = denoiser.predict(noisy, time, condition, original)
        unprompted = denoiser.predict(noisy, time, empty, original)
        return unprompted - ERASING * (prompted - unprompted)


def cross_attention(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the layers that read the prompt. Raises InputError without any."""
    layers = [
        name
        for name, module in unet.named_modules()
        if getattr(module, "is_cross_attention", False)
    ]
    parameters = {
        name: parameter
        for name, parameter in unet.named_parameters()
        if any(name.startswith(f"{layer}.") for layer in layers)
    }
    if not parameters:
        raise InputError("the pipeline's UNet has no cross-attention that ESD could train")
    return parameters


BATCH = 8

# How much the retain loss weighs beside that of the random labels.
RETAINING = 0.1


@dataclass(frozen=True, slots=True)
class SalunData:
    """What SalUn learns from: latents of the forget set, latents and captions of the retain set.

    `prompt` gives a prompt for a class by the number of its turn, `others` are the classes
    whose prompts the concept's is taught to be taken for.
    """

    forget: Tensor
    retain: Tensor
    captions: Sequence[str]
    concept: str
    others: Sequence[str]
    prompt: Callable[[str, int], str]


def unlearn(denoiser: Denoiser, data: SalunData, plan: PipelinePlan) -> None:
    """Train the UNet in place."""
    unet = denoiser.unet.requires_grad_(True)
    generator = torch.Generator("cpu").manual_seed(plan.seed)
    mask = forget_mask(denoiser, data, generator)
    optimizer = torch.optim.Adam(unet.parameters(), lr=plan.rate)
    with progress.bar(f"SalUn {plan.rate:g}", plan.iterations) as ticker:
        for _ in range(plan.iterations):
            optimizer.zero_grad()
            loss = relabelled(denoiser, data, generator)
            loss = loss + RETAINING * retained(denoiser, data, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            mask_gradients(unet, mask)
            optimizer.step()
            ticker.advance()


def forget_mask(
    denoiser: Denoiser, data: SalunData, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return where the diffusion loss of the forget set has the larger half of its gradient."""
    unet, latents = denoiser.unet, data.forget
    unet.zero_grad()
    for start, stop in spans(len(latents), BATCH):
        prompts = [data.prompt(data.concept, number) for number in range(start, stop)]
        _loss(denoiser, latents[start:stop], prompts, generator).backward()  # type: ignore[no-untyped-call]
    gradient = {
        name: parameter.grad.cpu().numpy()
        for name, parameter in unet.named_parameters()
        if parameter.grad is not None
    }
    unet.zero_grad()
    return {name: kept.to(denoiser.device) for name, kept in saliency_mask(gradient).items()}


def relabelled(denoiser: Denoiser, data: SalunData, generator: torch.Generator) -> Tensor:
    """Return how far what the concept's prompt predicts is from what another's does."""
    latents = data.forget[_drawn(len(data.forget), generator)]
    turns = _drawn(len(data.others), generator, len(latents))
    named = [data.prompt(data.concept, number) for number in turns]
    other = [data.prompt(data.others[number], number) for number in turns]
    times = denoiser.drawn_times(len(latents), generator)
    noisy = denoiser.noised(latents, denoiser.noise(len(latents), generator), times)
    with torch.no_grad():
        goal = denoiser.predict(noisy, times, denoiser.conditions(other)[0])
    return nn.functional.mse_loss(
        denoiser.predict(noisy, times, denoiser.conditions(named)[0]), goal
    )


def retained(denoiser: Denoiser, data: SalunData, generator: torch.Generator) -> Tensor:
    """Return the diffusion loss of some of the retain set."""
    rows = _drawn(len(data.retain), generator)
    captions = [data.captions[row] for row in rows]
    return _loss(denoiser, data.retain[rows], captions, generator)


def _loss(
    denoiser: Denoiser, latents: Tensor, prompts: Sequence[str], generator: torch.Generator
) -> Tensor:
    times = denoiser.drawn_times(len(latents), generator)
    noise = denoiser.noise(len(latents), generator)
    predicted = denoiser.predict(
        denoiser.noised(latents, noise, times), times, denoiser.conditions(prompts)[0]
    )
    return nn.functional.mse_loss(predicted, denoiser.target(latents, noise, times))


def _drawn(rows: int, generator: torch.Generator, count: int = BATCH) -> list[int]:
    """Return `count` rows drawn at random; any may come twice."""
    return torch.randint(rows, (count,), generator=generator).tolist()
