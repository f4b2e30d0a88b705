"""ESD-x: cross-attention is trained to say, of the concept, what leads away from it.

To the concept's prompt the UNet shall say what the original says to none, less `ERASING`
times what the prompt adds: uncond - ERASING (cond - uncond). The weights of the three terms
add up to one, so this is the same for UNets that predict noise and those that predict
velocity. Latents are partly denoised by the UNet as it is at the time, with the prompt.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.erasing.denoiser import Condition, Denoiser
from slsgu_cli.erasing.records import Plan
from slsgu_cli.errors import InputError

ERASING = 1.0
# The guidance that latents are denoised with.
GUIDANCE = 3.0


def erase(denoiser: Denoiser, prompts: Sequence[str], plan: Plan) -> None:
    """Train the UNet in place; the concept's `prompts` take turns.

    Raises InputError where the UNet has no cross-attention.
    """
    unet = denoiser.unet
    original = copy.deepcopy(unet).requires_grad_(False)
    own = cross_attention(unet)
    unet.requires_grad_(False)
    for parameter in own.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(own.values(), lr=plan.rate)
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
            loss = nn.functional.mse_loss(denoiser.says(noisy, time, condition), goal)
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
        asked = denoiser.says(noisy, time, condition, original)
        plain = denoiser.says(noisy, time, empty, original)
        return plain - ERASING * (asked - plain)


def cross_attention(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the layers that read the prompt. Raises InputError without any."""
    layers = [
        name for name, module in unet.named_modules()
        if getattr(module, "is_cross_attention", False)
    ]  # fmt: skip
    found = {
        name: parameter
        for name, parameter in unet.named_parameters()
        if any(name.startswith(f"{layer}.") for layer in layers)
    }
    if not found:
        raise InputError("the pipeline's UNet has no cross-attention that ESD could train")
    return found
