"""SalUn on a diffusion model: random labels, on the weights that forgetting concerns most.

The mask is where the forget gradient of the diffusion loss is in its top half over all
weights of the UNet. Under it, the UNet learns to say to the concept's prompt what it says
to a prompt for another class, while it keeps what the retain set teaches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.baselines.training import mask_gradients, saliency_mask
from slsgu_cli.batches import spans
from slsgu_cli.erasing.denoiser import Denoiser
from slsgu_cli.erasing.records import Plan

BATCH = 8
# How much the retain loss weighs beside that of the random labels.
RETAINING = 0.1


@dataclass(frozen=True, slots=True)
class Lessons:
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


def unlearn(denoiser: Denoiser, lessons: Lessons, plan: Plan) -> None:
    """Train the UNet in place."""
    unet = denoiser.unet.requires_grad_(True)
    generator = torch.Generator("cpu").manual_seed(plan.seed)
    mask = forget_mask(denoiser, lessons, generator)
    optimizer = torch.optim.Adam(unet.parameters(), lr=plan.rate)
    with progress.bar(f"SalUn {plan.rate:g}", plan.iterations) as ticker:
        for _ in range(plan.iterations):
            optimizer.zero_grad()
            loss = relabelled(denoiser, lessons, generator)
            loss = loss + RETAINING * retained(denoiser, lessons, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            mask_gradients(unet, mask)
            optimizer.step()
            ticker.advance()


def forget_mask(
    denoiser: Denoiser, lessons: Lessons, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return where the diffusion loss of the forget set has the larger half of its gradient."""
    unet, latents = denoiser.unet, lessons.forget
    unet.zero_grad()
    for start, stop in spans(len(latents), BATCH):
        prompts = [lessons.prompt(lessons.concept, number) for number in range(start, stop)]
        _loss(denoiser, latents[start:stop], prompts, generator).backward()  # type: ignore[no-untyped-call]
    found = {
        name: parameter.grad.cpu().numpy()
        for name, parameter in unet.named_parameters()
        if parameter.grad is not None
    }
    unet.zero_grad()
    return {name: kept.to(denoiser.device) for name, kept in saliency_mask(found).items()}


def relabelled(denoiser: Denoiser, lessons: Lessons, generator: torch.Generator) -> Tensor:
    """Return how far what is said to the concept's prompt is from what is said to another's."""
    latents = lessons.forget[_drawn(len(lessons.forget), generator)]
    turns = _drawn(len(lessons.others), generator, len(latents))
    named = [lessons.prompt(lessons.concept, number) for number in turns]
    other = [lessons.prompt(lessons.others[number], number) for number in turns]
    times = denoiser.drawn_times(len(latents), generator)
    noisy = denoiser.noised(latents, denoiser.noise(len(latents), generator), times)
    with torch.no_grad():
        goal = denoiser.says(noisy, times, denoiser.conditions(other)[0])
    return nn.functional.mse_loss(denoiser.says(noisy, times, denoiser.conditions(named)[0]), goal)


def retained(denoiser: Denoiser, lessons: Lessons, generator: torch.Generator) -> Tensor:
    """Return the diffusion loss of some of the retain set."""
    rows = _drawn(len(lessons.retain), generator)
    captions = [lessons.captions[row] for row in rows]
    return _loss(denoiser, lessons.retain[rows], captions, generator)


def _loss(
    denoiser: Denoiser, latents: Tensor, prompts: Sequence[str], generator: torch.Generator
) -> Tensor:
    times = denoiser.drawn_times(len(latents), generator)
    noise = denoiser.noise(len(latents), generator)
    said = denoiser.says(
        denoiser.noised(latents, noise, times), times, denoiser.conditions(prompts)[0]
    )
    return nn.functional.mse_loss(said, denoiser.truth(latents, noise, times))


def _drawn(rows: int, generator: torch.Generator, count: int = BATCH) -> list[int]:
    """Return `count` rows drawn at random; any may come twice."""
    return torch.randint(rows, (count,), generator=generator).tolist()
